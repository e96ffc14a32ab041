"""How many threads the kernels use."""

from operator import index

from embpack import _native

MOST_THREADS = 4096


def get_num_threads() -> int:
    """Return the number of threads: OMP_NUM_THREADS or the CPUs available, until set_num_threads."""
    return _native.num_threads()


def set_num_threads(count: int) -> None:
    """Use this many threads, from 1 to MOST_THREADS; small calls use fewer.

    Raises:
        TypeError: count is no integer.
        ValueError: count is out of range.
    """
    count = index(count)
    if not 1 <= count <= MOST_THREADS:
        raise ValueError(f"count is {count}; use 1 to {MOST_THREADS} threads")
    _native.set_num_threads(count)
