"""A table that lies in pieces: rows and columns of it under several names, in several files, or in parts of one."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embpack.errors import FormatError
from embpack.formats.base import SourceTensor
from embpack.formats.dtypes import ARRAY_DTYPES
from embpack.formats.stored import iter_slices

# Bands that a piece lies in, on average over a table's pieces. Programs cut all columns at the same rows: a piece is in
# one band. A few thousand tall ones beside as many flat ones would be millions, which nobody has to look through.
_MOST_BANDS = 64


@dataclass(frozen=True)
class Piece:
    """Some rows of a table, or some columns of them.

    Attributes:
        first_row, first_column: where it begins in the table.
        tensor: its values, 2-D.
    """

    first_row: int
    first_column: int
    tensor: SourceTensor

    @property
    def end_row(self) -> int:
        """Row of the table that follows its last."""
        return self.first_row + self.tensor.shape[0]

    @property
    def end_column(self) -> int:
        """Column of the table that follows its last."""
        return self.first_column + self.tensor.shape[1]


@dataclass(frozen=True)
class _Band:
    """Rows [start, stop) of a table, over which the same pieces lie side by side, in the order of their columns."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]


def join_pieces(where: str, name: str, shape: tuple[int, int], dtype: str, pieces: Sequence[Piece]) -> SourceTensor:
    """Make one tensor of pieces that may lie anywhere, each in a file that is checked when it is read.

    Args:
        where: the checkpoint, for errors.
        name: of the table.
        shape: of the table, (rows, columns).
        dtype: of all pieces, a type that has no less than a byte.
        pieces: in any order; those without values are left out.

    Raises:
        FormatError: pieces are not of one type, lie over each other or outside the table, or leave a part of it out.
    """
    for piece in pieces:
        if piece.tensor.dtype != dtype:
            raise FormatError(
                f"{where}: piece {piece.tensor.name!r} of table {name!r} is {piece.tensor.dtype}, others are {dtype}"
            )
    bands = _find_bands(f"{where}: table {name!r}", shape, [piece for piece in pieces if piece.tensor.nbytes])
    read = partial(_iter_rows, bands, shape[1], dtype)
    return SourceTensor(name, shape, dtype, read, None, num_pieces=len(pieces))


def _find_bands(where: str, shape: tuple[int, int], pieces: Sequence[Piece]) -> tuple[_Band, ...]:
    """Cut a table into bands, and see to it that pieces cover each of them once."""
    waiting = sorted(pieces, key=attrgetter("first_row", "first_column"), reverse=True)
    bounds = sorted({0, shape[0]} | {bound for piece in pieces for bound in (piece.first_row, piece.end_row)})
    if bounds[0] < 0 or bounds[-1] > shape[0]:
        raise FormatError(f"{where} of {shape[0]} rows has pieces with rows [{bounds[0]}, {bounds[-1]})")
    bands, there, count = [], list[Piece](), 0
    for start, stop in pairwise(bounds):
        there = [piece for piece in there if piece.end_row > start]
        while waiting and waiting[-1].first_row == start:
            there.append(waiting.pop())
        count += len(there)
        if count > _MOST_BANDS * len(pieces):
            raise FormatError(f"{where} is cut into {len(pieces)} pieces at too many different rows; it is damaged")
        there.sort(key=attrgetter("first_column"))
        column = 0
        for piece in there:  # at most as many as the table has columns, or this raises
            if piece.first_column != column:
                break
            column = piece.end_column
        else:
            if column == shape[1]:
                bands.append(_Band(start, stop, tuple(there)))
                continue
        raise FormatError(
            f"{where} has no piece, or more than one, with row {start}, column {min(column, shape[1] - 1)}; a file is "
            "missing, or they are of different checkpoints"
        )
    return tuple(bands)


def _iter_rows(
    bands: Sequence[_Band], num_columns: int, dtype: str, start: int, stop: int, n: int
) -> Iterator[NDArray[Any]]:
    """Yield rows [start, stop), n at a time; the next ones overwrite them."""
    room = np.empty((min(n, stop - start), num_columns), ARRAY_DTYPES[dtype])
    for rows in iter_slices(start, stop, n):
        out = room[: rows.stop - rows.start]
        first = bisect_right(bands, rows.start, key=attrgetter("start")) - 1
        end = bisect_left(bands, rows.stop, key=attrgetter("start"))
        for band in bands[first:end]:
            above, below = max(band.start, rows.start), min(band.stop, rows.stop)
            for piece in band.pieces:
                values = piece.tensor.read(above - piece.first_row, below - piece.first_row)
                out[above - rows.start : below - rows.start, piece.first_column : piece.end_column] = values
        yield out
