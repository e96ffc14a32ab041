"""embpack.torch.PackedLinear and the operators beneath it, against nn.Linear over the same values."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import embpack
from embpack.torch import PackedEmbedding, PackedEmbeddingBag, PackedLinear

ROWS, DIM = 70, 24
TABLES = {
    "uniform": {"method": "asym"},
    "2 bits": {"method": "asym", "bits": 2},
    "8 bits": {"method": "asym", "bits": 8},
    "float32": {"method": "asym", "param_dtype": "float32"},
    "codebook": {"method": "kmeans-lloyd"},
    "clustered": {"method": "kmeans-cls:K=3"},
    "trellis": {"method": "trellis", "bits": 3.5},
    "rotated": {"method": "asym", "rotate": "hadamard"},
}
# Of products with other sums: float32 sums of DIM values below 16, in another order; and the one rounding of 16 bits,
# of sums below 64, or of rows and sums below that.
ERRORS = {
    torch.float64: 16 * DIM * DIM * 2**-24,
    torch.float32: 16 * DIM * DIM * 2**-24,
    torch.float16: DIM * 16 * 2**-11,
    torch.bfloat16: DIM * 16 * 2**-8,
}


@pytest.fixture(params=TABLES)
def table(request: pytest.FixtureRequest) -> embpack.PackedTable:
    weight = np.random.default_rng(0).standard_normal((ROWS, DIM), dtype=np.float32)
    return embpack.quantize(weight, **TABLES[request.param])


@pytest.fixture
def small_tiles(monkeypatch):
    """Of three rows: the table takes 24 of them."""
    monkeypatch.setattr("embpack.torch.linear_ops._TILE_BYTES", 3 * DIM * 4 // torch.get_num_threads() + DIM)


def vectors(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (65,), (2, 3), (0,), (2, 0, 3)])
def test_values_are_those_of_the_float_layer(table, dtype, shape, small_tiles):
    bias = torch.linspace(-1, 1, ROWS)
    for packed in (PackedLinear.from_table(table, bias), PackedLinear.from_table(table)):
        found = packed(vectors(*shape, dtype=dtype))
        assert found.dtype == dtype and found.shape == (*shape, ROWS) and found.is_contiguous()
        wanted = packed.to_float().double()(vectors(*shape, dtype=dtype).double())
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=ERRORS[dtype])
