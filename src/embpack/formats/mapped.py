"""Files mapped into memory, whose pages are let go once they have been read."""

import ctypes
import mmap
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embpack.formats.base import iter_slices

# Python names it since 3.13. Without it the system may refuse a file that would not fit in memory if written to.
_NORESERVE = 0x4000 if sys.platform == "linux" else 0


class _PrivateMap(mmap.mmap):
    """Pages that are this process's own once they are written to, so that no stray write ends the process."""


class FileMap:
    """A file mapped for reading, for as long as anything views it; it must not be empty.

    It is never closed by hand: arrays over a map do not stop it from closing under them.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            private = mmap.MAP_PRIVATE | _NORESERVE
            self._map = _PrivateMap(file.fileno(), 0, flags=private, prot=mmap.PROT_READ | mmap.PROT_WRITE)

    def view(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """View bytes as a C-contiguous array, perhaps an unaligned one, not to be written to; it keeps them mapped."""
        array: NDArray[Any] = np.ndarray(shape, dtype, self._map, offset)
        array.flags.writeable = False
        return array

    def release(self, start: int, stop: int) -> None:
        """Let go of the pages of bytes [start, stop); the next access reads them from the file again."""
        first = start - start % mmap.PAGESIZE
        if first < stop:
            self._map.madvise(mmap.MADV_DONTNEED, first, stop - first)


def is_mapped(array: NDArray[Any]) -> bool:
    """Whether an array is a view of a FileMap: writing to its memory is safe, and does not reach the file."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, _PrivateMap)


@dataclass(frozen=True)
class MappedArray:
    """A C-ordered array that lies, perhaps unaligned, in a mapped file."""

    file: FileMap
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def iter_rows(self, start: int, stop: int, n: int) -> Iterator[NDArray[Any]]:
        """Yield rows [start, stop), n at a time, and let go of their pages; copied only where they are unaligned."""
        array = self.file.view(self.offset, self.shape, self.dtype)
        if not self.shape:
            yield np.require(array, requirements="A")
            return
        row_bytes = array.strides[0] if array.size else 0
        for rows in iter_slices(start, stop, n):
            yield np.require(array[rows], requirements="A")
            self.file.release(self.offset + rows.start * row_bytes, self.offset + rows.stop * row_bytes)


def find_mappings(path: Path) -> list[range]:
    """Addresses at which this process has mapped a file; none where the system does not tell."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    name = str(path.resolve())
    # Address range, permissions, offset, device, inode, name.
    entries = [line.split(maxsplit=5) for line in lines]
    bounds = [entry[0].split("-") for entry in entries if len(entry) == 6 and entry[5] == name]
    return [range(int(start, 16), int(stop, 16)) for start, stop in bounds]


def release_addresses(start: int, stop: int) -> None:
    """Let go of pages by address; only for memory that a file is mapped to, anything else would be lost."""
    first = start - start % mmap.PAGESIZE
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    madvise(first, stop - first, mmap.MADV_DONTNEED)
