"""Files mapped into memory: what packed tables are looked up from."""

import errno
import mmap
import sys
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Python names it since 3.13. Without it the system may refuse a file that would not fit in memory if written to.
_NORESERVE = 0x4000 if sys.platform == "linux" else 0
# Since 3.13 a map can do without a descriptor of its own.
_UNTRACKED: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
# What systems say of files that cannot be mapped (some of networks and containers), and where a limit is reached.
_REFUSED = {errno.ENODEV, errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.ENOMEM}
# An array from this size on is read at a time, around what is looked up, no more than that. Smaller ones are in memory
# soonest if the system reads around it: 32 to 2,048 pages at a time.
_LARGE_BYTES = 1 << 30


class PrivateMap(mmap.mmap):
    """Pages that are this process's own once they are written to, so that no stray write ends the process."""


def map_file(descriptor: int, size: int) -> mmap.mmap:
    """Map the first size bytes of an open file, for as long as anything views them; size is not 0.

    The map is never to be closed by hand: arrays over it do not stop it from closing under them. It is a PrivateMap
    where that can be.

    Raises:
        OSError: it cannot be mapped; was_refused says whether another place or limit would help.
    """
    try:
        private = mmap.MAP_PRIVATE | _NORESERVE
        return PrivateMap(descriptor, size, flags=private, prot=mmap.PROT_READ | mmap.PROT_WRITE, **_UNTRACKED)
    except OSError as error:
        if not was_refused(error):
            raise
    # Pages that cannot be written to do not count towards `ulimit -d`, and some file systems map no others.
    return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ, **_UNTRACKED)


def was_refused(error: OSError) -> bool:
    """Whether the system maps no such file, or no more of them."""
    return error.errno in _REFUSED


def is_mapped(array: NDArray[Any]) -> bool:
    """Whether an array is a view of a PrivateMap: writing to its memory is safe, and does not reach the file."""
    return isinstance(_find_map(array), PrivateMap)


def is_of_file(array: NDArray[Any]) -> bool:
    """Whether an array is a view of a mapped file."""
    return _find_map(array) is not None


def expect_random_reads(array: NDArray[Any]) -> None:
    """Have the system read no more of a large array, a view of a mapped file, than is looked up."""
    if array.nbytes >= _LARGE_BYTES:
        _advise(array, mmap.MADV_RANDOM)


def read_ahead(array: NDArray[Any]) -> None:
    """Have the system read all of a large array, if it is a view of a mapped file, before it is asked for it."""
    if array.nbytes >= _LARGE_BYTES:
        _advise(array, mmap.MADV_WILLNEED)


def _advise(array: NDArray[Any], advice: int) -> None:
    mapped = _find_map(array)
    if mapped is not None:
        start = array.ctypes.data - np.frombuffer(mapped, np.uint8).ctypes.data
        first_page = start // mmap.PAGESIZE * mmap.PAGESIZE
        with suppress(OSError):  # an advice that is not taken costs nothing but speed
            mapped.madvise(advice, first_page, start + array.nbytes - first_page)


def _find_map(array: NDArray[Any]) -> mmap.mmap | None:
    """The map that an array is a view of."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) else None
