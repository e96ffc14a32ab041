"""gguf: llama.cpp's blocks of 32 values, with a scale, and with a scale and a minimum."""

from functools import partial

import numpy as np
from gguf import GGMLQuantizationType, dequantize, quantize
from numpy.typing import NDArray

from benchmarks.peers.base import Quantizer, Restored

BLOCK = 32


def _restore(kind: GGMLQuantizationType, weight: NDArray[np.float32]) -> Restored:
    packed = quantize(weight, kind)
    return Restored(dequantize(packed, kind), packed.nbytes)


QUANTIZERS = (
    Quantizer("gguf", "Q4_0", partial(_restore, GGMLQuantizationType.Q4_0), BLOCK),
    Quantizer("gguf", "Q4_1", partial(_restore, GGMLQuantizationType.Q4_1), BLOCK),
)
