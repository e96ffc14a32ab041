"""The bare loop of touch.cpp, compiled when it is needed."""

import ctypes
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from benchmarks.compiled import load_compiled
from embpack import PackedTable

LINE_BYTES = 64

Touch = Callable[[PackedTable, NDArray[np.int64]], int]


def compile_touch() -> Touch:
    """Compile and load it.

    Returns:
        A call that reads bytes of all cache lines of the rows int64 [L] of a table, and returns the bytes' sum.

    Raises:
        OSError: there is no compiler, or it fails.
    """
    function = load_compiled("touch.cpp").touch
    function.restype = ctypes.c_uint64
    function.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)

    def touch(table: PackedTable, indices: NDArray[np.int64]) -> int:
        return int(function(table.packed.ctypes.data, table.row_bytes, indices.ctypes.data, len(indices)))

    return touch


def sum_touched(table: PackedTable, indices: NDArray[np.int64]) -> int:
    """What touch returns, in NumPy."""
    starts = indices * table.row_bytes
    flat = table.packed.reshape(-1)
    places = [*range(0, table.row_bytes, LINE_BYTES), table.row_bytes - 1]
    return sum(int(flat[starts + place].sum(dtype=np.int64)) for place in places)
