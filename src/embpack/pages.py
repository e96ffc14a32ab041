"""Huge pages: where packed bytes lie, and how lookups of rows that no cache holds get faster by it.

A CPU knows the places of some thousand pages. Rows of a table in pages of 4 KB need more, so a lookup waits for the
place of a row as well as for the row; in pages of 2 MB it waits for the row alone. Linux gives huge pages to those who
ask (transparent huge pages, `madvise`). NumPy asks for memory that it allocates; PyTorch and malloc do not.
"""

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_BYTES = 1 << 22
"""Bytes of an array from which on it is put in huge pages: those from which on NumPy asks for them."""

_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage")
_ADVISE, _COLLAPSE = 14, 25  # MADV_HUGEPAGE; MADV_COLLAPSE, since Linux 6.1, which Python does not name
# Moved in one call: some 20 ms, between which Python handles its signals.
_PIECE_BYTES = 1 << 26
# What /proc/self/pagemap says of a page: it is there; no other process has it.
_PRESENT, _EXCLUSIVE = np.uint64(1 << 63), np.uint64(1 << 56)


def use_huge_pages(*arrays: NDArray[Any]) -> None:
    """Have Linux put the memory of large arrays in huge pages, at once where it can; values and addresses stay.

    Only memory that is this process's alone is moved: neither mapped files nor memory that is shared, be it with a
    process that was forked. What is not filled yet gets huge pages as it is filled. Nothing is done where the system's
    administrator has switched huge pages off, and what fails costs nothing but speed.
    """
    if sys.platform != "linux":
        return
    for array in arrays:
        if array.nbytes >= MIN_BYTES and array.flags.c_contiguous:
            with suppress(OSError):  # a system without the files that are read, or one that does not let them be
                _move(array.ctypes.data, array.ctypes.data + array.nbytes)


def _move(start: int, stop: int) -> None:
    if "[never]" in (_SYSTEM / "enabled").read_text():
        return
    huge = int((_SYSTEM / "hpage_pmd_size").read_text())
    for low, high in _find_private(start, stop):
        first, last = -(-low // huge) * huge, high // huge * huge
        if first < last:
            _advise(first, last, _ADVISE)
            _collapse(first, last, max(_PIECE_BYTES, huge))


def _find_private(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Find the parts of a range of addresses that are no file's and in no other process's reach."""
    for line in Path("/proc/self/maps").read_bytes().splitlines():  # in the order of addresses
        low, _, rest = line.partition(b"-")
        first = max(int(low, 16), start)
        if first >= stop:
            return
        high, access, _, _, inode = rest.split(maxsplit=5)[:5]
        last = min(int(high, 16), stop)
        if first < last and inode == b"0" and access.endswith(b"p"):
            yield first, last


def _collapse(start: int, stop: int, piece_bytes: int) -> None:
    """Copy the small pages of a range into huge ones.

    Those that are shared since a fork are left: each process would get a copy of its own.
    """
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        for first in range(start, stop, piece_bytes):
            last = min(first + piece_bytes, stop)
            pages = np.zeros((last - first) // mmap.PAGESIZE, np.uint64)
            os.preadv(pagemap.fileno(), [pages.data], first // mmap.PAGESIZE * pages.itemsize)
            pages &= _PRESENT | _EXCLUSIVE
            if (pages == _PRESENT).any() or not pages.any():
                continue  # another process has some, or there are none yet
            if _advise(first, last, _COLLAPSE) == errno.ENOMEM:
                return  # there are no more huge pages


def _advise(start: int, stop: int, advice: int) -> int:
    """Call madvise; return 0 or the error's number."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return ctypes.get_errno() if madvise(start, stop - start, advice) else 0
