"""Arrays that lie in a file as they are in memory: read a few rows at a time."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embpack.formats.mapped import expect_random_reads
from embpack.formats.source import SourceFile

# Spans of a file that are read whole for the few values in them that are wanted.
_SPAN_BYTES = 1 << 16


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
        """Yield rows [start, stop), n at a time, in the machine's byte order; the next ones overwrite them.

        Of a source that is far away the next ones are read while these are worked on, into memory of their own.
        """
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        is_ahead = self.source.is_far and stop - start > n
        # Memory that is new has to be cleared by the system, which takes as long as reading into it.
        rooms = cycle(
            [
                np.empty((min(n, stop - start), *self.shape[1:]) if self.shape else (), self.dtype)
                for _ in range(1 + is_ahead)
            ]
        )

        def read(rows: slice) -> NDArray[Any]:
            room = next(rooms)
            out = room[: rows.stop - rows.start] if self.shape else room
            self.source.read_into(self.offset + rows.start * row_bytes, out)
            return as_native(out)

        slices = iter_slices(start, stop, n)
        return _map_ahead(read, slices) if is_ahead else map(read, slices)

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
        expect_random_reads(array)
        array.flags.writeable = False
        return array


def _map_ahead(read: Callable[[slice], NDArray[Any]], slices: Iterator[slice]) -> Iterator[NDArray[Any]]:
    """Do what map does, but read the next one in a thread while one is worked on."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(read, next(slices))
        for rows in slices:
            ready, coming = coming.result(), pool.submit(read, rows)
            yield ready
        yield coming.result()


@dataclass(frozen=True)
class StridedArray:
    """An array of any strides and byte order that lies at an offset of a file.

    Attributes:
        strides: bytes from one entry to the next, in each dimension; none is negative.
    """

    source: SourceFile
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]

    @classmethod
    def in_fortran_order(
        cls, source: SourceFile, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> "StridedArray":
        """Make one whose columns, not rows, lie together."""
        strides = tuple(math.prod(shape[:i]) * dtype.itemsize for i in range(len(shape)))
        return cls(source, offset, shape, strides, dtype)

    def iter_rows(self, start: int, stop: int, n: int) -> Iterator[NDArray[Any]]:
        """Yield rows [start, stop), n at a time, in memory of their own and the machine's byte order."""
        for rows in iter_slices(start, stop, n):
            out = np.empty((rows.stop - rows.start, *self.shape[1:]) if self.shape else (), self.dtype)
            if out.size:
                self._fill(out, self.offset + (rows.start * self.strides[0] if self.shape else 0))
            yield as_native(out)

    def _fill(self, out: NDArray[Any], offset: int) -> None:
        """Read values from an offset on; where they lie far apart, one half after the other."""
        reach = [(length - 1) * stride for length, stride in zip(out.shape, self.strides, strict=True)]
        span = sum(reach) + self.dtype.itemsize
        if span <= max(_SPAN_BYTES, out.nbytes):
            raw = np.empty(span, np.uint8)
            self.source.read_into(offset, raw)
            out[...] = np.ndarray(out.shape, self.dtype, raw, strides=self.strides)
            return
        axis = int(np.argmax(reach))
        half = out.shape[axis] // 2
        first, second = np.split(out, [half], axis)
        self._fill(first, offset)
        self._fill(second, offset + half * self.strides[axis])


def as_native(array: NDArray[Any]) -> NDArray[Any]:
    """Bring an array that may be overwritten into the machine's byte order, in place."""
    return array if array.dtype.isnative else array.byteswap(inplace=True).view(array.dtype.newbyteorder("="))
