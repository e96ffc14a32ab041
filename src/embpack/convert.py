"""Checkpoint in, checkpoint out: packing and unpacking files, streaming."""

import hashlib
import json
import math
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from glob import escape
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embpack.chunks import chunk_rows
from embpack.files import (
    METADATA_KEY,
    TableEntry,
    check_digest,
    format_checksum,
    make_metadata,
    read_entries,
    split_shard,
)
from embpack.formats import (
    FORMATS,
    Checkpoint,
    OutShard,
    OutTensor,
    Shard,
    SourceTensor,
    open_checkpoint,
    write_checkpoint,
)
from embpack.formats.base import as_bytes
from embpack.formats.dtypes import count_bytes, name_dtype
from embpack.layouts import RowFormat
from embpack.methods import DEFAULT_METHOD, Method, Packer, measure_loss
from embpack.methods.base import Sums
from embpack.rotation import rotate_chunks
from embpack.rows import ROW_DTYPES, narrow
from embpack.rules import Decision, Rules, decide_all
from embpack.table import PackedTable
from embpack.variant import Variant

# Told of rows as they are done: the table's name and how many more.
Progress = Callable[[str, int], None]

_SAFETENSORS_DTYPE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class TableReport:
    """What packing one table came to.

    Attributes:
        bytes_before, bytes_after: of its weights and of its packed rows.
        loss: normalized l2 loss ||X - Q(X)|| / ||X||.
        seconds: spent reading, packing and writing it.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    dtype: str
    method: str
    bytes_before: int
    bytes_after: int
    loss: float
    seconds: float

    @property
    def rows_per_second(self) -> float:
        """Rows read, packed and written a second."""
        return self.num_embeddings / self.seconds


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


@dataclass
class _TableWriter:
    """Packs one table while it is being written, and keeps what is known of it only then.

    Attributes:
        decision: to pack it.
        max_loss: the largest normalized l2 loss that it may have.
        progress: is told of packed rows.
        beside: the arrays beside its rows, by name; there once it is fitted, before any row is written.
        entry, report: there once its rows are written.
    """

    decision: Decision
    max_loss: float
    progress: Progress
    beside: dict[str, NDArray[Any]] = field(default_factory=dict)
    entry: TableEntry | None = None
    report: TableReport | None = None

    def out_tensors(self) -> list[OutTensor]:
        """Make the tensors that the output has of the table."""
        tensor, row_format = self.decision.tensor, self._row_format
        out = [OutTensor(tensor.name, "U8", (tensor.shape[0], row_format.row_bytes), self._pack)]
        for spec in self.decision.beside:
            dtype = name_dtype(spec.dtype)
            assert dtype is not None
            out.append(OutTensor(tensor.name + spec.suffix, dtype, spec.known_shape, partial(self._read, spec.name)))
        return out

    @property
    def longest_entry(self) -> TableEntry:
        """An entry at least as long as the table's, with floats of as many digits as they can have."""
        assert self.decision.variant is not None
        spec = self.decision.variant.parsed_method.longest_spec
        return self._make_entry(spec, -1.2345678901234567e-300, format_checksum(hashlib.sha256()))

    @property
    def _row_format(self) -> RowFormat:
        assert self.decision.row_format is not None  # it is packed
        return self.decision.row_format

    def _pack(self) -> Iterator[NDArray[np.uint8]]:
        assert self.decision.variant is not None
        started = time.perf_counter()
        tensor, row_format = self.decision.tensor, self._row_format
        method, read = self.decision.variant.parsed_method, partial(_read_rows, tensor, row_format)
        packer = method.fit(read, tensor.shape[0], row_format, tensor.name)
        self.beside |= packer.beside()
        digest, sums = hashlib.sha256(), []
        for packed, own in iter_packed(packer, read()):
            digest.update(packed.data)
            sums += own
            yield packed
            self.progress(tensor.name, len(packed))
        for array in self.beside.values():
            digest.update(as_bytes(array))
        loss = measure_loss(sums)
        _check_loss(tensor.name, loss, self.max_loss)
        self.entry = self._make_entry(packer.spec, loss, format_checksum(digest))
        self.report = self._make_report(self.entry, loss, time.perf_counter() - started)

    def _read(self, name: str) -> Iterator[NDArray[Any]]:
        yield self.beside[name]

    def _make_entry(self, method: str, loss: float, checksum: str) -> TableEntry:
        return TableEntry.make(
            self._row_format,
            num_embeddings=self.decision.tensor.shape[0],
            dtype=self.decision.dtype,
            method=method,
            loss=loss,
            checksum=checksum,
        )

    def _make_report(self, entry: TableEntry, loss: float, seconds: float) -> TableReport:
        return TableReport(
            name=self.decision.tensor.name,
            num_embeddings=entry.num_embeddings,
            embedding_dim=entry.embedding_dim,
            dtype=entry.dtype,
            method=entry.method,
            bytes_before=self.decision.bytes_before,
            bytes_after=self.decision.bytes_after,
            loss=loss,
            seconds=seconds,
        )


