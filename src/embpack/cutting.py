"""Which file of a packed checkpoint gets which tensors: those of the source's files, or files of a size."""

from collections.abc import Sequence

from embpack.files import PIECE_ROWS
from embpack.formats import Checkpoint, SourceTensor
from embpack.formats.safetensors import bound_bytes
from embpack.rules import Decision
from embpack.shard_writer import PieceWriter, Progress, ShardWriter, TableWriter

DEFAULT_SIZE = 5_000_000_000
"""Bytes of a file at most, where files are cut anew and nobody says a size; as Hugging Face's tools have it."""

# Nobody has a file of more bytes: places of tensors in it have as many digits at most.
_MOST_BYTES = 10**15


def keep_files(checkpoint: Checkpoint, decisions: Sequence[Decision], progress: Progress) -> list[ShardWriter] | None:
    """Have each file of a checkpoint become one; None if a table is made of tensors in several files."""
    if len(checkpoint.shards) == 1:
        [shard] = checkpoint.shards
        return [ShardWriter(tuple(_whole(each, progress) for each in decisions), shard.metadata)]
    file_of = {tensor.name: at for at, shard in enumerate(checkpoint.shards) for tensor in shard.tensors}
    files: list[list[Decision]] = [[] for _ in checkpoint.shards]
    for decision in decisions:
        own = {file_of[tensor.name] for tensor in decision.tensor.parts or (decision.tensor,)}
        if len(own) > 1:
            return None
        files[own.pop()].append(decision)
    return [
        ShardWriter(tuple(_whole(each, progress) for each in file), shard.metadata)
        for shard, file in zip(checkpoint.shards, files, strict=True)
    ]


def cut_files(
    checkpoint: Checkpoint, decisions: Sequence[Decision], max_bytes: int, progress: Progress
) -> list[ShardWriter]:
    """Fill files with tensors, in order, until one would have more than so many bytes.

    A table that no file would hold is cut into pieces, one at the beginning of each of several files. What cannot be
    cut, a tensor that is no table or PIECE_ROWS rows of one, makes a file as large as it is.
    """
    # Of equal keys the first one counts.
    metadata = {key: value for shard in reversed(checkpoint.shards) for key, value in shard.metadata.items()}
    empty = _count_bytes([], metadata)
    files, file, size = list[list[PieceWriter | SourceTensor]](), list[PieceWriter | SourceTensor](), empty
    for decision in decisions:
        whole = _whole(decision, progress)
        added = _count_added(whole)
        if file and size + added > max_bytes:
            files.append(file)
            file, size = [], empty
        pieces = _cut(whole, max_bytes - empty) if empty + added > max_bytes else [whole]
        for piece in pieces[:-1]:
            files.append([piece])
        file.append(pieces[-1])
        size += _count_added(pieces[-1])
    return [ShardWriter(tuple(each), metadata) for each in [*files, file] if each]


def _cut(tensor: PieceWriter | SourceTensor, room: int) -> "Sequence[PieceWriter | SourceTensor]":
    """Cut a table that does not fit into files with so much room, if that can be."""
    if isinstance(tensor, SourceTensor):
        return [tensor]
    table, num_rows = tensor.table, tensor.num_rows
    # Numbers in its description are of as many digits as they can have.
    piece = PieceWriter(table, num_rows, num_rows, num_rows)
    row_bytes = piece.nbytes - PieceWriter(table, 0, num_rows - 1).nbytes
    fitting = (room - (_count_added(piece) - num_rows * row_bytes)) // row_bytes
    rows = max(1, fitting // PIECE_ROWS) * PIECE_ROWS
    return table.cut(rows) if rows < num_rows else [tensor]


def _count_added(tensor: PieceWriter | SourceTensor) -> int:
    """Count what a tensor adds to a file, with all that describes it; never too few bytes."""
    separators = 8  # commas and spaces, in the header and in the metadata
    return _count_bytes([tensor], {}) - _count_bytes([], {}) + separators


def _count_bytes(tensors: Sequence[PieceWriter | SourceTensor], metadata: dict[str, str]) -> int:
    return bound_bytes(ShardWriter(tuple(tensors), metadata).out_shard(""), _MOST_BYTES)


def _whole(decision: Decision, progress: Progress) -> PieceWriter | SourceTensor:
    return TableWriter(decision, progress).whole() if decision.variant else decision.tensor
