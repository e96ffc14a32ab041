"""Files mapped into memory: what packed tables are looked up from."""

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

# Python names it since 3.13. Without it the system may refuse a file that would not fit in memory if written to.
_NORESERVE = 0x4000 if sys.platform == "linux" else 0
# Since 3.13 a map can do without a descriptor of its own.
_UNTRACKED: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
# Python does not name it: what is mapped takes the place of what is at its address.
_FIXED = 0x10
_READ_AND_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
# What systems say of files that cannot be mapped (some of networks and containers), and where a limit is reached.
_REFUSED = {errno.ENODEV, errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.ENOMEM}
# An array from this size on is read at a time, around what is looked up, no more than that. Smaller ones are in memory
# soonest if the system reads around it: 32 to 2,048 pages at a time.
_LARGE_BYTES = 1 << 30


class PrivateMap(mmap.mmap):
    """Pages that are this process's own once they are written to, so that no stray write ends the process."""


# Maps that are there, by their addresses.
_MAPS: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()


def map_file(descriptor: int, size: int) -> mmap.mmap:
    """Map the first size bytes of an open file, for as long as anything views them; size is not 0.

    The map is never to be closed by hand: arrays over it do not stop it from closing under them. It is a PrivateMap
    where that can be.

    Raises:
        OSError: it cannot be mapped; was_refused says whether another place or limit would help.
    """
    try:
        private = mmap.MAP_PRIVATE | _NORESERVE
        return _keep(PrivateMap(descriptor, size, flags=private, prot=_READ_AND_WRITE, **_UNTRACKED))
    except OSError as error:
        if not was_refused(error):
            raise
    # Pages that cannot be written to do not count towards `ulimit -d`, and some file systems map no others.
    return _keep(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ, **_UNTRACKED))


def reserve(size: int) -> mmap.mmap:
    """Take a range of addresses, on which map_over lays parts of files; it takes no memory before it is written to.

    As map_file returns one, it is never to be closed by hand, and is a PrivateMap where that can be.

    Raises:
        OSError: there is none, as map_file says.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    try:
        return _keep(PrivateMap(-1, size, flags=flags, prot=_READ_AND_WRITE))
    except OSError as error:
        if not was_refused(error):
            raise
    return _keep(mmap.mmap(-1, size, flags=flags, prot=mmap.PROT_READ))


def _keep(mapped: mmap.mmap) -> mmap.mmap:
    """Remember a map as long as it is there, and return it."""
    _MAPS[_address(mapped)] = mapped
    return mapped


def _address(mapped: mmap.mmap) -> int:
    return np.frombuffer(mapped, np.uint8).ctypes.data


def map_over(reserved: mmap.mmap, position: int, descriptor: int, offset: int, size: int) -> None:
    """Lay a part of an open file on a part of what reserve has taken, for as long as that is there.

    Args:
        reserved: the range of addresses.
        position: in it, where a page begins.
        descriptor: of the file.
        offset: in the file, where a page begins.
        size: bytes; the rest of the last page is overwritten, too.

    Raises:
        OSError: the file cannot be mapped, as map_file says; the part is of no use then.
    """
    address = _address(reserved) + position
    protection = _READ_AND_WRITE if isinstance(reserved, PrivateMap) else mmap.PROT_READ
    private = mmap.MAP_PRIVATE | _NORESERVE | _FIXED
    if _find_mmap()(address, size, protection, private, descriptor, offset) != address:
        code = ctypes.get_errno()
        # The system may have cleared the place: another thread is not to find it free.
        _find_mmap()(address, size, protection, private | mmap.MAP_ANONYMOUS, -1, 0)
        raise OSError(code, os.strerror(code))


@cache
def _find_mmap() -> Any:
    call = ctypes.CDLL(None, use_errno=True).mmap
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    call.restype = ctypes.c_void_p
    return call


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


def expect_all_reads(array: NDArray[Any]) -> None:
    """Have the system read around what is looked up of a large array, a view of a mapped file, as it does of others."""
    if array.nbytes >= _LARGE_BYTES:
        _advise(array, mmap.MADV_NORMAL)


@contextmanager
def reading_all(*arrays: NDArray[Any]) -> Iterator[None]:
    """While a block reads all of large arrays, views of mapped files, have the system read ahead of it.

    To be told that they will be needed, it would read no more than the first few MB of each. Of two blocks at the same
    time the first one ends it for both.
    """
    large = [array for array in arrays if array.nbytes >= _LARGE_BYTES]
    for array in large:
        _advise(array, mmap.MADV_SEQUENTIAL)
    try:
        yield
    finally:
        for array in large:
            expect_random_reads(array)


def _advise(array: NDArray[Any], advice: int) -> None:
    mapped = _find_map(array)
    if mapped is not None:
        start = array.ctypes.data - _address(mapped)
        first_page = start // mmap.PAGESIZE * mmap.PAGESIZE
        with suppress(OSError):  # an advice that is not taken costs nothing but speed
            mapped.madvise(advice, first_page, start + array.nbytes - first_page)


def _find_map(array: NDArray[Any]) -> mmap.mmap | None:
    """The map that an array is a view of, also where a tensor of PyTorch lies between them, which does not say it."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap):
        return base
    maps = (reference() for reference in _MAPS.valuerefs())
    start = array.ctypes.data
    return next((each for each in maps if each is not None and 0 <= start - _address(each) < len(each)), None)
