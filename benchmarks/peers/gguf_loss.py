"""GGUF (llama.cpp): blocks of 32 values with a scale, or a scale and a minimum, packed by its formulas.

The bytes of Q4_0 and Q4_1 are those of the package gguf, which packs no IQ4_NL but reads it.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.base import Quantizer, Restored

BLOCK = 32
# What the codes of IQ4_NL stand for.
LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
# IQ4_NL tries so many scales below and above that with the value of largest magnitude at -127.
TRIES = 7

Blocks = NDArray[np.float32]
Packed = NDArray[np.uint8]


def pack_q4_0(blocks: Blocks) -> Packed:
    """Pack [n, 32] with code 0 for the value of largest magnitude and code 8 for 0: [n, 18]."""
    scales = _find_peaks(blocks) / np.float32(-8)
    # Rounded once, as C compilers' fused multiply-adds do, and gguf with them.
    codes = (blocks.astype(np.float64) * _invert(scales) + 8.5).astype(np.float32).astype(np.uint8)
    return _join(np.minimum(codes, 15), scales)


def pack_q4_1(blocks: Blocks) -> Packed:
    """Pack [n, 32] by their ranges: [n, 20]."""
    least = blocks.min(axis=1, keepdims=True)
    scales = (blocks.max(axis=1, keepdims=True) - least) / np.float32(15)
    codes = ((blocks - least) * _invert(scales) + np.float32(0.5)).astype(np.uint8)
    return _join(np.minimum(codes, 15), scales, least)


def pack_iq4_nl(blocks: Blocks, by_squares: bool = True) -> Packed:
    """Pack [n, 32] by the best of 16 scales and the least-squares one of its codes: [n, 18].

    As llama.cpp does without an importance matrix: squared errors count by_squares of the values. Otherwise all alike.
    """
    weights = np.square(blocks) if by_squares else np.ones_like(blocks)
    peaks = _find_peaks(blocks)
    best, gain = np.zeros_like(peaks), np.zeros_like(peaks)
    # The first has the peak at the other end, whose level is nearer to 0.
    for inverse in (-LEVELS[0], *(LEVELS[0] + np.arange(-TRIES, TRIES + 1, dtype=np.float32))):
        levels = LEVELS[_find_nearest(blocks * (inverse * _invert(peaks)))]
        along = (weights * levels * blocks).sum(axis=1, keepdims=True)
        scales = along * _invert((weights * np.square(levels)).sum(axis=1, keepdims=True))
        best = np.where(scales * along > gain, scales, best)
        gain = np.maximum(scales * along, gain)
    return _join(_find_nearest(blocks * _invert(best)), best)


def unpack_q4_0(packed: Packed) -> Blocks:
    """Undo pack_q4_0: [n, 32]."""
    codes, scales = _split(packed, 1)
    return scales * (codes - np.float32(8))


def unpack_q4_1(packed: Packed) -> Blocks:
    """Undo pack_q4_1: [n, 32]."""
    codes, params = _split(packed, 2)
    return params[:, :1] * codes + params[:, 1:]


def unpack_iq4_nl(packed: Packed) -> Blocks:
    """Undo pack_iq4_nl: [n, 32]."""
    codes, scales = _split(packed, 1)
    return scales * LEVELS[codes]


def _find_peaks(blocks: Blocks) -> Blocks:
    """Find the value of largest magnitude of each block, with its sign, [n, 1]."""
    return np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)


def _invert(values: Blocks) -> Blocks:
    return np.divide(np.float32(1), values, out=np.zeros_like(values), where=values != 0)


def _find_nearest(values: Blocks) -> Packed:
    return np.searchsorted((LEVELS[1:] + LEVELS[:-1]) / 2, values, side="right").astype(np.uint8)


def _join(codes: Packed, *params: Blocks) -> Packed:
    """Put float16 parameters before codes, of which a byte has one of the first half and one of the second."""
    halves = codes[:, : BLOCK // 2] | codes[:, BLOCK // 2 :] << np.uint8(4)
    return np.concatenate([*(param.astype("<f2").view(np.uint8) for param in params), halves], axis=1)


def _split(packed: Packed, num_params: int) -> tuple[Packed, Blocks]:
    halves = packed[:, 2 * num_params :]
    params = np.ascontiguousarray(packed[:, : 2 * num_params]).view("<f2").astype(np.float32)
    return np.concatenate([halves & np.uint8(15), halves >> np.uint8(4)], axis=1), params


def _restore(pack: Callable[[Blocks], Packed], unpack: Callable[[Packed], Blocks], weight: Blocks) -> Restored:
    packed = pack(weight.reshape(-1, BLOCK))
    return Restored(unpack(packed).reshape(weight.shape), packed.nbytes)


QUANTIZERS = (
    Quantizer("gguf", "Q4_0", partial(_restore, pack_q4_0, unpack_q4_0), BLOCK),
    Quantizer("gguf", "Q4_1", partial(_restore, pack_q4_1, unpack_q4_1), BLOCK),
    Quantizer("gguf", "IQ4_NL", partial(_restore, pack_iq4_nl, unpack_iq4_nl), BLOCK),
    Quantizer(
        "gguf",
        "IQ4_NL, all errors alike",
        partial(_restore, partial(pack_iq4_nl, by_squares=False), unpack_iq4_nl),
        BLOCK,
    ),
)
