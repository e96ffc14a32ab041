"""How codes of a whole number of bits lie in bytes."""

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint8]


def pack_codes(codes: Codes, bits: int) -> NDArray[np.uint8]:
    """Pack codes [..., d] into bytes [..., ceil(d * bits / 8)], the first code in the lowest bits."""
    per_byte = 8 // bits
    padding = -codes.shape[-1] % per_byte
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, padding)])
    groups = padded.reshape(*codes.shape[:-1], -1, per_byte)
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(groups << shifts, axis=-1)
    return packed


def unpack_codes(packed: NDArray[np.uint8], embedding_dim: int, bits: int) -> Codes:
    """Undo pack_codes: bytes [..., code_bytes] to codes [..., embedding_dim]."""
    shifts = np.arange(8 // bits, dtype=np.uint8) * np.uint8(bits)
    codes = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return codes.reshape(*packed.shape[:-1], -1)[..., :embedding_dim]
