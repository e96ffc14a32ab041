"""How many threads the kernels use."""

from embpack import _native


def get_num_threads() -> int:
    """Return the number of threads: OMP_NUM_THREADS or the CPUs available, until set_num_threads."""
    return _native.num_threads()


def set_num_threads(count: int) -> None:
    """Use this many threads, at least 1; small calls use fewer.

    Raises:
        ValueError: count is less than 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}; use at least 1 thread")
    _native.set_num_threads(count)