def _read_rows(tensor: SourceTensor, row_format: RowFormat) -> Iterator[NDArray[Any]]:
    """Read a table in chunks, as they are to be packed."""
    return rotate_chunks(tensor.read(chunk_rows(row_format.embedding_dim)), row_format.rotation, tensor.name)


def iter_packed(
    packer: Packer, chunks: Iterable[NDArray[Any]], start: int = 0
) -> Iterator[tuple[NDArray[np.uint8], list[Sums]]]:
    """Pack a range of a table's rows.

    Args:
        packer: of the table.
        chunks: the rows, as Packer.pack takes them.
        start: number of their first row in the table.

    Yields:
        Packed rows, which the next ones overwrite, and what Packer.pack returns of them.
    """
    room = np.empty((0, packer.row_format.row_bytes), np.uint8)
    for rows in chunks:
        if len(rows) > len(room):
            room = np.empty((len(rows), packer.row_format.row_bytes), np.uint8)
        packed = room[: len(rows)]
        yield packed, packer.pack(rows, packed, start)
        start += len(rows)


@dataclass(frozen=True)
class _ShardWriter:
    """Writes one shard.

    Attributes:
        tensors: what it has, in order: tables to pack, and tensors to copy.
        source_metadata: of the shard that is read.
    """

    tensors: tuple[_TableWriter | SourceTensor, ...]
    source_metadata: dict[str, str]

    def out_shard(self, file_name: str) -> OutShard:
        """Make what the output has of the shard."""
        out: list[OutTensor] = []
        for tensor in self.tensors:
            out += tensor.out_tensors() if isinstance(tensor, _TableWriter) else [copy_tensor(tensor)]
        _check_names(out)
        room = len(json.dumps(self._make_metadata([table.longest_entry for table in self.tables])))
        return OutShard(file_name, tuple(out), self._metadata, room)

    @property
    def tables(self) -> list[_TableWriter]:
        """The tables, in order."""
        return [tensor for tensor in self.tensors if isinstance(tensor, _TableWriter)]

    def _metadata(self) -> dict[str, str]:
        return self._make_metadata([table.entry for table in self.tables if table.entry is not None])

    def _make_metadata(self, entries: Sequence[TableEntry]) -> dict[str, str]:
        names = [table.decision.tensor.name for table in self.tables]
        return {**self.source_metadata, **make_metadata(dict(zip(names, entries, strict=True)))}


def _check_names(tensors: Sequence[OutTensor]) -> None:
    """Refuse tensors of the checkpoint that are called what a table's clusters or codebooks would be."""
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise ValueError(
                f"tensor {tensor.name!r} would be there twice: a clustered table needs that name; rename it"
            )
        seen.add(tensor.name)


def _check_loss(name: str, loss: float, max_loss: float) -> None:
    if loss > max_loss:
        raise ValueError(
            f"{name}: its normalized l2 loss is {loss:.6g}, over the limit of {max_loss:.6g}, so nothing was written; "
            "use a better method or more bits, leave it as it is with --exclude "
            f"{shlex.quote(escape(name))}, or raise the limit"
        )


