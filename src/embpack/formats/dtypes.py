"""Types of tensors by their safetensors names, and how NumPy holds them."""

import math
from typing import Any

import numpy as np

_NATIVE = {
    "BOOL": "?",
    "I8": "i1",
    "I16": "i2",
    "I32": "i4",
    "I64": "i8",
    "U8": "u1",
    "U16": "u2",
    "U32": "u4",
    "U64": "u8",
    "F16": "f2",
    "F32": "f4",
    "F64": "f8",
    "C64": "c8",
}
_BITS_OF_RAW = {
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}

NUMPY_DTYPES = {name: np.dtype(code) for name, code in _NATIVE.items()}
"""Types that NumPy has."""

ARRAY_DTYPES = NUMPY_DTYPES | {
    name: np.dtype(np.uint16 if bits == 16 else np.uint8) for name, bits in _BITS_OF_RAW.items()
}
"""What a tensor's arrays are: NumPy's own type, or its raw bits as uint16 or uint8."""

PACKED_DTYPES = frozenset(name for name, bits in _BITS_OF_RAW.items() if bits < 8)
"""Types smaller than a byte: their arrays are the tensor's bytes, 1-D."""


def name_dtype(dtype: np.dtype[Any]) -> str | None:
    """Name a NumPy type of any byte order; None where safetensors has no such type."""
    native = dtype.newbyteorder("=")
    return next((name for name, numpy_dtype in NUMPY_DTYPES.items() if numpy_dtype == native), None)


def count_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    if dtype in PACKED_DTYPES:
        return math.prod(shape) * _BITS_OF_RAW[dtype] // 8
    return math.prod(shape) * int(ARRAY_DTYPES[dtype].itemsize)


def is_whole(dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is whole bytes."""
    return dtype not in PACKED_DTYPES or math.prod(shape) * _BITS_OF_RAW[dtype] % 8 == 0
