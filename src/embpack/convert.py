"""Checkpoint in, checkpoint out: packing and unpacking files, streaming."""

import hashlib
import json
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embpack.compare import Variant
from embpack.files import (
    CLUSTER_SUFFIX,
    CODEBOOK_SUFFIX,
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
from embpack.formats.dtypes import count_bytes
from embpack.layouts import RowFormat, cluster_dtype
from embpack.methods import DEFAULT_METHOD, Method, parse_method
from embpack.quantize import RowPacker, chunk_rows, fit_method, fit_shared, list_shared
from embpack.rotation import rotate_chunks
from embpack.rows import ROW_DTYPES, narrow
from embpack.rules import Decision, Rules, plan
from embpack.table import PackedTable

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
class _ShardWriter:
    """Packs the tables of one shard while it is being written, and gathers what is known only then."""

    decisions: Sequence[Decision]
    source_metadata: dict[str, str]
    max_loss: float
    progress: Progress
    entries: dict[str, TableEntry] = field(default_factory=dict)
    reports: list[TableReport] = field(default_factory=list)

    def out_shard(self, file_name: str) -> OutShard:
        tensors = [tensor for decision in self.decisions for tensor in self._out_tensors(decision)]
        _check_names(tensors)
        return OutShard(file_name, tuple(tensors), self._metadata, self._metadata_room())

    def _out_tensors(self, decision: Decision) -> list[OutTensor]:
        tensor, row_format = decision.tensor, decision.row_format
        if row_format is None:
            return [copy_tensor(tensor)]
        beside: dict[str, NDArray[Any]] = {}  # filled in when the rows are packed, before they are written
        rows = tensor.shape[0]
        out = [
            OutTensor(tensor.name, "U8", (rows, row_format.row_bytes), lambda: self._packed_chunks(decision, beside))
        ]
        if row_format.has_codebooks_beside:
            dtypes = _cluster_dtypes(row_format, decision.num_codebooks)
            shapes = {CLUSTER_SUFFIX: (rows,), CODEBOOK_SUFFIX: (decision.num_codebooks, row_format.num_levels)}
            for suffix, shape in shapes.items():
                if suffix == CODEBOOK_SUFFIX or row_format.is_clustered:
                    chunks = partial(_read_beside, beside, suffix)
                    out.append(OutTensor(tensor.name + suffix, dtypes[suffix], shape, chunks))
        return out

    def _packed_chunks(self, decision: Decision, beside: dict[str, NDArray[Any]]) -> Iterator[NDArray[np.uint8]]:
        assert decision.row_format is not None
        started = time.perf_counter()
        tensor, rotation = decision.tensor, decision.row_format.rotation
        step = chunk_rows(tensor.shape[1])

        def read() -> Iterator[NDArray[Any]]:
            return rotate_chunks(tensor.chunks(step), rotation, tensor.name)

        method = fit_method(decision.method, read, tensor.name)
        shared = fit_shared(method, read, tensor.shape[0], decision.row_format, tensor.name)
        arrays = zip((CLUSTER_SUFFIX, CODEBOOK_SUFFIX), list_shared(shared, decision.row_format), strict=True)
        beside |= {suffix: array for suffix, array in arrays if array is not None}
        packer = RowPacker(method, decision.row_format, tensor.name, shared)
        digest = hashlib.sha256()
        room = np.empty((min(step, tensor.shape[0]), decision.row_format.row_bytes), np.uint8)
        for rows in read():
            packed = room[: len(rows)]
            packer.pack(rows, packed)
            digest.update(packed.data)
            yield packed
            self.progress(tensor.name, len(rows))
        for array in beside.values():
            digest.update(as_bytes(array))
        self._finish(decision, packer, format_checksum(digest), time.perf_counter() - started)

    def _finish(self, decision: Decision, packer: RowPacker, checksum: str, seconds: float) -> None:
        name = decision.tensor.name
        _check_loss(name, packer.loss, self.max_loss)
        entry = _entry(decision, packer.method.spec, packer.loss, checksum)
        self.entries[name] = entry
        self.reports.append(
            TableReport(
                name,
                entry.num_embeddings,
                entry.embedding_dim,
                entry.dtype,
                entry.method,
                decision.bytes_before,
                decision.bytes_after,
                packer.loss,
                seconds,
            )
        )

    def _metadata(self) -> dict[str, str]:
        return {**self.source_metadata, **make_metadata(self.entries)}

    def _metadata_room(self) -> int:
        """Bytes of metadata whose floats take as many digits as they can."""
        longest = -1.2345678901234567e-300
        checksum = format_checksum(hashlib.sha256())
        entries = {}
        for decision in self.decisions:
            if decision.row_format is not None:
                method = decision.method
                bounds = {name: longest for name in ("xmin", "xmax") if hasattr(method, name)}
                spec = replace(method, **bounds).spec
                entries[decision.tensor.name] = _entry(decision, spec, longest, checksum)
        return len(json.dumps({**self.source_metadata, **make_metadata(entries)}))


def _cluster_dtypes(row_format: RowFormat, num_codebooks: int) -> dict[str, str]:
    """Safetensors types of what lies beside clustered rows."""
    numbers = "U8" if cluster_dtype(num_codebooks).itemsize == 1 else "U16"
    return {CLUSTER_SUFFIX: numbers, CODEBOOK_SUFFIX: "F16" if row_format.has_f16_params else "F32"}


def _read_beside(beside: Mapping[str, NDArray[Any]], suffix: str) -> Iterator[NDArray[Any]]:
    yield beside[suffix]


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


def _entry(decision: Decision, method: str, loss: float, checksum: str) -> TableEntry:
    assert decision.row_format is not None
    return TableEntry.make(
        decision.row_format,
        num_embeddings=decision.tensor.shape[0],
        dtype=decision.dtype,
        method=method,
        loss=loss,
        checksum=checksum,
    )


def copy_tensor(tensor: SourceTensor) -> OutTensor:
    """Pass a tensor through, a few megabytes at a time."""
    entries = tensor.shape[0] if tensor.shape else 1
    entry_bytes = max(1, count_bytes(tensor.dtype, tensor.shape) // max(1, entries))
    step = max(1, _COPY_BYTES // entry_bytes)
    return OutTensor(tensor.name, tensor.dtype, tensor.shape, lambda: tensor.chunks(step))


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
    src, dst = Path(src), Path(dst)
    chosen = parse_method(method)
    if max_loss is not None:
        check_max_loss(max_loss)
    rules = Rules(tuple(include), tuple(exclude), bits, param_dtype, chosen, rotate, variants or {})
    started = time.perf_counter()
    with open_checkpoint(src) as checkpoint:
        decisions = plan_file(checkpoint, rules)
        _check_destination(src, dst, checkpoint)
        writers, shards = [], []
        at = 0
        for shard in checkpoint.shards:
            own = decisions[at : at + len(shard.tensors)]
            at += len(own)
            writer = _ShardWriter(own, shard.metadata, math.inf if max_loss is None else max_loss, progress)
            writers.append(writer)
            name = dst.name if checkpoint.index_name is None else shard.file_name
            shards.append(writer.out_shard(name))
        write_checkpoint(dst, shards, checkpoint.index_name)
        return Report(
            tables=tuple(report for writer in writers for report in writer.reports),
            passed_through=tuple(d.tensor.name for d in decisions if d.row_format is None),
            left_out=checkpoint.left_out,
            file_bytes_before=_bytes_on_disk(checkpoint.path.parent, checkpoint.shards),
            file_bytes_after=_bytes_on_disk(dst if checkpoint.index_name else dst.parent, shards),
            seconds=time.perf_counter() - started,
        )


def check_max_loss(max_loss: float) -> None:
    """Raise ValueError unless a limit is positive and finite."""
    if not (max_loss > 0 and math.isfinite(max_loss)):
        raise ValueError(f"max_loss is {max_loss}; give a positive, finite number")


def plan_file(checkpoint: Checkpoint, rules: Rules) -> list[Decision]:
    """Decide what happens to each tensor of a checkpoint that is to be packed.

    Raises:
        ValueError: nothing would be packed, or it is packed already.
    """
    for shard in checkpoint.shards:
        if METADATA_KEY in shard.metadata:
            raise ValueError(f"{checkpoint.path}: is packed already; unpack it first with: embpack dequantize")
    return plan(checkpoint, rules)


def _check_destination(src: Path, dst: Path, checkpoint: Checkpoint) -> None:
    if checkpoint.index_name is None and dst.suffix != ".safetensors":
        raise ValueError(f"{dst}: a packed checkpoint ends in .safetensors")
    _check_place(src, dst, checkpoint)


def _check_place(src: Path, dst: Path, checkpoint: Checkpoint) -> None:
    if checkpoint.index_name is not None and dst.suffix.lower() in {*FORMATS, ".json"}:
        raise ValueError(f"{dst}: {src} is sharded, so the destination is a folder; leave {dst.suffix} out")
    sources = [src, src.parent] if src.suffix == ".json" else [src]
    for source in sources:
        if dst.exists() and source.samefile(dst):
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
    src, dst = Path(src), Path(dst)
    with open_checkpoint(src) as checkpoint:
        _check_place(src, dst, checkpoint)
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
        arrays = [part.read() for part in beside]
        shared = dict(zip(entry.suffixes, arrays, strict=True))
        clusters, codebooks = shared.get(CLUSTER_SUFFIX), shared.get(CODEBOOK_SUFFIX)
        done = 0
        for packed in tensor.chunks(chunk_rows(entry.embedding_dim)):
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
