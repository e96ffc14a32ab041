"""Checkpoint in, packed checkpoint out, streaming."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

from embpack.destination import check_place, name_file, name_index
from embpack.formats import Checkpoint, OutFolder, OutShard, open_checkpoint, write_checkpoint
from embpack.formats.safetensors import count_file_bytes as count_shard_bytes
from embpack.gate import check_losses
from embpack.methods import DEFAULT_METHOD, Method
from embpack.packed_folder import copy_and_list, list_own, name_packed
from embpack.rules import Decision, Rules, decide_all, split_decisions
from embpack.shard_writer import Progress, ShardWriter, TableReport, TableWriter
from embpack.variant import Variant


@dataclass(frozen=True)
class Report:
    """What packing a checkpoint came to.

    Attributes:
        tables: in file order.
        passed_through: names of the tensors that were copied as they are.
        left_out: what the output cannot hold, or does not get, in words.
        copied_files: the model's other files that go along with a folder, by their paths in it.
        file_bytes_before, file_bytes_after: of all files read and written.
        seconds: all in all.
    """

    tables: tuple[TableReport, ...]
    passed_through: tuple[str, ...]
    left_out: tuple[str, ...]
    copied_files: tuple[str, ...]
    file_bytes_before: int
    file_bytes_after: int
    seconds: float

    @property
    def loss(self) -> float:
        """Normalized l2 loss over the values of all tables together."""
        square = math.fsum(table.square_norm for table in self.tables)
        error = math.fsum(table.loss**2 * table.square_norm for table in self.tables)
        return math.sqrt(error / square) if square else 0.0


def quantize_file(
    src: str | Path,
    dst: str | Path,
    *,
    method: str | Method = DEFAULT_METHOD,
    bits: float = 4,
    param_dtype: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_loss: float | None = None,
    rotate: str | None = None,
    variants: Mapping[str, Variant] | None = None,
    readable_by: Sequence[str] = (),
    force: bool = False,
    progress: Progress = lambda name, rows: None,
) -> Report:
    """Pack the embedding tables of a checkpoint, streaming: memory is bounded whatever the size.

    Args:
        src: .safetensors, also sharded by its index, a .pt, .pth, .bin or .ckpt state dict, .npy, .npz, or Parquet with
            fixed-size lists of floats; a model's folder with a safetensors file, an index or pytorch_model.bin; or a
            folder that several processes saved, by torch.distributed.checkpoint or its HuggingFaceStorageWriter.
        dst: a .safetensors file; for a folder or an index as src a folder, which gets the model's configuration,
            tokenizer and other small files, too. What embpack wrote there is replaced; dst is there only once it is
            whole.
        method: as quantize takes it.
        bits: as quantize takes them.
        param_dtype: as quantize takes it.
        include: globs of tensor names to pack too; otherwise a table is a 2-D tensor of floats, or of FP8 or INT8 with
            scales, whose name says embedding (table_names.says_embedding). A table of several tensors
            (docs/checkpoints.md) goes by the name that they have together.
        exclude: globs of tensor names never to pack.
        max_loss: the largest normalized l2 loss that a table may have, positive and finite; None is no limit. All
            tables are packed before one that has a larger loss is refused, so that all of those are named.
        rotate: as quantize takes it.
        variants: by name or glob, how tables are packed that have a variant of their own, as embpack.plan(...).variants
            or {"user_*": Variant("trellis", 3.5)}; of several that match, the last counts.
        readable_by: names in embpack.readers.READERS, all of which are to read the packed rows as they are.
        force: write to dst though embpack did not write what is there. A file is replaced; of a folder what has the
            name of a new file, and other files stay.
        progress: called with a table's name and a number of rows as they are done.

    Raises:
        FileExistsError: dst has something that embpack did not write, and there is no force.
        FileNotFoundError: there is no src.
        FormatError: src is damaged, or was changed, replaced or deleted while it was read.
        TypeError: a glob, or max_loss, is of another type.
        ValueError: no tensor is a table; a table lacks a piece or a scale, or they do not fit; a glob or a name in
            variants matches nothing; dst is src or has the wrong suffix; a value is NaN or infinite, or a parameter
            overflows; there is no such method, bits, rotation or reader; a reader cannot read a table that is packed so
            (the message says what would do); max_loss is not positive and finite.
        LossLimitError: tables lose more than max_loss; a ValueError that has their names and losses.
        OSError: dst cannot be written.
    """
    rules = Rules(include, exclude, Variant(method, bits, param_dtype, rotate), variants or {}, readable_by)
    with open_checkpoint(src) as checkpoint:
        decisions = decide_all(checkpoint, rules)
        return pack_checkpoint(checkpoint, decisions, dst, max_loss=max_loss, force=force, progress=progress)


def pack_checkpoint(
    checkpoint: Checkpoint,
    decisions: Sequence[Decision],
    dst: str | Path,
    *,
    max_loss: float | None = None,
    force: bool = False,
    progress: Progress = lambda name, rows: None,
) -> Report:
    """Do what quantize_file does, for an open checkpoint and what was decided on its tensors (rules.decide_all)."""
    dst, started = Path(dst), time.perf_counter()
    if max_loss is not None:
        check_max_loss(max_loss)
    check_destination(checkpoint, dst, force=force)
    writers = _make_writers(checkpoint, decisions, progress)
    shards = _make_shards(checkpoint, writers, dst)

    def reports() -> tuple[TableReport, ...]:
        return tuple(table.report for writer in writers for table in writer.tables if table.report is not None)

    def check() -> None:
        check_losses(checkpoint.path, reports(), math.inf if max_loss is None else max_loss)

    folder = _make_folder(checkpoint, shards) if checkpoint.is_folder else None
    write_checkpoint(dst, shards, folder, check=check, list_own=list_own, force=force)
    return Report(
        tables=reports(),
        passed_through=tuple(each.tensor.name for each in decisions if each.variant is None),
        left_out=checkpoint.left_out,
        copied_files=checkpoint.companions,
        file_bytes_before=sum(shard.num_bytes for shard in checkpoint.shards),
        file_bytes_after=_bytes_on_disk(dst if checkpoint.is_folder else dst.parent, shards),
        seconds=time.perf_counter() - started,
    )


def count_file_bytes(checkpoint: Checkpoint, decisions: Sequence[Decision]) -> int:
    """Count the bytes of all files with tensors that pack_checkpoint would write, to the byte, without packing.

    Args:
        checkpoint: which is open.
        decisions: on all of its tensors, in order, as rules.decide_all makes them.

    Raises:
        ValueError: pack_checkpoint could not write them.
    """
    writers = _make_writers(checkpoint, decisions, lambda name, rows: None)
    shards = _make_shards(checkpoint, writers, checkpoint.path)
    return sum(count_shard_bytes(checkpoint.path, shard) for shard in shards)


def _make_writers(checkpoint: Checkpoint, decisions: Sequence[Decision], progress: Progress) -> list[ShardWriter]:
    writers = []
    for shard, own in zip(checkpoint.shards, split_decisions(checkpoint, decisions), strict=True):
        tensors = (TableWriter(each, progress) if each.variant else each.tensor for each in own)
        writers.append(ShardWriter(tuple(tensors), shard.metadata))
    return writers


def _make_shards(checkpoint: Checkpoint, writers: Sequence[ShardWriter], dst: Path) -> list[OutShard]:
    """Make the files to write, of a sharded checkpoint as many as it has."""
    return [
        writer.out_shard(name_file(checkpoint, shard, dst, name_packed))
        for shard, writer in zip(checkpoint.shards, writers, strict=True)
        if writer.tensors or not shard.tensors  # the table that has its parts may lie in another file
    ]


def _make_folder(checkpoint: Checkpoint, shards: Sequence[OutShard]) -> OutFolder:
    """Make what a packed folder has beside its files with tensors."""
    index_name = name_index(checkpoint, name_packed)
    written = [shard.file_name for shard in shards] + ([index_name] if index_name else [])
    return OutFolder(index_name, copy_and_list(checkpoint, written))


def check_max_loss(max_loss: float) -> None:
    """Raise unless a limit is a number, positive and finite."""
    if not isinstance(max_loss, Real):
        raise TypeError(f"max_loss is {max_loss!r}; give a positive, finite number")
    if not (max_loss > 0 and math.isfinite(max_loss)):
        raise ValueError(f"max_loss is {max_loss}; give a positive, finite number")


def check_destination(checkpoint: Checkpoint, dst: Path, *, force: bool = False) -> None:
    """Raise what pack_checkpoint would of its destination, for those who have much to do before.

    Raises:
        FileExistsError: it has something that embpack did not write and there is no force, or is to be a folder and is
            a file.
        OSError: nothing can be written there.
        ValueError: it is the source, or has the wrong suffix.
    """
    if not checkpoint.is_folder and dst.suffix != ".safetensors":
        raise ValueError(f"{dst}: a packed checkpoint ends in .safetensors")
    check_place(checkpoint, dst, list_own, force=force)


def _bytes_on_disk(folder: Path, shards: Sequence[OutShard]) -> int:
    return sum((folder / shard.file_name).stat().st_size for shard in shards)
