"""embpack's files: safetensors with one JSON value of metadata (docs/format.md); read by packed_files.py."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embpack.disk import advise_packed
from embpack.errors import FormatError
from embpack.formats import OutShard, OutTensor, Shard, SourceTensor, open_checkpoint, write_checkpoint
from embpack.formats.base import as_bytes, is_utf8
from embpack.formats.dtypes import NUMPY_DTYPES, name_dtype
from embpack.formats.mapped import reading_all
from embpack.formats.paths import as_path
from embpack.layouts import ROTATIONS, ArraySpec, RowFormat
from embpack.rows import ROW_DTYPES
from embpack.table import PackedTable

METADATA_KEY = "embpack"
# Of the format: what is written where no table is in pieces, and where one is.
FORMAT_VERSION, PIECES_VERSION = 2, 3
PIECE_ROWS = 4096
"""Rows of pieces, but for the last one, are a multiple of it: their bytes are whole pages, whatever a row has."""
PIECE_ALIGNMENT = 4096
"""Bytes of a page, at which the first tensor of a file with a piece begins."""

# No loss and no square_norm of a piece comes to more, so that both can be multiplied and summed.
_MOST = 1e100
# What is hashed at a time, so that Ctrl-C is heard in between.
_PORTION_BYTES = 1 << 24


_OPTIONAL = ("rotation", "piece")


@dataclass(frozen=True)
class PieceEntry:
    """What a file's metadata says of a table of which it has some rows, as a table of its own.

    Attributes:
        table: the name of the whole.
        first_row: of the whole, where the piece begins.
        num_embeddings: rows of the whole.
        square_norm: sum of the squares of the piece's values, by which its loss counts; None where the loss is unknown.
    """

    table: str
    first_row: int
    num_embeddings: int
    square_norm: float | None


@dataclass(frozen=True)
class TableEntry:
    """What a file's metadata says of one table.

    Attributes:
        layout, bits, param_dtype, embedding_dim, rotation: the RowFormat.
        num_embeddings: rows.
        dtype: what the weights were: "float32", "float16" or "bfloat16".
        method: name and parameters of the method.
        loss: normalized l2 loss, measured when packed; None where unknown.
        checksum: "sha256:" and the hexadecimal digest of the packed bytes followed by those beside the rows.
        piece: what it is a piece of; None if it is whole. A rotation and a piece of None are left out of a file.
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
    piece: PieceEntry | None = None

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
        cls,
        row_format: RowFormat,
        *,
        num_embeddings: int,
        dtype: str,
        method: str,
        loss: float | None,
        checksum: str,
        piece: PieceEntry | None = None,
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
            piece=piece,
        )

    def as_json(self) -> dict[str, Any]:
        """Return what a file has of it; readers from before rotation and pieces read entries without them."""
        return {name: value for name, value in asdict(self).items() if name not in _OPTIONAL or value is not None}


@dataclass(frozen=True)
class Contents:
    """What a file's metadata says of it.

    Attributes:
        version: of the format.
        tables: by name.
        others: checksums of all other tensors, by name; None in version 1, which has none of those.
        checksum: of the header; None in version 1.
    """

    version: int
    tables: dict[str, TableEntry]
    others: dict[str, str] | None
    checksum: str | None


# By version of the format: the keys of the metadata's value.
_KEYS = {1: {"version", "tables"}, **{version: {"version", "tables", "others", "checksum"} for version in (2, 3)}}


def make_metadata(
    tables: Mapping[str, TableEntry],
    others: Mapping[str, str],
    tensors: Iterable[OutTensor | SourceTensor],
    *,
    is_compact: bool = False,
) -> dict[str, str]:
    """Make a file's metadata from the entries of its tables, the checksums of its other tensors, and all tensors.

    Without the spaces, which is_compact leaves out, it takes less room than before, though a loss has more digits.
    """
    has_pieces = any(entry.piece is not None for entry in tables.values())
    value = {
        "version": PIECES_VERSION if has_pieces else FORMAT_VERSION,
        "tables": {name: entry.as_json() for name, entry in tables.items()},
        "others": dict(others),
    }
    separators = (",", ":") if is_compact else None
    checked = {**value, "checksum": _checksum_header(value, tensors)}
    return {METADATA_KEY: json.dumps(checked, separators=separators)}


