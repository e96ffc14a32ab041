"""FBGEMM: the rows behind TorchRec's tables."""

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.peers.base import Quantizer, Restored
from benchmarks.peers.fbgemm import PEER


def _restore(weight: NDArray[np.float32]) -> Restored:
    packed = torch.from_numpy(PEER.quantizer("asym", weight)())
    return Restored(torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(packed, 4).numpy(), packed.nbytes)


QUANTIZERS = (Quantizer("FBGEMM", "FusedNBitRowwiseQuantizedSBHalf", _restore, 4),)
