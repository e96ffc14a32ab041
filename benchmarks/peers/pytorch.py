"""PyTorch: the operator that packs the tables of quantized embedding bags."""

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.isas import read_pytorch_dispatch
from benchmarks.peers.base import Packed, Peer


class PyTorch(Peer):
    """torch.ops.quantized.embedding_bag_4bit_prepack, whose flag turns the greedy search on."""

    name: ClassVar[str] = "PyTorch"
    methods: ClassVar[frozenset[str]] = frozenset({"asym", "greedy"})

    def set_num_threads(self, count: int) -> None:
        """Set PyTorch's number."""
        torch.set_num_threads(count)

    def isa(self, method: str) -> str:
        """The search is compiled for any CPU; minimum and maximum are FBGEMM's."""
        return "portable" if method == "greedy" else read_pytorch_dispatch().packing_isa

    def quantizer(self, method: str, weight: NDArray[np.float32]) -> Callable[[], Packed]:
        """Min/max or greedy."""
        rows, search = torch.from_numpy(weight), method == "greedy"
        return lambda: torch.ops.quantized.embedding_bag_4bit_prepack(rows, search).numpy()


PEER = PyTorch()
