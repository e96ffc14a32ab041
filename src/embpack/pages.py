"""Huge pages: where packed bytes lie, and how lookups of rows that no cache holds get faster by it.

A CPU knows the places of some thousand pages. Tables in pages of 4 KB need more, so a lookup waits for the place of a
row as well as for the row; in pages of 2 MB it waits for the row alone. Linux gives huge pages to those who ask
(transparent huge pages, `madvise`). NumPy asks for large arrays that it allocates; PyTorch and malloc do not.
"""

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_BYTES = 1 << 17
"""Bytes of an array from which on it is put in huge pages: many tables may share one, and smaller ones weigh little."""

_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage")
_ADVISE, _COLLAPSE = 14, 25  # MADV_HUGEPAGE; MADV_COLLAPSE, since Linux 6.1, which Python does not name
# Read of /proc/self/pagemap at a time.
_PIECE_BYTES = 1 << 26
# What /proc/self/pagemap says of a page: it is there; it is a file's or shared memory's; no other process has it.
_PRESENT, _OF_FILE, _EXCLUSIVE = (np.uint64(1 << bit) for bit in (63, 61, 56))


def ask_for_huge_pages(array: NDArray[Any]) -> None:
    """Have Linux give an array huge pages as it is filled: one that was just allocated, and not by NumPy, which asks.

    use_huge_pages moves what malloc has had filled before.
    """
    with suppress(OSError, ValueError):  # as below
        huge = _find_huge_bytes()
        start, stop = -(-array.ctypes.data // huge) * huge, (array.ctypes.data + array.nbytes) // huge * huge
        if start < stop:
            _advise(start, stop, _ADVISE)


def use_huge_pages(*arrays: NDArray[Any]) -> None:
    """Have Linux put the memory of filled arrays in huge pages, at once where it can; values and addresses stay.

    Only memory that is there and this process's alone is moved: neither mapped files nor memory that is shared, be it
    with a process that was forked. What shares a huge page with an array moves along, if it is of that kind. No more
    memory is taken for it. Nothing is done where the system's administrator has switched huge pages off, and what fails
    costs nothing but speed.
    """
    for array in arrays:
        if array.nbytes >= MIN_BYTES and array.flags.c_contiguous:
            with suppress(OSError, ValueError):  # a system without the files that are read, or with others
                _move(array.ctypes.data, array.ctypes.data + array.nbytes, _find_huge_bytes())


def _find_huge_bytes() -> int:
    """Bytes of a huge page.

    Raises:
        OSError: there are none.
    """
    if sys.platform != "linux" or "[never]" in (_SYSTEM / "enabled").read_text():
        raise OSError(errno.ENOSYS, "no huge pages")
    return int((_SYSTEM / "hpage_pmd_size").read_text())


def _move(start: int, stop: int, huge: int) -> None:
    """Copy the small pages at a range of addresses into huge ones."""
    first, last = start // huge * huge, -(-stop // huge) * huge
    private = list(_find_private(first, last, huge))
    mapped = list(_find_mapped(first, last)) if private else []
    for low, high in private:
        if any(low < end and high > begin for begin, end in mapped):
            continue
        for page in range(low, high, huge):  # by itself: Linux goes no further than one that it cannot move
            code = _advise(page, page + huge, _COLLAPSE)
            if code == errno.ENOMEM:
                return  # there are no more huge pages
            if code == errno.EINVAL and not _knows(_COLLAPSE) and start <= page and page + huge <= stop:
                _advise(page, page + huge, _ADVISE)  # an older kernel, which moves later what is the array's alone


def _find_private(start: int, stop: int, huge: int) -> Iterator[tuple[int, int]]:
    """Find the parts of a range, in huge pages, all of whose pages are there and this process's alone."""
    piece = max(_PIECE_BYTES, huge)
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        for first in range(start, stop, piece):
            pages = np.zeros((min(piece, stop - first)) // mmap.PAGESIZE, np.uint64)
            os.preadv(pagemap.fileno(), [pages.data], first // mmap.PAGESIZE * pages.itemsize)
            is_private = (pages & (_PRESENT | _OF_FILE | _EXCLUSIVE)) == _PRESENT | _EXCLUSIVE
            can_move = is_private.reshape(-1, huge // mmap.PAGESIZE).all(axis=1)
            for low, high in np.flatnonzero(np.diff(can_move, prepend=False, append=False)).reshape(-1, 2).tolist():
                yield first + low * huge, first + high * huge


def _find_mapped(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Find the maps of files in a range of addresses: a page of one that was written to is private, too."""
    for line in Path("/proc/self/maps").read_bytes().splitlines():  # in the order of addresses
        low, _, rest = line.partition(b"-")
        if int(low, 16) >= stop:
            return
        high, _, _, _, inode = rest.split(maxsplit=5)[:5]
        if int(high, 16) > start and inode != b"0":
            yield int(low, 16), int(high, 16)


def _knows(advice: int) -> bool:
    """Whether the kernel knows an advice: for no bytes it refuses only what it does not know."""
    return _advise(0, 0, advice) == 0


def _advise(start: int, stop: int, advice: int) -> int:
    """Call madvise; return 0 or the error's number."""
    return ctypes.get_errno() if _find_madvise()(start, stop - start, advice) else 0


@cache
def _find_madvise() -> Any:
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise
