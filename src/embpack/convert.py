"""Checkpoint in, packed checkpoint out, streaming."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from pathlib import Path

from embpack.cutting import DEFAULT_SIZE, cut_files, keep_files
from embpack.destination import check_place, name_cut, name_file, name_index
from embpack.distribution import Distribution
from embpack.engines import Engine
from embpack.errors import naming
from embpack.formats import Checkpoint, OutFolder, OutShard, open_checkpoint, write_checkpoint
from embpack.formats.atomic import check_space
from embpack.formats.paths import as_path
from embpack.formats.safetensors import count_file_bytes as count_shard_bytes
from embpack.gate import check_losses
from embpack.methods import DEFAULT_METHOD, Method
from embpack.methods.base import join_losses
from embpack.packed_files import describe_files
from embpack.packed_folder import copy_and_list, list_own, name_packed
from embpack.resuming import Unfinished, describe_run, list_sources
from embpack.rules import Decision, Rules, decide_all, list_left_out
from embpack.shard_writer import Progress, ShardWriter, TableReport, no_progress
from embpack.sizes import parse_size
from embpack.unchanged import count_unchanged, list_old_sources, open_old
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
        return join_losses((table.loss, table.square_norm) for table in self.tables)


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
    max_shard_size: int | str | None = None,
    keep_checksums: bool = False,
    since: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    engine: Engine | None = None,
    progress: Progress = no_progress,
) -> Report:
    """Pack the embedding tables of a checkpoint, streaming: memory is bounded whatever the size.

    Args:
        src: .safetensors, also sharded by its index, a .pt, .pth, .bin or .ckpt state dict, .npy, .npz, Parquet with
            fixed-size lists of floats, or .gguf; a model's folder with a safetensors file, an index or
            pytorch_model.bin; or a folder that several processes saved, by torch.distributed.checkpoint or its
            HuggingFaceStorageWriter. Or the URI of one of these: "s3://bucket/model" (docs/remote.md).
        dst: a .safetensors file, or a folder, whose name has no suffix. For a folder or an index as src always a
            folder, which gets the model's configuration, tokenizer and other small files, too. What embpack wrote there
            is replaced; dst is there only once it is whole.
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
        max_shard_size: the largest file of a folder, in bytes or "500 MB". Tensors fill files in their order; a table
            that no file holds is cut into pieces, which embpack.load joins. None is 5 GB, but files of an index stay
            as they are, unless a table is made of several of them. What cannot be cut, other tensors and 4,096 rows of
            a table, may be larger.
        keep_checksums: whether the packed files keep checksums of the source's rows, for a later run that is given them
            as since; less than 0.2 % of the packed bytes.
        since: what an earlier run has made of an earlier source, with keep_checksums: ranges of rows whose source has
            not changed are copied from there, if they are to be packed in the same way, and all others are packed
            (docs/changing.md). The bytes are those of packing all with keep_checksums, which since implies. It may be
            dst.
        resume: go on where an earlier run into the folder dst was interrupted: its whole files, which are kept beside
            dst, are read through and used. The bytes are those of a run that nobody interrupted. Without it such files
            are removed, with a UserWarning; with it there is one if there are none.
        force: write to dst though embpack did not write what is there. A file is replaced; of a folder what has the
            name of a new file, and other files stay.
        engine: whose workers read, pack and write, embpack.ray.Engine(); src and dst, a folder then, lie where all of
            them see them. The bytes are those that this process would write. None is this process.
        progress: called with a table's name and a number of rows as they are done.

    Raises:
        FileExistsError: dst has something that embpack did not write, and there is no force.
        FileNotFoundError: there is no src, or no since.
        FormatError: src is damaged, or was changed, replaced or deleted while it was read; so is since, or embpack did
            not write it.
        TypeError: a glob, or max_loss, is of another type.
        EngineError: the engine has no workers that can do this; an OSError.
        ValueError: no tensor is a table; a table lacks a piece or a scale, or they do not fit; a glob or a name in
            variants matches nothing; dst is src or has the wrong suffix; a value is NaN or infinite, or a parameter
            overflows; there is no such method, bits, rotation or reader; a reader cannot read a table that is packed so
            (the message says what would do); max_loss is not positive and finite; max_shard_size is no size, or it,
            resume or an engine are given for a file; source, options or embpack are not those of the run that is to be
            resumed.
        LossLimitError: tables lose more than max_loss; a ValueError that has their names and losses.
        OSError: dst cannot be written; or src, behind a URI, cannot be read.
        MissingExtraError: the format of src, or a URI, needs a package that is not installed.
    """
    variant, keeps = Variant(method, bits, param_dtype, rotate), keep_checksums or since is not None
    rules = Rules(include, exclude, variant, variants or {}, readable_by, keeps)
    with open_checkpoint(src) as checkpoint, open_old(since) as find_old:
        decisions = find_old(decide_all(checkpoint, rules))
        return pack_checkpoint(
            checkpoint,
            decisions,
            dst,
            max_loss=max_loss,
            max_shard_size=max_shard_size,
            resume=resume,
            force=force,
            engine=engine,
            progress=progress,
        )


def pack_checkpoint(
    checkpoint: Checkpoint,
    decisions: Sequence[Decision],
    dst: str | Path,
    *,
    max_loss: float | None = None,
    max_shard_size: int | str | None = None,
    resume: bool = False,
    force: bool = False,
    engine: Engine | None = None,
    progress: Progress = no_progress,
) -> Report:
    """Do what quantize_file does, for an open checkpoint and what was decided on its tensors (rules.decide_all)."""
    dst, started = as_path(dst), time.perf_counter()
    if max_loss is not None:
        check_max_loss(max_loss)
    check_destination(checkpoint, dst, max_shard_size, resume=resume, force=force, engine=engine)
    output = _Output.make(checkpoint, decisions, dst, max_shard_size, progress)
    sizes = {shard.file_name: count_shard_bytes(dst, shard) for shard in output.shards}

    def check() -> None:
        check_losses(checkpoint.path, output.reports(), math.inf if max_loss is None else max_loss)

    keeper = make_files = None
    if output.folder is None:
        check_space(dst, sizes.values())
    else:
        run = describe_run(checkpoint, decisions, output.shards)
        keeper = Unfinished(dst, run, output.writers, sizes, resume)
        if engine is not None:
            shown = [dst / shard.file_name for shard in output.shards]
            sources = [*list_sources(checkpoint), *list_old_sources(decisions)]
            make_files = Distribution(engine, output.writers, shown, keeper, sources).make_files
    write_checkpoint(
        dst,
        output.shards,
        output.folder,
        check=check,
        list_own=list_own,
        force=force,
        keeper=keeper,
        make_files=make_files,
    )
    return Report(
        tables=output.reports(),
        passed_through=tuple(each.tensor.name for each in decisions if each.variant is None and not each.is_left_out),
        left_out=list_left_out(checkpoint, decisions),
        copied_files=checkpoint.companions,
        file_bytes_before=sum(shard.num_bytes for shard in checkpoint.shards),
        file_bytes_after=sum(sizes.values()),
        seconds=time.perf_counter() - started,
    )


def count_file_bytes(
    checkpoint: Checkpoint,
    decisions: Sequence[Decision],
    dst: Path | None = None,
    max_shard_size: int | str | None = None,
) -> int:
    """Count the bytes of all files with tensors that pack_checkpoint would write, to the byte, without packing.

    Args:
        checkpoint: which is open.
        decisions: on all of its tensors, in order, as rules.decide_all makes them.
        dst: where they would be written; None for a file, or a folder if the checkpoint is one or there is a
            max_shard_size.
        max_shard_size: as quantize_file takes it.

    Raises:
        ValueError: pack_checkpoint could not write them.
    """
    shards = _Output.make(checkpoint, decisions, _stand_in(dst, max_shard_size), max_shard_size).shards
    return sum(count_shard_bytes(checkpoint.path, shard) for shard in shards)


@dataclass(frozen=True)
class _Output:
    """What packing a checkpoint writes.

    Attributes:
        writers: of the files with tensors.
        shards: these files.
        folder: what else the folder has; None if it is a file.
    """

    writers: list[ShardWriter]
    shards: list[OutShard]
    folder: OutFolder | None

    @classmethod
    def make(
        cls,
        checkpoint: Checkpoint,
        decisions: Sequence[Decision],
        dst: Path,
        max_shard_size: int | str | None,
        progress: Progress = no_progress,
    ) -> "_Output":
        """Choose the files, of a folder as the source has them unless they are to be cut anew."""
        as_folder = makes_folder(checkpoint, dst)
        is_kept = not as_folder or (max_shard_size is None and checkpoint.index_name is not None)
        writers = keep_files(checkpoint, decisions, progress) if is_kept else None
        if writers is not None:
            names = [name_file(checkpoint, shard, dst, name_packed) for shard in checkpoint.shards]
            index_name = name_index(checkpoint, name_packed)
        else:
            writers = cut_files(checkpoint, decisions, read_file_size(max_shard_size), progress)
            names, index_name = name_cut(checkpoint, len(writers), name_packed)
        shards = [writer.out_shard(name) for writer, name in zip(writers, names, strict=True)]
        if not as_folder:
            return cls(writers, shards, None)
        written = [*names, index_name] if index_name else names
        folder = OutFolder(index_name, copy_and_list(checkpoint, written))
        # A table that is whole is of one packing anyway.
        if index_name is not None and any(writer.has_pieces for writer in writers):
            folder = replace(folder, describe_files=partial(describe_files, names, index_name))
        return cls(writers, shards, folder)

    def reports(self) -> tuple[TableReport, ...]:
        """What packing the tables that are written came to, in order."""
        tables = {id(piece.table): piece.table for writer in self.writers for piece in writer.pieces}
        return tuple(table.report for table in tables.values() if table.report is not None)


def count_unchanged_rows(
    checkpoint: Checkpoint,
    decisions: Sequence[Decision],
    dst: Path | None = None,
    max_shard_size: int | str | None = None,
) -> dict[str, int]:
    """Count the rows of each table that pack_checkpoint would copy from what an earlier run has packed.

    Args:
        checkpoint: which is open, and is read for it.
        decisions: on all of its tensors, as open_old has completed them; the tables of others are left out.
        dst: as count_file_bytes takes it.
        max_shard_size: as quantize_file takes it.
    """
    writers = _Output.make(checkpoint, decisions, _stand_in(dst, max_shard_size), max_shard_size).writers
    counts: dict[str, int] = {}
    for piece in (piece for writer in writers for piece in writer.pieces):
        decision = piece.table.decision
        if decision.old is not None:
            rows = piece.first_row, piece.first_row + piece.num_rows
            counts.setdefault(decision.tensor.name, 0)
            counts[decision.tensor.name] += count_unchanged(decision, piece.table.fit(), *rows)
    return counts


def _stand_in(dst: Path | None, max_shard_size: int | str | None) -> Path:
    if dst is None:
        return Path("packed" if max_shard_size is not None else "packed.safetensors")
    return dst


def makes_folder(checkpoint: Checkpoint, dst: Path) -> bool:
    """Whether a folder is written, not a file."""
    return checkpoint.is_folder or not dst.suffix


def read_file_size(max_shard_size: int | str | None) -> int:
    """Read how large files are to be at most; None is DEFAULT_SIZE.

    Raises:
        ValueError: it is no size.
    """
    with naming("max_shard_size"):
        size = DEFAULT_SIZE if max_shard_size is None else parse_size(max_shard_size)
        if size < 1:
            raise ValueError(f"{max_shard_size!r} leaves no room in a file; give a size such as '5 GB'")
        return size


def check_max_loss(max_loss: float) -> None:
    """Raise unless a limit is a number, positive and finite."""
    if not isinstance(max_loss, Real):
        raise TypeError(f"max_loss is {max_loss!r}; give a positive, finite number")
    if not (max_loss > 0 and math.isfinite(max_loss)):
        raise ValueError(f"max_loss is {max_loss}; give a positive, finite number")


def check_destination(
    checkpoint: Checkpoint,
    dst: Path,
    max_shard_size: int | str | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    engine: Engine | None = None,
) -> None:
    """Raise what pack_checkpoint would of its destination, for those who have much to do before.

    Raises:
        FileExistsError: it has something that embpack did not write and there is no force, or is to be a folder and is
            a file.
        OSError: nothing can be written there.
        ValueError: it is the source, or has the wrong suffix; or max_shard_size is no size, or it, resume or an engine
            are for no folder.
    """
    as_folder = makes_folder(checkpoint, dst)
    if not as_folder and dst.suffix != ".safetensors":
        raise ValueError(f"{dst}: a packed checkpoint ends in .safetensors, or is a folder, whose name has no suffix")
    if not as_folder and max_shard_size is not None:
        raise ValueError(f"{dst}: max_shard_size is of the files of a folder; leave {dst.suffix} out")
    if not as_folder and resume:
        raise ValueError(f"{dst}: one file cannot be resumed, only a folder of files; leave {dst.suffix} out")
    if not as_folder and engine is not None:
        raise ValueError(f"{dst}: workers write the files of a folder; leave {dst.suffix} out")
    read_file_size(max_shard_size)
    check_place(checkpoint, dst, list_own, as_folder=as_folder, force=force)
