"""Checkpoint in, checkpoint out: packing and unpacking files, streaming."""

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from numbers import Real
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from embpack.chunks import chunk_rows
from embpack.files import METADATA_KEY, Contents, TableEntry, check_bytes, read_contents, split_shard
from embpack.formats import (
    FORMATS,
    Checkpoint,
    OutShard,
    OutTensor,
    SourceTensor,
    open_checkpoint,
    write_checkpoint,
)
from embpack.formats.atomic import refuse_occupied
from embpack.formats.base import as_bytes
from embpack.formats.safetensors import count_file_bytes as count_shard_bytes
from embpack.gate import check_losses
from embpack.methods import DEFAULT_METHOD, Method
from embpack.rows import ROW_DTYPES
from embpack.rules import Decision, Rules, decide_all
from embpack.shard_writer import Progress, ShardWriter, TableReport, TableWriter, copy_tensor
from embpack.table import PackedTable
from embpack.variant import Variant

_SAFETENSORS_DTYPE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Report:
    """What packing a checkpoint came to.

    Attributes:
        tables: in file order.
        passed_through: names of the tensors that were copied as they are.
        left_out: what the output cannot hold, in words.
        file_bytes_before, file_bytes_after: of all files read and written.
        seconds: all in all.
    """

    tables: tuple[TableReport, ...]
    passed_through: tuple[str, ...]
    left_out: tuple[str, ...]
    file_bytes_before: int
    file_bytes_after: int
    seconds: float


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
    progress: Progress = lambda name, rows: None,
) -> Report:
    """Pack the embedding tables of a checkpoint, streaming: memory is bounded whatever the size.

    Args:
        src: .safetensors, a folder or index of sharded ones, a .pt, .pth, .bin or .ckpt state dict, .npy, .npz, or
            Parquet with fixed-size lists of floats.
        dst: a .safetensors file, replaced if it exists; for a sharded src a folder, which must not exist or be
            empty. It is there only once it is whole.
        method: as quantize takes it.
        bits: as quantize takes them.
        param_dtype: as quantize takes it.
        include: globs of tensor names to pack too; otherwise a table is a 2-D float tensor whose name says embedding
            (rules.says_embedding).
        exclude: globs of tensor names never to pack.
        max_loss: the largest normalized l2 loss that a table may have, positive and finite; None is no limit. All
            tables are packed before one that has a larger loss is refused, so that all of those are named.
        rotate: as quantize takes it.
        variants: by name, how tables are packed that have a variant of their own, as embpack.plan(...).variants.
        progress: called with a table's name and a number of rows as they are done.

    Raises:
        FileNotFoundError: there is no src.
        FormatError: src is damaged, or was changed, replaced or deleted while it was read.
        TypeError: a glob, or max_loss, is of another type.
        ValueError: no tensor is a table; a glob or a name in variants matches nothing; dst is src or has the wrong
            suffix; a value is NaN or infinite, or a parameter overflows; there is no such method, bits or rotation;
            max_loss is not positive and finite.
        LossLimitError: tables lose more than max_loss; a ValueError that has their names and losses.
        OSError: dst cannot be written.
    """
    rules = Rules(include, exclude, Variant(method, bits, param_dtype, rotate), variants or {})
    with open_checkpoint(src) as checkpoint:
        decisions = decide_all(checkpoint, rules)
        return pack_checkpoint(checkpoint, decisions, dst, max_loss=max_loss, progress=progress)


