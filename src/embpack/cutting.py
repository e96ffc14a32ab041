"""Which file of a packed checkpoint gets which tensors: those of the source's files, or files of a size."""

from collections.abc import Sequence

from embpack.chunks import span_rows
from embpack.files import PIECE_ROWS
from embpack.formats import Checkpoint, SourceTensor
from embpack.formats.safetensors import bound_bytes
from embpack.kept import RANGE
from embpack.rules import Decision, split_decisions
from embpack.shard_writer import PieceWriter, Progress, ShardWriter, TableWriter, no_progress

DEFAULT_SIZE = 5_000_000_000
"""Bytes of a file at most, where files are cut anew and nobody says a size; as Hugging Face's tools have it."""

# Nobody has a file of more bytes: places of tensors in it have as many digits at most.
_MOST_BYTES = 10**15


def keep_files(
    checkpoint: Checkpoint, decisions: Sequence[Decision], progress: Progress = no_progress
) -> list[ShardWriter] | None:
    """Have each file of a checkpoint become one; None if a table is made of tensors in several files."""
    file_of = {tensor.name: at for at, shard in enumerate(checkpoint.shards) for tensor in shard.tensors}
    if any(len({file_of[part.name] for part in each.tensor.parts}) > 1 for each in decisions if each.variant):
        return None
    return [
        ShardWriter(tuple(_whole(each, progress) for each in own), shard.metadata)
        for shard, own in zip(checkpoint.shards, split_decisions(checkpoint, decisions), strict=True)
    ]


def cut_files(
    checkpoint: Checkpoint, decisions: Sequence[Decision], max_bytes: int, progress: Progress = no_progress
) -> list[ShardWriter]:
    """Fill files with tensors, in order, until one would have more than so many bytes.

    A table that no file would hold is cut into pieces, one at the beginning of each of several files. What cannot be
    cut, a tensor that is no table or PIECE_ROWS rows of one, makes a file as large as it is.
    """
    metadata = join_metadata(checkpoint)
    empty = count_bytes([], metadata)
    files, file, size = list[list[PieceWriter | SourceTensor]](), list[PieceWriter | SourceTensor](), empty
    for decision in decisions:
        whole = _whole(decision, progress)
        added = count_added(whole)
        if file and size + added > max_bytes:
            files.append(file)
            file, size = [], empty
        *full, last = cut(whole, max_bytes - empty)
        files += [[piece] for piece in full]
        file.append(last)
        size += count_added(last)
    return [ShardWriter(tuple(each), metadata) for each in [*files, file] if each]


def join_metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """Make the metadata of files that are cut anew; of equal keys the first one counts."""
    return {key: value for shard in reversed(checkpoint.shards) for key, value in shard.metadata.items()}


def cut(tensor: PieceWriter | SourceTensor, room: int) -> Sequence[PieceWriter | SourceTensor]:
    """Cut a whole table that does not fit into files with so much room, if that can be."""
    if isinstance(tensor, SourceTensor) or count_added(tensor) <= room:
        return [tensor]
    table, num_rows = tensor.table, tensor.num_rows
    # Numbers in its description are of as many digits as they can have.
    piece = PieceWriter(table, num_rows, num_rows, num_rows)
    row_bytes = piece.nbytes - PieceWriter(table, 0, num_rows - 1).nbytes
    # What is kept of ranges of rows takes bytes by these; the entry for the whole and that of the last range are whole.
    span, range_bytes = span_rows(table.row_format.embedding_dim), RANGE.itemsize if piece.kept_bytes else 0
    fixed = count_added(piece) - num_rows * row_bytes - piece.kept_bytes + 2 * range_bytes
    fitting = (room - fixed) * span // (row_bytes * span + range_bytes)
    rows = max(1, fitting // PIECE_ROWS) * PIECE_ROWS
    return table.cut(rows) if rows < num_rows else [tensor]


def count_added(tensor: PieceWriter | SourceTensor, most: int = _MOST_BYTES) -> int:
    """Count what a tensor adds to a file, with all that describes it; never too few bytes.

    Args:
        tensor: which is there whole, or in a piece.
        most: no file has more bytes.
    """
    separator = 2  # a comma and a space, in the metadata
    return count_bytes([tensor], {}, most) - count_bytes([], {}, most) + separator


def count_bytes(
    tensors: Sequence[PieceWriter | SourceTensor], metadata: dict[str, str], most: int = _MOST_BYTES
) -> int:
    """Count the bytes of a file, which has no more than most; never too few."""
    return bound_bytes(ShardWriter(tuple(tensors), metadata).out_shard(""), most)


def _whole(decision: Decision, progress: Progress) -> PieceWriter | SourceTensor:
    return TableWriter(decision, progress).whole() if decision.variant else decision.tensor
