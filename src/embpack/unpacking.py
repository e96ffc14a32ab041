"""Packed checkpoint in, plain checkpoint out, streaming."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from embpack.chunks import chunk_rows
from embpack.destination import check_place, name_file, name_index
from embpack.files import METADATA_KEY, Contents, TableEntry, check_bytes, read_contents, split_shard
from embpack.formats import OutFolder, OutShard, OutTensor, SourceTensor, open_checkpoint, write_checkpoint
from embpack.formats.base import as_bytes
from embpack.formats.new_folder import nothing
from embpack.packed_folder import copy_companions, name_plain
from embpack.rows import ROW_DTYPES
from embpack.shard_writer import Progress, copy_tensor
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
    progress: Progress = lambda name, rows: None,
) -> tuple[UnpackedTable, ...]:
    """Write a packed checkpoint as a plain one that the original program can load, streaming.

    Args:
        src: what quantize_file or save wrote; a file, or a folder.
        dst: .safetensors, .pt, .pth, .bin, .ckpt, .npy, .npz or .parquet, by its suffix; for a folder as src a folder,
            which gets the model's small files, too.
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
    dst = Path(dst)
    if dtype is not None:
        check_dtype(dtype)
    with open_checkpoint(src) as checkpoint:
        check_place(checkpoint, dst, nothing, force=force)
        shards, unpacked = [], []
        for shard in checkpoint.shards:
            path = checkpoint.path.parent / shard.file_name
            contents = read_contents(path, shard)
            parts, others = split_shard(shard, contents.tables)
            unpacked += [
                _unpacked_table(parts[name], entry, dtype or entry.dtype) for name, entry in contents.tables.items()
            ]
            copied = {tensor.name for tensor in others}
            tensors = tuple(
                copy_tensor(tensor, partial(_check_other, path, tensor.name, contents))
                if tensor.name in copied
                else _unpack(path, parts[tensor.name], contents.tables[tensor.name], dtype, progress)
                for tensor in shard.tensors
                if tensor.name in copied or tensor.name in contents.tables
            )
            plain = {key: value for key, value in shard.metadata.items() if key != METADATA_KEY}
            name = name_file(checkpoint, shard, dst, name_plain)
            shards.append(OutShard(name, tensors, partial(dict, plain), len(json.dumps(plain))))
        folder = OutFolder(name_index(checkpoint, name_plain), copy_companions(checkpoint))
        write_checkpoint(dst, shards, folder if checkpoint.is_folder else None, force=force)
    return tuple(unpacked)


def _check_other(path: Path, name: str, contents: Contents, digest: "hashlib._Hash") -> None:
    """Compare the checksum of a tensor that is no table's, which version 1 has not."""
    if contents.others is not None:
        check_bytes(path, f"tensor {name!r}", digest, contents.others[name])


def _unpack(
    path: Path, parts: Sequence[SourceTensor], entry: TableEntry, dtype: str | None, progress: Progress
) -> OutTensor:
    """Decode a table chunk by chunk; its checksum is compared at the end, before the output gets its name."""
    tensor, *beside = parts
    dtype = dtype or entry.dtype

    def chunks() -> Iterator[NDArray[Any]]:
        digest = hashlib.sha256()
        named = {spec.name: part for spec, part in zip(entry.beside, beside, strict=True)}
        clusters, codebooks = named.get("clusters"), named["codebooks"].read() if "codebooks" in named else None
        done = 0
        for packed in tensor.chunks(chunk_rows(entry.embedding_dim)):
            digest.update(packed.data)
            own = None if clusters is None else clusters.read(done, done + len(packed))
            table = PackedTable(packed, entry.row_format, clusters=own, codebooks=codebooks)
            yield table.dequantize(dtype)
            done += len(packed)
            progress(tensor.name, len(packed))
        for piece in chain.from_iterable(part.pieces() for part in beside):
            digest.update(as_bytes(piece))
        check_bytes(path, f"table {tensor.name!r}", digest, entry.checksum)

    shape = (entry.num_embeddings, entry.embedding_dim)
    return OutTensor(tensor.name, _SAFETENSORS_DTYPE[dtype], shape, chunks)


def _unpacked_table(parts: Sequence[SourceTensor], entry: TableEntry, dtype: str) -> UnpackedTable:
    values = entry.num_embeddings * entry.embedding_dim
    packed = sum(part.nbytes for part in parts)
    plain = values * ROW_DTYPES[dtype].itemsize
    return UnpackedTable(parts[0].name, entry.num_embeddings, entry.embedding_dim, dtype, packed, plain)


def check_dtype(dtype: str) -> None:
    """Raise ValueError unless tables can be unpacked to a type."""
    if dtype not in ROW_DTYPES:
        raise ValueError(f"dtype is {dtype!r}; give one of {', '.join(ROW_DTYPES)}")
