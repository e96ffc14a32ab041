"""PyTorch: the operators of quantized embedding bags, and the one of float32."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch

from benchmarks.bags import PARAM_BYTES, Bags, widen_codes
from benchmarks.isas import read_pytorch_dispatch
from benchmarks.peers.base import Lookup, Pooler
from embpack import PackedTable


class _PyTorch(Pooler):
    library: ClassVar[str] = "PyTorch"

    def set_num_threads(self, count: int) -> None:
        """Set PyTorch's number."""
        torch.set_num_threads(count)

    def isa(self) -> str:
        """What PyTorch's copy of FBGEMM chooses, for float32 too."""
        return read_pytorch_dispatch().lookup_isa(self.bits)


def _bind(pool: Callable[..., torch.Tensor], packed: torch.Tensor) -> Callable[[Bags], Lookup]:
    """Return what Pooler.load returns, for an operator on packed rows."""

    def bind(bags: Bags) -> Lookup:
        indices, offsets = torch.from_numpy(bags.indices), torch.from_numpy(bags.offsets)
        return lambda: pool(packed, indices, offsets, include_last_offset=True)

    return bind


class FourBits(_PyTorch):
    """Our very bytes: the format is PyTorch's."""

    operator: ClassVar[str] = "torch.ops.quantized.embedding_bag_4bit_rowwise_offsets"
    bits: ClassVar[int] = 4
    copies: ClassVar[int] = 0

    def load(self, tables: Sequence[PackedTable]) -> Callable[[Bags], Lookup]:
        """Share the memory."""
        (table,) = tables
        packed = torch.from_numpy(table.packed)
        return _bind(torch.ops.quantized.embedding_bag_4bit_rowwise_offsets, packed)


class EightBits(_PyTorch):
    """The same codes, a byte each, with float32 scale and bias."""

    operator: ClassVar[str] = "torch.ops.quantized.embedding_bag_byte_rowwise_offsets"
    bits: ClassVar[int] = 8
    copies: ClassVar[int] = 2

    def load(self, tables: Sequence[PackedTable]) -> Callable[[Bags], Lookup]:
        """Widen codes and parameters."""
        (table,) = tables
        params = table.packed[:, -PARAM_BYTES:].copy().view(np.float16).astype(np.float32)
        packed = torch.from_numpy(np.concatenate([widen_codes(table), params.view(np.uint8)], axis=1))
        return _bind(torch.ops.quantized.embedding_bag_byte_rowwise_offsets, packed)


class Fp32(_PyTorch):
    """The values themselves, in memory of PyTorch's own: lines of a row begin where cache lines do."""

    operator: ClassVar[str] = "torch.nn.functional.embedding_bag"
    bits: ClassVar[int] = 32
    copies: ClassVar[int] = 2

    def load(self, tables: Sequence[PackedTable]) -> Callable[[Bags], Lookup]:
        """Decode the table."""
        (table,) = tables
        weight = torch.from_numpy(table.dequantize()).clone()
        pool = torch.nn.functional.embedding_bag

        def bind(bags: Bags) -> Lookup:
            indices, offsets = torch.from_numpy(bags.indices), torch.from_numpy(bags.offsets)
            return lambda: pool(indices, weight, offsets, mode="sum", include_last_offset=True)

        return bind


POOLERS = (FourBits(), EightBits(), Fp32())
