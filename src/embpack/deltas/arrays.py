"""Deltas of NumPy's files: an array of ids beside one of rows."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from embpack.deltas.base import INT8_PARAM_BYTES, Delta, Keys, Positions, Rows, explain_width
from embpack.errors import FormatError
from embpack.formats import Checkpoint, SourceTensor

IDS, ROWS = "indices", "rows"
"""What the arrays of an .npz file are called, alone or after the table's name and a dot."""

_CHUNK_IDS, _CHUNK_VALUES = 1 << 20, 1 << 22
_INTEGERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")
_VALUES = ("F32", "F16", "BF16", "U8")


@dataclass(frozen=True)
class _Taken(Rows):
    """Rows of an array; place: where it lies, for messages."""

    start: int
    stop: int
    rows: NDArray[Any]
    place: str

    def take(self, positions: Positions, embedding_dim: int) -> NDArray[Any]:
        is_int8, width = self.rows.dtype == np.uint8, self.rows.shape[1]
        if width != embedding_dim + is_int8 * INT8_PARAM_BYTES:
            raise explain_width(f"{self.place}[{positions[0]}]", width, embedding_dim, is_int8=is_int8)
        return self.rows[positions - self.start]


@dataclass(frozen=True)
class ArrayDelta(Delta):
    """Ids and rows in two arrays.

    Attributes:
        table: whose rows they are; None where nothing says it.
        ids: integers [n].
        rows: [n, d].
        id_place, row_place: where these lie, for messages.
    """

    table: str | None
    ids: SourceTensor
    rows: SourceTensor
    id_place: str
    row_place: str
    num_rows: int
    has_steps: bool = False

    @classmethod
    def make(cls, table: str | None, ids: SourceTensor, rows: SourceTensor, id_place: str, row_place: str) -> Self:
        """Make one of arrays that are checked.

        Raises:
            ValueError: they are not as above, or there are not as many ids as rows.
        """
        # np.array([]) is of float64.
        if len(ids.shape) != 1 or (ids.dtype not in _INTEGERS and ids.shape[0]):
            raise ValueError(f"{id_place} is {ids.dtype} {list(ids.shape)}; ids are integers, in one dimension")
        if len(rows.shape) != 2 or rows.dtype not in _VALUES:
            raise ValueError(
                f"{row_place} is {rows.dtype} {list(rows.shape)}; rows are [n, d] of float32, float16 or bfloat16, or "
                "of uint8 as FBGEMM quantizes them; convert them with rows.astype(numpy.float32)"
            )
        if ids.shape[0] != rows.shape[0]:
            raise ValueError(f"{id_place} has {ids.shape[0]} ids, but {row_place} has {rows.shape[0]} rows")
        return cls(table, ids, rows, id_place, row_place, ids.shape[0])

    def iter_keys(self) -> Iterator[Keys]:  # noqa: D102  (as in Delta)
        start = 0
        for ids in self.ids.chunks(_CHUNK_IDS):
            positions = np.arange(start, start + len(ids))
            yield Keys(self.table, positions, ids.copy(), np.zeros(len(ids), np.int64))
            start += len(ids)

    def iter_rows(self, positions: Positions, most_values: int) -> Iterator[Rows]:  # noqa: D102  (as in Delta)
        start, stop = int(positions[0]), int(positions[-1]) + 1
        for rows in self.rows.chunks(max(1, _CHUNK_VALUES // max(1, self.rows.shape[1])), start, stop):
            yield _Taken(start, start + len(rows), rows, self.row_place)
            start += len(rows)

    def locate(self, position: int | None = None, *, of_id: bool = False) -> str:  # noqa: D102  (as in Delta)
        place = self.id_place if of_id else self.row_place
        return place if position is None else f"{place}[{position}]"


def read_pair(table: str | None, ids: Checkpoint, rows: Checkpoint) -> ArrayDelta:
    """Make the delta of two .npy files that are open.

    Raises:
        ValueError: they are not ids and rows.
    """
    return ArrayDelta.make(table, ids.tensors[0], rows.tensors[0], str(ids.path), str(rows.path))


def read_archive(table: str | None, checkpoint: Checkpoint) -> list[ArrayDelta]:
    """Make the deltas of an .npz file that is open: one for each table.

    Args:
        table: whose rows those are that have no table's name; None if nothing says it.
        checkpoint: the file.

    Raises:
        FormatError: it has arrays that are none of a delta's, or lacks one.
        ValueError: arrays are not ids and rows, or it names tables though one is given.
    """
    path, arrays = checkpoint.path, {tensor.name: tensor for tensor in checkpoint.tensors}
    pairs: dict[str, dict[str, SourceTensor]] = {}
    for name, tensor in arrays.items():
        of_table, _, kind = name.rpartition(".")
        if kind not in (IDS, ROWS):
            raise FormatError(f"{path}: array {name!r} is not called TABLE.{IDS} or TABLE.{ROWS}; rename it")
        pairs.setdefault(of_table, {})[kind] = tensor
    if checkpoint.left_out:
        raise FormatError(f"{path}: {checkpoint.left_out[0]} is neither ids nor rows; leave it out")
    if table is not None:
        refuse_names(path, table, [name for name in pairs if name])
    return [_make_of_archive(path, table if not name else name, name, pair) for name, pair in pairs.items()]


def refuse_names(path: Path, table: str, names: list[str]) -> None:
    """Raise ValueError if a delta names tables itself though one is given for it."""
    if names:
        raise ValueError(f"{path}: names its tables itself, such as {names[0]!r}; leave {table}= out")


def _make_of_archive(path: Path, table: str | None, name: str, pair: Mapping[str, SourceTensor]) -> ArrayDelta:
    prefix = f"{name}." if name else ""
    for kind in (IDS, ROWS):
        if kind not in pair:
            raise FormatError(f"{path}: has no array {prefix + kind!r} beside {prefix + next(iter(pair))!r}")
    places = (f"{path}: {prefix + kind!r}" for kind in (IDS, ROWS))
    return ArrayDelta.make(table, pair[IDS], pair[ROWS], *places)
