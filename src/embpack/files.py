"""embpack's files: safetensors with one JSON value of metadata (docs/format.md)."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embpack.errors import FormatError
from embpack.formats import INDEX_SUFFIX, OutShard, OutTensor, Shard, SourceTensor, open_checkpoint, write_checkpoint
from embpack.formats.base import as_bytes
from embpack.formats.dtypes import NUMPY_DTYPES, name_dtype
from embpack.layouts import ROTATIONS, ArraySpec, RowFormat
from embpack.rows import ROW_DTYPES
from embpack.table import PackedTable

METADATA_KEY = "embpack"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class TableEntry:
    """What a file's metadata says of one table.

    Attributes:
        layout, bits, param_dtype, embedding_dim, rotation: the RowFormat; a rotation of None is left out of a file.
        num_embeddings: rows.
        dtype: what the weights were: "float32", "float16" or "bfloat16".
        method: name and parameters of the method.
        loss: normalized l2 loss, measured when packed; None where unknown.
        checksum: "sha256:" and the hexadecimal digest of the packed bytes followed by those beside the rows.
    """

    layout: str
    bits: float
    param_dtype: str
    num_embeddings: int
    embedding_dim: int
    dtype: str
    method: str
    loss: float | None
    checksum: str
    rotation: str | None = None

    @property
    def row_format(self) -> RowFormat:
        """The format of the rows."""
        return RowFormat(self.embedding_dim, self.bits, self.param_dtype, self.layout, self.rotation)

    @property
    def beside(self) -> tuple[ArraySpec, ...]:
        """What the tensors beside the table's are."""
        return self.row_format.form.beside(self.num_embeddings)

    @classmethod
    def make(
        cls, row_format: RowFormat, *, num_embeddings: int, dtype: str, method: str, loss: float | None, checksum: str
    ) -> "TableEntry":
        """Make the entry of a table whose rows have a format."""
        return cls(
            layout=row_format.layout,
            bits=row_format.bits,
            param_dtype=row_format.param_dtype,
            num_embeddings=num_embeddings,
            embedding_dim=row_format.embedding_dim,
            dtype=dtype,
            method=method,
            loss=loss,
            checksum=checksum,
            rotation=row_format.rotation,
        )

    def as_json(self) -> dict[str, Any]:
        """Return what a file has of it; readers from before rotation read entries without one."""
        return {name: value for name, value in asdict(self).items() if name != "rotation" or value is not None}


def make_metadata(entries: Mapping[str, TableEntry]) -> dict[str, str]:
    """Make a file's metadata from the entries of its tables."""
    tables = {name: entry.as_json() for name, entry in entries.items()}
    return {METADATA_KEY: json.dumps({"version": FORMAT_VERSION, "tables": tables})}


def format_checksum(digest: "hashlib._Hash") -> str:
    """Write a digest as metadata has it."""
    return f"{digest.name}:{digest.hexdigest()}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 63


def _is_bits(value: Any) -> bool:
    """A count, or for some layouts a number with a fraction."""
    return _is_count(value) or (type(value) is float and 0 < value < 64 and not value.is_integer())


def _is_loss(value: Any) -> bool:
    """A finite number, or null; JSON as Python reads it may have NaN, Infinity and integers of any size."""
    return value is None or (type(value) in (int, float) and 0 <= value < 1e300)


_ENTRY_CHECKS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("layout", "param_dtype", "dtype", "method", "checksum", "rotation"), _is_text),
    **dict.fromkeys(("num_embeddings", "embedding_dim"), _is_count),
    "bits": _is_bits,
    "loss": _is_loss,
}


def read_entries(path: Path, shard: Shard) -> dict[str, TableEntry]:
    """Read and check what a file says of its tables, against the tensors it has.

    Raises:
        FormatError: it has no tables of ours, is of a future version, or says what is not so.
    """
    text = shard.metadata.get(METADATA_KEY)
    if text is None:
        raise FormatError(
            f"{path}: holds no packed tables (no {METADATA_KEY!r} metadata); pack it with: embpack quantize"
        )
    try:
        value = json.loads(text)
        version, tables = value["version"], value["tables"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise FormatError(f"{path}: its {METADATA_KEY!r} metadata is damaged ({error!r})") from None
    if type(version) is not int:
        raise FormatError(f"{path}: its {METADATA_KEY!r} metadata is damaged (version is {version!r})")
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{path}: format version {version}, but this embpack reads version {FORMAT_VERSION}; update embpack"
        )
    if not isinstance(tables, dict):
        raise FormatError(f"{path}: its {METADATA_KEY!r} metadata is damaged (tables are {type(tables).__name__})")
    tensors = {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard.tensors}
    return {name: _read_entry(f"{path}: table {name!r}", raw, name, tensors) for name, raw in tables.items()}


