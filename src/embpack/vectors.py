"""What a product with all rows of a table takes: vectors, and one value a row, as the kernels have them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from embpack.rows import ROW_DTYPES, widen


def as_vectors(values: Any, what: str, size: int) -> NDArray[np.float32]:
    """Make an array float32 [..., size], C-contiguous.

    Args:
        values: float32, float16 or bfloat16 (of ml_dtypes, or its bits in uint16); or lists of numbers.
        what: its name, for messages.
        size: of the last axis.

    Raises:
        TypeError: it is of another type.
        ValueError: it has another size.
    """
    array = np.asarray(values) if hasattr(values, "dtype") else np.asarray(values, np.float32)
    if array.dtype.name == "bfloat16":
        array = array.view(np.uint16)
    if array.dtype.newbyteorder("=") not in ROW_DTYPES.values():
        raise TypeError(f"{what} is {array.dtype}; it must be float32, float16 or bfloat16")
    if not array.ndim or array.shape[-1] != size:
        raise ValueError(f"{what} has shape {list(array.shape)}; its last axis must be {size} long")
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return np.ascontiguousarray(native if native.dtype == np.float32 else widen(native))