def _checksum_header(value: Mapping[str, Any], tensors: Iterable[OutTensor | SourceTensor]) -> str:
    """Checksum all that gives a file's bytes their meaning: the metadata's value, and what the tensors are."""
    described = {tensor.name: [tensor.dtype, tensor.shape] for tensor in tensors}
    text = json.dumps({**value, "tensors": described}, sort_keys=True, separators=(",", ":"))
    return format_checksum(hashlib.sha256(text.encode()))


def format_checksum(digest: "hashlib._Hash") -> str:
    """Write a digest as metadata has it."""
    return f"{digest.name}:{digest.hexdigest()}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and is_utf8(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 63


def _is_bits(value: Any) -> bool:
    """A count, or for some layouts a number with a fraction."""
    return _is_count(value) or (type(value) is float and 0 < value < 64 and not value.is_integer())


def _is_loss(value: Any) -> bool:
    """A finite number, or null; JSON as Python reads it may have NaN, Infinity and integers of any size."""
    return value is None or (type(value) in (int, float) and 0 <= value < 1e300)


def _is_piece(value: Any) -> bool:
    """An object with what a piece has, which is of no other numbers than pieces can have."""
    return (
        isinstance(value, dict)
        and set(value) == {field.name for field in fields(PieceEntry)}
        and _is_text(value["table"])
        and type(value["first_row"]) is int
        and value["first_row"] >= 0
        and value["first_row"] % PIECE_ROWS == 0
        and _is_count(value["num_embeddings"])
        and (value["square_norm"] is None or (_is_loss(value["square_norm"]) and value["square_norm"] < _MOST))
    )


_ENTRY_CHECKS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("layout", "param_dtype", "dtype", "method", "checksum", "rotation"), _is_text),
    **dict.fromkeys(("num_embeddings", "embedding_dim"), _is_count),
    "bits": _is_bits,
    "loss": _is_loss,
    "piece": _is_piece,
}


