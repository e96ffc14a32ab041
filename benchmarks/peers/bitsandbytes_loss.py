"""bitsandbytes: blocks of 64 values by their largest, and sixteen fixed values."""

from functools import partial

import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from numpy.typing import NDArray

from benchmarks.peers.base import Quantizer, Restored

BLOCK = 64


def _restore(kind: str, compressed: bool, weight: NDArray[np.float32]) -> Restored:
    codes, state = quantize_4bit(
        torch.from_numpy(weight), blocksize=BLOCK, compress_statistics=compressed, quant_type=kind
    )
    nbytes = codes.nbytes + state.absmax.nbytes
    if compressed:  # The largest values have 8 bits themselves, by blocks of 256, and a mean.
        nbytes += state.state2.absmax.nbytes + state.offset.nbytes
    return Restored(dequantize_4bit(codes, state).numpy(), nbytes)


QUANTIZERS = (
    Quantizer("bitsandbytes", "quantize_4bit nf4", partial(_restore, "nf4", False), BLOCK),
    Quantizer("bitsandbytes", "quantize_4bit nf4, compressed", partial(_restore, "nf4", True), BLOCK),
    Quantizer("bitsandbytes", "quantize_4bit fp4", partial(_restore, "fp4", False), BLOCK),
)