def _read_entry(where: str, raw: Any, name: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> TableEntry:
    if not isinstance(raw, dict) or {*raw, "rotation"} != {field.name for field in fields(TableEntry)}:
        raise FormatError(f"{where}: its metadata does not have the fields of format version {FORMAT_VERSION}")
    for key, value in raw.items():
        if not _ENTRY_CHECKS[key](value):
            raise FormatError(f"{where}: its metadata says {key} is {value!r}")
    if raw.get("rotation", ROTATIONS[0]) not in ROTATIONS:
        raise FormatError(
            f"{where} has rotation {raw['rotation']!r}, but this embpack knows {', '.join(ROTATIONS)}; update embpack"
        )
    entry = TableEntry(**raw)
    try:
        row_bytes = entry.row_format.row_bytes
    except (TypeError, ValueError) as error:
        raise FormatError(f"{where}: its metadata says {error}") from None
    if entry.dtype not in ROW_DTYPES:
        raise FormatError(f"{where}: its metadata says dtype is {entry.dtype!r}")
    if name not in tensors:
        raise FormatError(f"{where} is in the metadata but not in the file")
    promised = (entry.num_embeddings, row_bytes)
    if tensors[name] != ("U8", promised):
        dtype, shape = tensors[name]
        raise FormatError(f"{where}: the metadata promises U8 {list(promised)}, the file has {dtype} {list(shape)}")
    for spec in entry.beside:
        _check_beside(where, spec, tensors.get(name + spec.suffix))
    return entry


def _check_beside(where: str, spec: ArraySpec, found: tuple[str, tuple[int, ...]] | None) -> None:
    """Check type and shape of a tensor beside the rows."""
    if found is None or not spec.admits(NUMPY_DTYPES.get(found[0]), found[1]) or 0 in found[1]:
        dtypes = " or ".join(str(name_dtype(dtype)) for dtype in spec.dtypes)
        raise FormatError(f"{where}: its {spec.name} must be {dtypes} {spec.describe_shape()}, the file has {found}")


@dataclass(frozen=True)
class PackedFile:
    """One file of ours, mapped and checked.

    Attributes:
        entries: what it says of its tables.
        arrays: of each table, its bytes first: views of the file.
        others: names of its other tensors.
    """

    path: Path
    entries: dict[str, TableEntry]
    arrays: dict[str, list[NDArray[Any]]]
    others: tuple[str, ...]

    def table(self, name: str) -> PackedTable:
        """Return a table whose bytes stay in the file."""
        entry = self.entries[name]
        packed, *arrays = self.arrays[name]
        beside = {spec.name: array for spec, array in zip(entry.beside, arrays, strict=True)}
        try:
            return PackedTable(packed, entry.row_format, entry.dtype, entry.method, entry.loss, **beside)
        except ValueError as error:
            raise FormatError(f"{self.path}: table {name!r}: {error}") from None

    def verify(self, name: str) -> None:
        """Read a table through and compare its checksum.

        Raises:
            FormatError: the bytes are not those that were written.
        """
        check_digest(self.path, name, self.entries[name], _digest(self.arrays[name]))


def _digest(arrays: Iterable[NDArray[Any]]) -> "hashlib._Hash":
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(as_bytes(np.ascontiguousarray(array)))
    return digest


def check_digest(path: Path, name: str, entry: TableEntry, digest: "hashlib._Hash") -> None:
    """Compare the digest of a table's bytes with the one in its file.

    Raises:
        FormatError: they differ.
    """
    found = format_checksum(digest)
    if found != entry.checksum:
        raise FormatError(
            f"{path}: table {name!r} was altered: its bytes are {found}, the file promises {entry.checksum}; "
            "copy it again"
        )


def open_packed(path: str | Path) -> list[PackedFile]:
    """Map a file of ours, or each shard of a folder of them.

    Raises:
        FileNotFoundError: there is nothing at path.
        FormatError: it is damaged, truncated, not ours, or of a future version.
    """
    path = Path(path)
    if path.is_file() and not path.name.endswith((".safetensors", INDEX_SUFFIX)):
        raise FormatError(f"{path}: a file of packed tables ends in .safetensors; pack this one: embpack quantize")
    with open_checkpoint(path) as checkpoint:
        return [_map_shard(checkpoint.path.parent / shard.file_name, shard) for shard in checkpoint.shards]


def _map_shard(path: Path, shard: Shard) -> PackedFile:
    entries = read_entries(path, shard)
    parts, others = split_shard(shard, entries)
    # A tensor that is read whole is a view of the mapped file, and keeps it mapped.
    arrays = {name: [tensor.read() for tensor in own] for name, own in parts.items()}
    return PackedFile(path, entries, arrays, tuple(tensor.name for tensor in others))


def split_shard(
    shard: Shard, entries: Mapping[str, TableEntry]
) -> tuple[dict[str, list[SourceTensor]], list[SourceTensor]]:
    """Tell the tensors of each table, its packed rows first, from all others."""
    tensors = {tensor.name: tensor for tensor in shard.tensors}
    parts = {
        name: [tensors.pop(name + suffix) for suffix in ("", *(spec.suffix for spec in entry.beside))]
        for name, entry in entries.items()
    }
    return parts, list(tensors.values())


def load(path: str | Path, *, verify: bool = False, in_memory: bool = False) -> dict[str, PackedTable]:
    """Open the tables of a file without reading them: rows are read when they are looked up.

    Args:
        path: a file written by save or quantize_file; for a sharded one its folder or index.
        verify: read everything through once and compare checksums.
        in_memory: read everything now, into memory of this process. Rows are then looked up as fast the first time as
            later, and the file is no longer needed. But processes that serve the same file no longer share its memory,
            and all of it has to fit (docs/kernels.md has figures).

    Returns:
        Name to table. The tables' bytes are read-only and mapped, unless in_memory; they live as long as the tables
        do, also when the file is replaced (but not when it is overwritten in place).

    Raises:
        FileNotFoundError: there is nothing at path.
        FormatError: the file is damaged, truncated, not ours or of a future version; with verify, altered.
    """
    tables = {}
    for file in open_packed(path):
        for name in file.entries:
            if verify:
                file.verify(name)
            tables[name] = file.table(name).copy() if in_memory else file.table(name)
    return tables


def save(path: str | Path, tables: Mapping[str, PackedTable]) -> None:
    """Write tables to one safetensors file, all or nothing.

    Args:
        path: ends in .safetensors; an existing file is replaced at once, when everything is on the disk.
        tables: name to table.

    Raises:
        ValueError: there are no tables, one has no rows or has attributes that a file cannot have, two tensors would
            have one name, or path has another suffix.
        OSError: the disk is full, the folder cannot be written to.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a file of packed tables ends in .safetensors")
    if not tables:
        raise ValueError(f"{path}: there are no tables to save")
    empty = [name for name, table in tables.items() if table.num_embeddings == 0]
    if empty:
        raise ValueError(f"{path}: table {empty[0]!r} has no rows; leave it out")
    entries = {
        name: TableEntry.make(
            table.row_format,
            num_embeddings=table.num_embeddings,
            dtype=table.dtype,
            method=table.method,
            loss=table.loss,
            checksum=format_checksum(_digest([table.packed, *table.beside])),
        )
        for name, table in tables.items()
    }
    tensors = [tensor for name, table in tables.items() for tensor in _out_tensors(name, table)]
    shapes = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
    if len(shapes) < len(tensors):
        raise ValueError(
            f"{path}: two tensors have one name; call no table what another's clusters or codebooks are called"
        )
    for name, entry in entries.items():
        # What load would refuse is not written.
        _read_entry(f"{path}: table {name!r}", entry.as_json(), name, shapes)
    metadata = make_metadata(entries)
    room = len(json.dumps(metadata))
    write_checkpoint(path, [OutShard(path.name, tuple(tensors), lambda: metadata, room)])


def _out_tensors(name: str, table: PackedTable) -> Iterable[OutTensor]:
    suffixes = (spec.suffix for spec in table.row_format.form.beside(table.num_embeddings))
    for suffix, array in zip(("", *suffixes), (table.packed, *table.beside), strict=True):
        dtype = name_dtype(array.dtype)
        assert dtype is not None
        yield OutTensor(name + suffix, dtype, array.shape, partial(iter, [array]))