def read_contents(path: Path, shard: Shard) -> Contents:
    """Read and check what a file says of itself, against the tensors it has.

    Raises:
        FormatError: it has no tables of ours, is of a future version, says what is not so, or says something else than
            when it was written.
    """
    text = shard.metadata.get(METADATA_KEY)
    if text is None:
        raise FormatError(
            f"{path}: holds no packed tables (no {METADATA_KEY!r} metadata); pack it with: embpack quantize"
        )
    damaged = f"{path}: its {METADATA_KEY!r} metadata is damaged"
    try:
        value = json.loads(text)
        version, tables = value["version"], value["tables"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise FormatError(f"{damaged} ({error!r})") from None
    if type(version) is not int:
        raise FormatError(f"{damaged} (version is {version!r})")
    if version not in _KEYS:
        raise FormatError(
            f"{path}: format version {version}, but this embpack reads versions 1 to {PIECES_VERSION}; update embpack"
        )
    if set(value) != _KEYS[version]:
        raise FormatError(f"{damaged} (version {version} has {sorted(_KEYS[version])}, found {sorted(value)})")
    if not isinstance(tables, dict):
        raise FormatError(f"{damaged} (tables are {type(tables).__name__})")
    tensors = {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard.tensors}
    entries = {name: _read_entry(f"{path}: table {name!r}", raw, name, tensors) for name, raw in tables.items()}
    if version < PIECES_VERSION and any(entry.piece is not None for entry in entries.values()):
        raise FormatError(f"{damaged} (version {version} has no tables in pieces)")
    if version > 1:
        _check_header(path, shard, value, entries)
    return Contents(version, entries, value.get("others"), value.get("checksum"))


def _check_header(path: Path, shard: Shard, value: dict[str, Any], entries: Mapping[str, TableEntry]) -> None:
    """Compare all that gives the file's bytes their meaning with its checksum."""
    damaged = f"{path}: its {METADATA_KEY!r} metadata is damaged"
    others, covered = value["others"], {key: own for key, own in value.items() if key != "checksum"}
    if not isinstance(others, dict) or not all(map(_is_text, others.values())):
        raise FormatError(f"{damaged} (others must be checksums by name)")
    found = _checksum_header(covered, shard.tensors)
    if found != value["checksum"]:
        raise FormatError(
            f"{path}: its header was altered, so what its bytes mean is unknown: the header is {found}, the file "
            f"promises {value['checksum']}; copy it again"
        )
    there = {tensor.name for tensor in split_shard(shard, entries)[1]}
    if there != set(others):
        raise FormatError(f"{damaged} (others must have a checksum of {min(there ^ set(others))!r}, or not have it)")


def _read_entry(where: str, raw: Any, name: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> TableEntry:
    if not isinstance(raw, dict) or {*raw, *_OPTIONAL} != {field.name for field in fields(TableEntry)}:
        raise FormatError(f"{where}: its metadata does not have the fields that a table has")
    for key, value in raw.items():
        if not _ENTRY_CHECKS[key](value):
            raise FormatError(f"{where}: its metadata says {key} is {value!r}")
    if raw.get("rotation", ROTATIONS[0]) not in ROTATIONS:
        raise FormatError(
            f"{where} has rotation {raw['rotation']!r}, but this embpack knows {', '.join(ROTATIONS)}; update embpack"
        )
    entry = TableEntry(**{**raw, "piece": PieceEntry(**raw["piece"]) if "piece" in raw else None})
    _check_piece(where, name, entry)
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


def _check_piece(where: str, name: str, entry: TableEntry) -> None:
    """Check a piece by itself; what it is together with others is checked where they are joined."""
    piece = entry.piece
    if piece is None:
        return
    prefix, _, number = name.rpartition(".")
    if prefix != piece.table or re.fullmatch(r"piece_(0|[1-9][0-9]{0,17})", number) is None:
        raise FormatError(f"{where}: its metadata says that it is a piece of {piece.table!r}, which its name does not")
    if (entry.loss is None) is not (piece.square_norm is None) or (entry.loss or 0) >= _MOST:
        raise FormatError(f"{where}: its metadata says loss is {entry.loss!r} and square_norm {piece.square_norm!r}")
    end_row = piece.first_row + entry.num_embeddings
    if end_row > piece.num_embeddings or (end_row < piece.num_embeddings and end_row % PIECE_ROWS):
        raise FormatError(
            f"{where}: its metadata says that it has {entry.num_embeddings} rows from row {piece.first_row} of "
            f"{piece.num_embeddings} on, which no piece has"
        )


def name_piece(table: str, number: int) -> str:
    """Name the tensor of a piece of a table's packed rows."""
    return f"{table}.piece_{number}"


def _check_beside(where: str, spec: ArraySpec, found: tuple[str, tuple[int, ...]] | None) -> None:
    """Check type and shape of a tensor beside the rows."""
    if found is None or not spec.admits(NUMPY_DTYPES.get(found[0]), found[1]) or 0 in found[1]:
        dtypes = " or ".join(str(name_dtype(dtype)) for dtype in spec.dtypes)
        raise FormatError(f"{where}: its {spec.name} must be {dtypes} {spec.describe_shape()}, the file has {found}")


def digest_tensors(tensors: Iterable[SourceTensor]) -> "hashlib._Hash":
    """Read tensors through and digest their bytes."""
    return _digest(portion for tensor in tensors for portion in tensor.portions(by_name=False))


def _digest(arrays: Iterable[NDArray[Any]]) -> "hashlib._Hash":
    digest = hashlib.sha256()
    for array in arrays:
        data = as_bytes(np.ascontiguousarray(array))
        for start in range(0, len(data), _PORTION_BYTES):
            digest.update(data[start : start + _PORTION_BYTES])
    return digest


def check_bytes(path: Path, what: str, digest: "hashlib._Hash", promised: str) -> None:
    """Compare the digest of a table's bytes, or another tensor's, with the checksum in its file.

    Raises:
        FormatError: they differ.
    """
    found = format_checksum(digest)
    if found != promised:
        raise FormatError(
            f"{path}: {what} was altered: its bytes are {found}, the file promises {promised}; copy it again"
        )


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


def is_packed(path: Path) -> bool:
    """Whether embpack packed the file, or all files of the index, at a path."""
    try:
        with open_checkpoint(path) as checkpoint:
            return all(METADATA_KEY in shard.metadata for shard in checkpoint.shards)
    except (ValueError, OSError):
        return False


def save(
    path: str | Path,
    tables: Mapping[str, PackedTable],
    *,
    others: Mapping[str, NDArray[Any]] | None = None,
    force: bool = False,
) -> None:
    """Write tables to one safetensors file, all or nothing.

    Args:
        path: ends in .safetensors, and may be a URI; a file of embpack's that exists is replaced at once, when
            everything is on the disk.
        tables: name to table.
        others: arrays to write beside the tables, by name; load leaves them out.
        force: replace any other file, too, such as a checkpoint that is not packed.

    Raises:
        FileExistsError: there is a file that embpack did not write, and no force.
        TypeError: tables are not PackedTables by name.
        ValueError: there are no tables, one has no rows or has attributes that a file cannot have, two tensors would
            have one name, or one that is no text, or path has another suffix.
        OSError: the disk is full, the folder cannot be written to.
    """
    path = as_path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a file of packed tables ends in .safetensors")
    _check_tables(path, tables)
    empty = [name for name, table in tables.items() if table.num_embeddings == 0]
    if empty:
        raise ValueError(f"{path}: table {empty[0]!r} has no rows; leave it out")
    with reading_all(*(table.packed for table in tables.values())):
        _write(path, tables, others or {}, force=force)


def _write(path: Path, tables: Mapping[str, PackedTable], others: Mapping[str, NDArray[Any]], *, force: bool) -> None:
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
    arrays = {name: np.asarray(array, order="C") for name, array in others.items()}
    tensors = [tensor for name, table in tables.items() for tensor in _out_tensors(name, table)]
    tensors += [_out_tensor(name, array) for name, array in arrays.items()]
    shapes = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
    if len(shapes) < len(tensors):
        raise ValueError(
            f"{path}: two tensors have one name; call nothing what another table's clusters or codebooks are called"
        )
    for name, entry in entries.items():
        # What load would refuse is not written.
        _read_entry(f"{path}: table {name!r}", entry.as_json(), name, shapes)
    checksums = {name: format_checksum(_digest([array])) for name, array in arrays.items()}
    metadata = make_metadata(entries, checksums, tensors)
    room = len(json.dumps(metadata))
    shard = OutShard(path.name, tuple(tensors), lambda: metadata, room)
    write_checkpoint(path, [shard], list_own=lambda path: [path.name] * is_packed(path), force=force)


def _check_tables(path: Path, tables: Mapping[str, PackedTable]) -> None:
    if not isinstance(tables, Mapping):
        kind = type(tables).__name__
        raise TypeError(f'{path}: tables is {kind}; give tables by name: embpack.save(path, {{"user": table}})')
    if not tables:
        raise ValueError(f"{path}: there are no tables to save")
    for name, table in tables.items():
        if not isinstance(name, str):
            raise TypeError(f"{path}: a table's name is {name!r}, not a string; give tables by name")
        if not isinstance(table, PackedTable):
            raise TypeError(f"{path}: table {name!r} is {type(table).__name__}; {advise_packed(table)}")


def _out_tensors(name: str, table: PackedTable) -> Iterable[OutTensor]:
    suffixes = (spec.suffix for spec in table.row_format.form.beside(table.num_embeddings))
    for suffix, array in zip(("", *suffixes), (table.packed, *table.beside), strict=True):
        yield _out_tensor(name + suffix, array)


def _out_tensor(name: str, array: NDArray[Any]) -> OutTensor:
    dtype = name_dtype(array.dtype)
    if dtype is None:
        raise TypeError(f"{name!r} is {array.dtype}, which a safetensors file cannot have")
    return OutTensor(name, dtype, array.shape, partial(iter, [array]))