def pack_checkpoint(
    checkpoint: Checkpoint,
    decisions: Sequence[Decision],
    dst: str | Path,
    *,
    max_loss: float | None = None,
    progress: Progress = lambda name, rows: None,
) -> Report:
    """Do what quantize_file does, for an open checkpoint and what was decided on its tensors (rules.decide_all)."""
    dst, started = Path(dst), time.perf_counter()
    if max_loss is not None:
        check_max_loss(max_loss)
    check_destination(checkpoint, dst)
    writers = _make_writers(checkpoint, decisions, progress)
    shards = _make_shards(checkpoint, writers, dst.name)

    def reports() -> tuple[TableReport, ...]:
        return tuple(table.report for writer in writers for table in writer.tables if table.report is not None)

    def check() -> None:
        check_losses(checkpoint.path, reports(), math.inf if max_loss is None else max_loss)

    write_checkpoint(dst, shards, checkpoint.index_name, check=check)
    return Report(
        tables=reports(),
        passed_through=tuple(each.tensor.name for each in decisions if each.variant is None),
        left_out=checkpoint.left_out,
        file_bytes_before=sum(shard.num_bytes for shard in checkpoint.shards),
        file_bytes_after=_bytes_on_disk(dst if checkpoint.index_name else dst.parent, shards),
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
    shards = _make_shards(checkpoint, _make_writers(checkpoint, decisions, lambda name, rows: None), "")
    return sum(count_shard_bytes(checkpoint.path, shard) for shard in shards)


def _make_writers(checkpoint: Checkpoint, decisions: Sequence[Decision], progress: Progress) -> list[ShardWriter]:
    remaining = iter(decisions)
    writers = []
    for shard in checkpoint.shards:
        own = islice(remaining, len(shard.tensors))
        tensors = (TableWriter(each, progress) if each.variant else each.tensor for each in own)
        writers.append(ShardWriter(tuple(tensors), shard.metadata))
    return writers


def _make_shards(checkpoint: Checkpoint, writers: Sequence[ShardWriter], name: str) -> list[OutShard]:
    """Make the files to write: of a sharded checkpoint as many as it has, otherwise one called name."""
    return [
        writer.out_shard(name if checkpoint.index_name is None else shard.file_name)
        for shard, writer in zip(checkpoint.shards, writers, strict=True)
    ]


def check_max_loss(max_loss: float) -> None:
    """Raise unless a limit is a number, positive and finite."""
    if not isinstance(max_loss, Real):
        raise TypeError(f"max_loss is {max_loss!r}; give a positive, finite number")
    if not (max_loss > 0 and math.isfinite(max_loss)):
        raise ValueError(f"max_loss is {max_loss}; give a positive, finite number")


def check_destination(checkpoint: Checkpoint, dst: Path) -> None:
    """Raise what pack_checkpoint would of its destination, for those who have much to do before.

    Raises:
        FileExistsError: it is a folder that is not empty, or is to be one and is a file.
        ValueError: it is the source, or has the wrong suffix.
    """
    if checkpoint.index_name is None and dst.suffix != ".safetensors":
        raise ValueError(f"{dst}: a packed checkpoint ends in .safetensors")
    _check_place(checkpoint, dst)


def _check_place(checkpoint: Checkpoint, dst: Path) -> None:
    if checkpoint.index_name is not None and dst.suffix.lower() in {*FORMATS, ".json"}:
        raise ValueError(f"{dst}: {checkpoint.path} is sharded, so the destination is a folder; leave {dst.suffix} out")
    sources = [checkpoint.path] if checkpoint.index_name is None else [checkpoint.path, checkpoint.path.parent]
    if dst.exists() and any(source.samefile(dst) for source in sources):
        raise ValueError(f"{dst}: the destination is the source; choose another name")
    if checkpoint.index_name is not None:
        refuse_occupied(dst.absolute())


def _bytes_on_disk(folder: Path, shards: Sequence[OutShard]) -> int:
    return sum((folder / shard.file_name).stat().st_size for shard in shards)


@dataclass(frozen=True)
class UnpackedTable:
    """A table that dequantize_file wrote."""

    name: str
    num_embeddings: int
    embedding_dim: int
    dtype: str
    bytes_before: int
    bytes_after: int


def dequantize_file(
    src: str | Path, dst: str | Path, *, progress: Progress = lambda name, rows: None
) -> tuple[UnpackedTable, ...]:
    """Write a packed checkpoint as a plain one that the original program can load, streaming.

    Args:
        src: what quantize_file or save wrote; a file, or a folder of shards.
        dst: .safetensors, .pt, .pth, .bin, .ckpt, .npy, .npz or .parquet, by its suffix; for a sharded src a folder.
        progress: called with a table's name and a number of rows as they are done.

    Raises:
        FileNotFoundError: there is no src.
        FormatError: src is damaged, altered, not packed, or was changed while it was read.
        ValueError: dst is src, or its format cannot hold the tensors.
        OSError: dst cannot be written.
    """
    dst = Path(dst)
    with open_checkpoint(src) as checkpoint:
        _check_place(checkpoint, dst)
        shards, unpacked = [], []
        for shard in checkpoint.shards:
            path = checkpoint.path.parent / shard.file_name
            contents = read_contents(path, shard)
            parts, others = split_shard(shard, contents.tables)
            unpacked += [_unpacked_table(parts[name], entry) for name, entry in contents.tables.items()]
            copied = {tensor.name for tensor in others}
            tensors = tuple(
                copy_tensor(tensor, partial(_check_other, path, tensor.name, contents))
                if tensor.name in copied
                else _unpack(path, parts[tensor.name], contents.tables[tensor.name], progress)
                for tensor in shard.tensors
                if tensor.name in copied or tensor.name in contents.tables
            )
            plain = {key: value for key, value in shard.metadata.items() if key != METADATA_KEY}
            name = dst.name if checkpoint.index_name is None else shard.file_name
            shards.append(OutShard(name, tensors, partial(dict, plain), len(json.dumps(plain))))
        write_checkpoint(dst, shards, checkpoint.index_name)
    return tuple(unpacked)


def _check_other(path: Path, name: str, contents: Contents, digest: "hashlib._Hash") -> None:
    """Compare the checksum of a tensor that is no table's, which version 1 has not."""
    if contents.others is not None:
        check_bytes(path, f"tensor {name!r}", digest, contents.others[name])


def _unpack(path: Path, parts: Sequence[SourceTensor], entry: TableEntry, progress: Progress) -> OutTensor:
    """Decode a table chunk by chunk; its checksum is compared at the end, before the output gets its name."""
    tensor, *beside = parts

    def chunks() -> Iterator[NDArray[Any]]:
        digest = hashlib.sha256()
        named = {spec.name: part for spec, part in zip(entry.beside, beside, strict=True)}
        clusters, codebooks = named.get("clusters"), named["codebooks"].read() if "codebooks" in named else None
        done = 0
        for packed in tensor.chunks(chunk_rows(entry.embedding_dim)):
            digest.update(packed.data)
            own = None if clusters is None else clusters.read(done, done + len(packed))
            table = PackedTable(packed, entry.row_format, clusters=own, codebooks=codebooks)
            yield table.dequantize(entry.dtype)
            done += len(packed)
            progress(tensor.name, len(packed))
        for piece in chain.from_iterable(part.pieces() for part in beside):
            digest.update(as_bytes(piece))
        check_bytes(path, f"table {tensor.name!r}", digest, entry.checksum)

    shape = (entry.num_embeddings, entry.embedding_dim)
    return OutTensor(tensor.name, _SAFETENSORS_DTYPE[entry.dtype], shape, chunks)


def _unpacked_table(parts: Sequence[SourceTensor], entry: TableEntry) -> UnpackedTable:
    values = entry.num_embeddings * entry.embedding_dim
    packed = sum(part.nbytes for part in parts)
    plain = values * ROW_DTYPES[entry.dtype].itemsize
    return UnpackedTable(parts[0].name, entry.num_embeddings, entry.embedding_dim, entry.dtype, packed, plain)
