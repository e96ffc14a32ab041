"""FBGEMM: the table-batched embeddings behind TorchRec's quantized modules."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import fbgemm_gpu  # type: ignore[import-untyped]  # noqa: F401 (registers the operators)
import torch
from fbgemm_gpu.split_embedding_configs import SparseType  # type: ignore[import-untyped]
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation  # type: ignore[import-untyped]
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (  # type: ignore[import-untyped]
    IntNBitTableBatchedEmbeddingBagsCodegen,
)

from benchmarks.bags import Bags, split_rows, widen_codes
from benchmarks.isas import read_fbgemm_dispatch
from benchmarks.peers.base import Lookup, Pooler
from embpack import PackedTable


class _Fbgemm(Pooler):
    library: ClassVar[str] = "FBGEMM"
    operator: ClassVar[str] = "IntNBitTableBatchedEmbeddingBagsCodegen"
    copies: ClassVar[int] = 3  # What it is given, and its own, laid out and then filled.
    takes_groups: ClassVar[bool] = True

    def set_num_threads(self, count: int) -> None:
        """Set PyTorch's number, under which FBGEMM runs."""
        torch.set_num_threads(count)

    def isa(self) -> str:
        """What FBGEMM chooses."""
        return read_fbgemm_dispatch().lookup_isa(self.bits)

    def load(self, tables: Sequence[PackedTable]) -> Callable[[Bags], Lookup]:
        """Give it our codes, scales and biases, with rows as close together as ours."""
        weights_type = {4: SparseType.INT4, 8: SparseType.INT8}[self.bits]
        place = EmbeddingLocation.HOST
        lookup = IntNBitTableBatchedEmbeddingBagsCodegen(
            [("", table.num_embeddings, table.embedding_dim, weights_type, place) for table in tables],
            device="cpu",
            output_dtype=SparseType.FP32,
            row_alignment=1,
        )
        lookup.initialize_weights()
        lookup.assign_embedding_weights([self._take_apart(table) for table in tables])

        def bind(bags: Bags) -> Lookup:
            indices, offsets = (torch.from_numpy(array).int() for array in (bags.indices, bags.offsets))
            return lambda: lookup(indices, offsets)

        return bind

    def _take_apart(self, table: PackedTable) -> tuple[torch.Tensor, torch.Tensor]:
        codes, params = split_rows(table)
        return torch.from_numpy(codes if self.bits == 4 else widen_codes(table)), torch.from_numpy(params)


class FourBits(_Fbgemm):
    """INT4."""

    bits: ClassVar[int] = 4


class EightBits(_Fbgemm):
    """INT8."""

    bits: ClassVar[int] = 8


POOLERS = (FourBits(), EightBits())
