"""Modules of PyTorch and TorchRec that pool bags, over the values of packed tables."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import EmbeddingBag as QuantizedEmbeddingBag

from benchmarks.bags import PARAM_BYTES
from benchmarks.isas import read_fbgemm_dispatch, read_pytorch_dispatch
from embpack import PackedTable, _native
from embpack.torch import PackedEmbeddingBag, PackedEmbeddingBagCollection

Bag = Callable[[Tensor, Tensor], Tensor]


def make_ours(table: PackedTable) -> Bag:
    """PackedEmbeddingBag, for sums."""
    return PackedEmbeddingBag.from_table(table, mode="sum", include_last_offset=True)


def make_float(table: PackedTable) -> Bag:
    """nn.EmbeddingBag over float32 values, in memory of PyTorch's own."""
    weight = torch.from_numpy(table.dequantize()).clone()
    return nn.EmbeddingBag.from_pretrained(weight, mode="sum", include_last_offset=True)


def make_quantized(table: PackedTable) -> Bag:
    """torch.ao.nn.quantized.EmbeddingBag, 4 bits, with the same codes: those of the values on their own grid."""
    params = torch.from_numpy(table.packed[:, -PARAM_BYTES:].copy().view(np.float16).astype(np.float32))
    scale, bias = params[:, 0].contiguous(), params[:, 1]
    weight = torch.from_numpy(table.dequantize())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor, .* are deprecated", UserWarning)
        quantized = torch.quantize_per_channel(weight, scale, -bias / scale, 0, torch.quint4x2)
    return QuantizedEmbeddingBag(
        *table.shape, mode="sum", include_last_offset=True, dtype=torch.quint4x2, _weight=quantized
    )


FLOAT_BAG = "nn.EmbeddingBag fp32"
# By what reports call them, ours first.
BAGS: dict[str, Callable[[PackedTable], Bag]] = {
    "embpack PackedEmbeddingBag": make_ours,
    FLOAT_BAG: make_float,
    "PyTorch quantized.EmbeddingBag": make_quantized,
}


def find_isa(name: str) -> str:
    """Return the instruction set of a module's kernels: ours, FBGEMM's, or those of PyTorch's copy of FBGEMM."""
    if name.startswith("embpack"):
        return _native.isa()
    if name.startswith("TorchRec quant"):
        return read_fbgemm_dispatch().lookup_isa(4)
    return read_pytorch_dispatch().lookup_isa(32 if name.endswith("fp32") else 4)


def make_collections(tables: Sequence[PackedTable]) -> dict[str, Callable[[Any], Any]]:
    """Make PackedEmbeddingBagCollection and TorchRec's two, of KeyedJaggedTensors whose keys are the tables' numbers.

    Raises:
        ImportError: TorchRec is not installed.
    """
    from torchrec.modules.embedding_configs import EmbeddingBagConfig  # type: ignore[import-untyped]

    from embpack.torchrec import from_tables

    named = {str(number): table for number, table in enumerate(tables)}
    ours = PackedEmbeddingBagCollection(
        {name: PackedEmbeddingBag.from_table(table, mode="sum") for name, table in named.items()}
    )
    configs = [
        EmbeddingBagConfig(
            name=name,
            feature_names=[name],
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
        )
        for name, table in named.items()
    ]
    return {
        "embpack PackedEmbeddingBagCollection": ours,
        "TorchRec quant, our bytes": from_tables(named, configs),
        "TorchRec fp32": ours.to_float(),
    }