def copy_tensor(tensor: SourceTensor) -> OutTensor:
    """Pass a tensor through, a few megabytes at a time."""
    entries = tensor.shape[0] if tensor.shape else 1
    entry_bytes = max(1, count_bytes(tensor.dtype, tensor.shape) // max(1, entries))
    step = max(1, _COPY_BYTES // entry_bytes)
    return OutTensor(tensor.name, tensor.dtype, tensor.shape, lambda: tensor.read(step))


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
        src: .safetensors, a folder or index of sharded ones, a .pt, .pth or .bin state dict, .npy, .npz, or
            Parquet with fixed-size lists of floats.
        dst: a .safetensors file, replaced if it exists; for a sharded src a folder, which must not exist or be
            empty. It is there only once it is whole.
        method: as for quantize.
        bits: as for quantize.
        param_dtype: as for quantize.
        include: globs of tensor names to pack too; otherwise a table is a 2-D float tensor whose name says embedding
            (rules.says_embedding).
        exclude: globs of tensor names never to pack.
        max_loss: the largest normalized l2 loss that a table may have, positive and finite; None is no limit.
        rotate: as for quantize.
        variants: how tables are packed that have their own way, by name, as embpack.plan(...).variants.
        progress: called with a table's name and a number of rows as they are done.

    Raises:
        FileNotFoundError: there is no src.
        FormatError: src is damaged.
        ValueError: no tensor is a table; dst is src or has the wrong suffix; a value is NaN or infinite, or a
            parameter overflows; no such method, bits or rotation; max_loss is not positive and finite, or a table's
            loss is larger.
        OSError: dst cannot be written.
    """
    rules = Rules(tuple(include), tuple(exclude), Variant(method, bits, param_dtype, rotate), variants or {})
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
    if checkpoint.index_name is None and dst.suffix != ".safetensors":
        raise ValueError(f"{dst}: a packed checkpoint ends in .safetensors")
    _check_place(checkpoint, dst)
    limit, remaining = math.inf if max_loss is None else max_loss, iter(decisions)
    writers, shards = [], []
    for shard in checkpoint.shards:
        own = islice(remaining, len(shard.tensors))
        tensors = (_TableWriter(each, limit, progress) if each.variant else each.tensor for each in own)
        writers.append(_ShardWriter(tuple(tensors), shard.metadata))
        shards.append(writers[-1].out_shard(dst.name if checkpoint.index_name is None else shard.file_name))
    write_checkpoint(dst, shards, checkpoint.index_name)
    return Report(
        tables=tuple(table.report for writer in writers for table in writer.tables if table.report is not None),
        passed_through=tuple(each.tensor.name for each in decisions if each.variant is None),
        left_out=checkpoint.left_out,
        file_bytes_before=_bytes_on_disk(checkpoint.path.parent, checkpoint.shards),
        file_bytes_after=_bytes_on_disk(dst if checkpoint.index_name else dst.parent, shards),
        seconds=time.perf_counter() - started,
    )


def check_max_loss(max_loss: float) -> None:
    """Raise ValueError unless a limit is positive and finite."""
    if not (max_loss > 0 and math.isfinite(max_loss)):
        raise ValueError(f"max_loss is {max_loss}; give a positive, finite number")


def _check_place(checkpoint: Checkpoint, dst: Path) -> None:
    if checkpoint.index_name is not None and dst.suffix.lower() in {*FORMATS, ".json"}:
        raise ValueError(f"{dst}: {checkpoint.path} is sharded, so the destination is a folder; leave {dst.suffix} out")
    sources = [checkpoint.path] if checkpoint.index_name is None else [checkpoint.path, checkpoint.path.parent]
    if dst.exists() and any(source.samefile(dst) for source in sources):
        raise ValueError(f"{dst}: the destination is the source; choose another name")


def _bytes_on_disk(folder: Path, shards: Sequence[Shard | OutShard]) -> int:
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
        dst: .safetensors, .pt, .pth, .bin, .npy, .npz or .parquet, by its suffix; for a sharded src a folder.
        progress: called with a table's name and a number of rows as they are done.

    Raises:
        FileNotFoundError: there is no src.
        FormatError: src is damaged, altered, or not packed.
        ValueError: dst is src, or its format cannot hold the tensors.
        OSError: dst cannot be written.
    """
    dst = Path(dst)
    with open_checkpoint(src) as checkpoint:
        _check_place(checkpoint, dst)
        shards, unpacked = [], []
        for shard in checkpoint.shards:
            path = checkpoint.path.parent / shard.file_name
            entries = read_entries(path, shard)
            parts, others = split_shard(shard, entries)
            unpacked += [_unpacked_table(parts[name], entry) for name, entry in entries.items()]
            copied = {tensor.name for tensor in others}
            tensors = tuple(
                copy_tensor(tensor) if tensor.name in copied else _unpack(path, parts[tensor.name], entries, progress)
                for tensor in shard.tensors
                if tensor.name in copied or tensor.name in entries
            )
            plain = {key: value for key, value in shard.metadata.items() if key != METADATA_KEY}
            name = dst.name if checkpoint.index_name is None else shard.file_name
            shards.append(OutShard(name, tensors, partial(dict, plain), len(json.dumps(plain))))
        write_checkpoint(dst, shards, checkpoint.index_name)
    return tuple(unpacked)


def _unpack(
    path: Path, parts: Sequence[SourceTensor], entries: Mapping[str, TableEntry], progress: Progress
) -> OutTensor:
    """Decode a table chunk by chunk; its checksum is compared at the end, before the output gets its name."""
    tensor, *beside = parts
    entry = entries[tensor.name]

    def chunks() -> Iterator[NDArray[Any]]:
        digest = hashlib.sha256()
        arrays = [next(part.read(part.shape[0])) for part in beside]
        names = {spec.name: array for spec, array in zip(entry.beside, arrays, strict=True)}
        clusters, codebooks = names.get("clusters"), names.get("codebooks")
        done = 0
        for packed in tensor.read(chunk_rows(entry.embedding_dim)):
            digest.update(packed.data)
            own = None if clusters is None else clusters[done : done + len(packed)]
            table = PackedTable(packed, entry.row_format, clusters=own, codebooks=codebooks)
            yield narrow(table.dequantize(), entry.dtype)
            done += len(packed)
            progress(tensor.name, len(packed))
        for array in arrays:
            digest.update(as_bytes(array))
        check_digest(path, tensor.name, entry, digest)

    shape = (entry.num_embeddings, entry.embedding_dim)
    return OutTensor(tensor.name, _SAFETENSORS_DTYPE[entry.dtype], shape, chunks)


def _unpacked_table(parts: Sequence[SourceTensor], entry: TableEntry) -> UnpackedTable:
    values = entry.num_embeddings * entry.embedding_dim
    packed = sum(part.nbytes for part in parts)
    plain = values * ROW_DTYPES[entry.dtype].itemsize
    return UnpackedTable(parts[0].name, entry.num_embeddings, entry.embedding_dim, entry.dtype, packed, plain)
