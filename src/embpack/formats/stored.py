"""Arrays that lie in a file as they are in memory: read a few rows at a time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embpack.formats.source import SourceFile

# Columns that are shorter are read several at a time, whole.
_COLUMNS_BYTES = 1 << 16


def iter_slices(start: int, stop: int, n: int) -> Iterator[slice]:
    """Cut [start, stop) into slices of n, but the last."""
    for first in range(start, stop, n):
        yield slice(first, min(first + n, stop))


@dataclass(frozen=True)
class StoredArray:
    """A C-ordered array of any byte order that lies at an offset of a file."""

    source: SourceFile
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def iter_rows(self, start: int, stop: int, n: int) -> Iterator[NDArray[Any]]:
        """Yield rows [start, stop), n at a time, in the machine's byte order; the next ones overwrite them."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        # Memory that is new has to be cleared by the system, which takes as long as reading into it.
        room = np.empty((min(n, stop - start), *self.shape[1:]) if self.shape else (), self.dtype)
        for rows in iter_slices(start, stop, n):
            out = room[: rows.stop - rows.start] if self.shape else room
            self.source.read_into(self.offset + rows.start * row_bytes, out)
            yield as_native(out)

    def flatten(self) -> "StoredArray":
        """Return the same values, 1-D."""
        return StoredArray(self.source, self.offset, (math.prod(self.shape),), self.dtype)

    def view(self) -> NDArray[Any] | None:
        """Map the file and return the whole array as a read-only view of it; None if it can only be read.

        An array that has no bytes, or that is not aligned or of the machine's byte order, can only be read; and one
        of a file that cannot be mapped, which is warned of once.
        """
        if not self.dtype.isnative or self.offset % self.dtype.alignment or not math.prod(self.shape):
            return None
        mapped = self.source.map()
        if mapped is None:
            return None
        array: NDArray[Any] = np.ndarray(self.shape, self.dtype, mapped, self.offset)
        array.flags.writeable = False
        return array


@dataclass(frozen=True)
class FortranArray:
    """An array of two or more dimensions whose columns, not rows, lie together at an offset of a file."""

    source: SourceFile
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def iter_rows(self, start: int, stop: int, n: int) -> Iterator[NDArray[Any]]:
        """Yield rows [start, stop), n at a time, in memory of their own and the machine's byte order."""
        length, columns = self.shape[0], math.prod(self.shape[1:])
        size = self.dtype.itemsize
        step = max(1, _COLUMNS_BYTES // (length * size))
        for rows in iter_slices(start, stop, n):
            count = rows.stop - rows.start
            out = np.empty((count, columns), self.dtype)
            for some in iter_slices(0, columns, step):
                # From the first of the rows in the first of the columns to the last in the last.
                width = some.stop - some.start
                span = np.empty((width - 1) * length + count, self.dtype)
                self.source.read_into(self.offset + (some.start * length + rows.start) * size, span)
                strides = (size, length * size)
                out[:, some] = np.lib.stride_tricks.as_strided(span, (count, width), strides)
            # Columns are numbered with the first index fastest.
            dims = self.shape[1:]
            ordered = out.reshape(count, *dims[::-1]).transpose(0, *range(len(dims), 0, -1))
            yield as_native(np.ascontiguousarray(ordered))


def as_native(array: NDArray[Any]) -> NDArray[Any]:
    """Bring an array that may be overwritten into the machine's byte order, in place."""
    return array if array.dtype.isnative else array.byteswap(inplace=True).view(array.dtype.newbyteorder("="))
