"""PyTorch: rows of quantized embedding bags, by their range and by the greedy search."""

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.peers.base import Quantizer, Restored
from benchmarks.peers.pytorch import PEER


def _restore(method: str, weight: NDArray[np.float32]) -> Restored:
    packed = torch.from_numpy(PEER.quantizer(method, weight)())
    return Restored(torch.ops.quantized.embedding_bag_4bit_unpack(packed).numpy(), packed.nbytes)


QUANTIZERS = (
    Quantizer("PyTorch", "embedding_bag_4bit_prepack", lambda weight: _restore("asym", weight), 2),
    Quantizer("PyTorch", "embedding_bag_4bit_prepack, greedy", lambda weight: _restore("greedy", weight), 2),
)
