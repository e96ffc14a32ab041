"""The races of python -m benchmarks.linear: a layer's rows, packed and not, times vectors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import embpack
from benchmarks.goals import LINEAR_GOALS
from benchmarks.harness import Contestant, Workload
from benchmarks.isas import read_mkl_isa, read_pytorch_isa
from embpack import _native

# Rows that are packed; a table repeats them, for speed is the same whatever its values.
PACKED_ROWS = 500
PEERS = {"nn.Linear, float32": torch.float32, "nn.Linear, bfloat16": torch.bfloat16}
# What an answer may differ by, as a share of the largest: roundings of sums in float32, and of values to bfloat16.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-6}

# A method and its options, by what reports call the table.
Tables = Mapping[str, tuple[str, dict[str, Any]]]


def find_isa(dtype: torch.dtype) -> str:
    """Return the instruction set of nn.Linear's kernels.

    float32 is multiplied by MKL. bfloat16 is by oneDNN, where that is on and the CPU has AVX-512, else by PyTorch.
    """
    if dtype == torch.float32:
        return read_mkl_isa()
    by_onednn = torch.backends.mkldnn.enabled and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "oneDNN's" if by_onednn else read_pytorch_isa()


def make_workloads(
    dims: Sequence[int], counts: Sequence[int], tables: Tables, rows: int, threads: int
) -> Iterator[Workload[Any]]:
    """Make a race for each width, table and number of vectors."""
    rng = np.random.default_rng(0)
    for d in dims:
        weight = rng.standard_normal((PACKED_ROWS, d), dtype=np.float32)
        for name, (method, options) in tables.items():
            table = embpack.quantize(weight, method, **options)
            table = replace(table, packed=np.tile(table.packed, (-(-rows // PACKED_ROWS), 1))[:rows], loss=None)
            layers = {peer: torch.from_numpy(table.dequantize()).to(dtype) for peer, dtype in PEERS.items()}
            for count in counts:
                vectors = rng.standard_normal((count, d), dtype=np.float32)
                yield _make_workload(name, table, layers, vectors, threads)


def _make_workload(
    name: str, table: embpack.PackedTable, layers: dict[str, torch.Tensor], vectors: NDArray[np.float32], threads: int
) -> Workload[Any]:
    count, rows = len(vectors), len(table)

    def make_ready() -> None:
        embpack.set_num_threads(threads)
        torch.set_num_threads(threads)

    def multiply_by(layer: torch.Tensor) -> Callable[[], torch.Tensor]:
        given = torch.from_numpy(vectors).to(layer.dtype)
        return lambda: torch.nn.functional.linear(given, layer)

    ours = Contestant(name, lambda: torch.from_numpy(table.linear(vectors)), rows, make_ready, _native.isa())
    others = [
        Contestant(peer, multiply_by(layer), rows, make_ready, find_isa(layer.dtype), LINEAR_GOALS.get(count))
        for peer, layer in layers.items()
    ]
    settings = {"table": name, "embedding_dim": table.embedding_dim, "rows": rows, "vectors": count, "threads": threads}
    return Workload(settings, ours, others, find_other_products)


def find_other_products(ours: torch.Tensor, theirs: torch.Tensor) -> str | None:
    """Say by how much products differ, if it is more than their type explains."""
    largest = ours.abs().max().item()
    furthest = (ours - theirs.float()).abs().max().item()
    if furthest <= TOLERANCES[theirs.dtype] * largest:
        return None
    return f"products of up to {largest:.4g} are up to {furthest:.2g} apart"
