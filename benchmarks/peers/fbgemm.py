"""FBGEMM: the quantizer behind TorchRec's tables."""

from collections.abc import Callable
from typing import ClassVar

import fbgemm_gpu  # type: ignore[import-untyped]  # noqa: F401 (registers the operator)
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.isas import read_fbgemm_dispatch
from benchmarks.peers.base import Packed, Peer


class Fbgemm(Peer):
    """torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf, which has no search."""

    name: ClassVar[str] = "FBGEMM"
    methods: ClassVar[frozenset[str]] = frozenset({"asym"})

    def set_num_threads(self, count: int) -> None:
        """Set PyTorch's number, under which FBGEMM runs."""
        torch.set_num_threads(count)

    def isa(self, method: str) -> str:
        """What FBGEMM's quantizers choose."""
        return read_fbgemm_dispatch().packing_isa

    def quantizer(self, method: str, weight: NDArray[np.float32]) -> Callable[[], Packed]:
        """Min/max."""
        rows = torch.from_numpy(weight)
        return lambda: torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(rows, 4).numpy()


PEER = Fbgemm()
