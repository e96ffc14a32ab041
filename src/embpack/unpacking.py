"""Packed checkpoint in, plain checkpoint out, streaming."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from embpack.chunks import chunk_rows
from embpack.cutting import DEFAULT_SIZE, join_metadata
from embpack.destination import check_place, name_cut, name_file, name_index
from embpack.files import METADATA_KEY, check_bytes
from embpack.formats import Checkpoint, OutFolder, OutShard, OutTensor, Shard, open_checkpoint, write_checkpoint
from embpack.formats.base import as_bytes
from embpack.formats.new_folder import nothing
from embpack.formats.paths import as_path
from embpack.packed_files import PackedCheckpoint, PackedFile, StoredTable, check_packed
from embpack.packed_folder import copy_companions, name_plain
from embpack.rows import ROW_DTYPES
from embpack.shard_writer import Progress, copy_tensor, no_progress
from embpack.table import PackedTable

_SAFETENSORS_DTYPE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


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
    src: str | Path,
    dst: str | Path,
    *,
    force: bool = False,
    dtype: str | None = None,
    progress: Progress = no_progress,
) -> tuple[UnpackedTable, ...]:
    """Write a packed checkpoint as a plain one that the original program can load, streaming.

    Args:
        src: what quantize_file or save wrote; a file, or a folder; or its URI.
        dst: .safetensors, .pt, .pth, .bin, .ckpt, .npy, .npz or .parquet, by its suffix; for a folder as src a folder,
            which gets the model's small files, too. Tables in pieces are whole there. Or a URI.
        force: write to dst though there is something, for nothing in a plain checkpoint says that embpack wrote it. A
            file is replaced; of a folder what has the name of a new file, and other files stay.
        dtype: of the tables, "float32", "float16" or "bfloat16"; None is what each was packed from, and "bfloat16" if
            that was FP8 or INT8. A finite value that the type cannot hold becomes its largest.
        progress: called with a table's name and a number of rows as they are done.

    Raises:
        FileExistsError: there is something at dst, and no force.
        FileNotFoundError: there is no src.
        FormatError: src is damaged, altered, not packed, or was changed while it was read.
        ValueError: dst is src, or its format cannot hold the tensors; there is no such dtype.
        OSError: dst cannot be written.
    """
    dst = as_path(dst)
    if dtype is not None:
        check_dtype(dtype)
    with open_checkpoint(src) as checkpoint:
        check_place(checkpoint, dst, nothing, as_folder=checkpoint.is_folder, force=force)
        packed = check_packed(checkpoint)
        files = [
            _OutFile(
                name_file(checkpoint, shard, dst, name_plain),
                tuple(_list_tensors(packed, file, shard, dtype, progress)),
                _without_ours(shard.metadata),
            )
            for shard, file in zip(checkpoint.shards, packed.files, strict=True)
        ]
        index_name = name_index(checkpoint, name_plain)
        if checkpoint.is_folder and any(len(table.pieces) > 1 for table in packed.tables.values()):
            files, index_name = _fill_files(checkpoint, files)
        folder = OutFolder(index_name, copy_companions(checkpoint)) if checkpoint.is_folder else None
        write_checkpoint(dst, [file.out_shard() for file in files], folder, force=force)
    return tuple(_unpacked_table(table, dtype or table.entry.dtype) for table in packed.tables.values())


@dataclass(frozen=True)
class _OutFile:
    """A file to write."""

    name: str
    tensors: tuple[OutTensor, ...]
    metadata: dict[str, str]

    def out_shard(self) -> OutShard:
        return OutShard(self.name, self.tensors, lambda: self.metadata, len(json.dumps(self.metadata)))


def _list_tensors(
    packed: PackedCheckpoint, file: PackedFile, shard: Shard, dtype: str | None, progress: Progress
) -> Iterator[OutTensor]:
    """List what becomes of a packed file's tensors, in their order; a table in pieces where its first one is."""
    tables = {table.pieces[0].name: table for table in packed.tables.values()}
    for tensor in shard.tensors:
        if tensor.name in file.others:
            yield copy_tensor(tensor, partial(_check_other, file, tensor.name))
        elif tensor.name in file.parts and tensor.name in tables:
            table = tables[tensor.name]
            yield _unpack(table, dtype or table.entry.dtype, progress)


def _fill_files(checkpoint: Checkpoint, files: Sequence[_OutFile]) -> tuple[list[_OutFile], str | None]:
    """Fill files with tensors, which are whole now, until one would have more than DEFAULT_SIZE bytes; and their index.

    A larger tensor makes a larger file.
    """
    filled, size = list[list[OutTensor]](), 0
    for tensor in (tensor for file in files for tensor in file.tensors):
        if not filled or size + tensor.nbytes > DEFAULT_SIZE:
            filled.append([])
            size = 0
        filled[-1].append(tensor)
        size += tensor.nbytes
    names, index_name = name_cut(checkpoint, len(filled), name_plain)
    metadata = _without_ours(join_metadata(checkpoint))
    return [_OutFile(name, tuple(own), metadata) for name, own in zip(names, filled, strict=True)], index_name


def _without_ours(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key != METADATA_KEY}


def _check_other(file: PackedFile, name: str, digest: "hashlib._Hash") -> None:
    """Compare the checksum of a tensor that is no table's, which version 1 has not."""
    if file.contents.others is not None:
        check_bytes(file.path, f"tensor {name!r}", digest, file.contents.others[name])


def _unpack(table: StoredTable, dtype: str, progress: Progress) -> OutTensor:
    """Decode a table chunk by chunk; checksums are compared at the end, before the output gets its name."""
    entry = table.entry

    def chunks() -> Iterator[NDArray[Any]]:
        shared = table.read_shared()
        codebooks = shared[0] if shared else None
        for piece in table.pieces:
            digest, done = hashlib.sha256(), 0
            tensor, *beside = piece.parts
            named = {spec.name: part for spec, part in zip(piece.entry.beside, beside, strict=True)}
            clusters = named.get("clusters")
            for packed in tensor.chunks(chunk_rows(entry.embedding_dim)):
                digest.update(packed.data)
                own = None if clusters is None else clusters.read(done, done + len(packed))
                yield PackedTable(packed, entry.row_format, clusters=own, codebooks=codebooks).dequantize(dtype)
                done += len(packed)
                progress(table.name, len(packed))
            for portion in chain.from_iterable(part.portions() for part in beside):
                digest.update(as_bytes(portion))
            check_bytes(piece.file.path, f"table {piece.name!r}", digest, piece.entry.checksum)

    return OutTensor(table.name, _SAFETENSORS_DTYPE[dtype], (entry.num_embeddings, entry.embedding_dim), chunks)


def _unpacked_table(table: StoredTable, dtype: str) -> UnpackedTable:
    rows, dim = table.entry.num_embeddings, table.entry.embedding_dim
    return UnpackedTable(table.name, rows, dim, dtype, table.nbytes, rows * dim * ROW_DTYPES[dtype].itemsize)


def check_dtype(dtype: str) -> None:
    """Raise ValueError unless tables can be unpacked to a type."""
    if dtype not in ROW_DTYPES:
        raise ValueError(f"dtype is {dtype!r}; give one of {', '.join(ROW_DTYPES)}")
