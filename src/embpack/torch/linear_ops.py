"""The operators embpack::linear and embpack::linear_by_input: a linear layer whose weight is packed rows.

A table is its tensors and one text (see embpack.torch.ops). Vectors are multiplied by the core, or by PyTorch where
that uses instructions that the core does not, with as many rows at a time as fit the cache, unpacked there. No float
table is made.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embpack.layouts import RowFormat
from embpack.lookups import OUTPUT_DTYPES
from embpack.rotation import rotate, rotate_back
from embpack.table import PackedTable
from embpack.torch.ops import DTYPE_NAMES, SHARED, TABLE, as_table, check_devices, library, refuse_forward_mode

library.define(f"linear({TABLE}, Tensor input, Tensor? bias=None, {SHARED}) -> Tensor")
# The derivative of linear by its input, times a gradient of its output: gradient @ weight.
library.define(f"linear_by_input({TABLE}, Tensor gradient, {SHARED}) -> Tensor")

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# With more vectors, instructions for bfloat16 make up for the time of unpacking.
_MOST_FROM_CODES = 8
# Of the rows, for each thread, that are unpacked at a time: of fewer, threads would take longer to start than to work;
# more would not stay in the cache.
_TILE_BYTES = 1 << 20


def _linear(
    packed: Tensor,
    row_format: str,
    input: Tensor,
    bias: Tensor | None = None,
    clusters: Tensor | None = None,
    codebooks: Tensor | None = None,
) -> Tensor:
    refuse_forward_mode("embpack::linear")
    table = as_table(packed, row_format, clusters, codebooks)
    _check("input", input, table.embedding_dim)
    _check_bias(bias, table.num_embeddings)
    values = input.detach().reshape(-1, table.embedding_dim)
    out = (_multiply_tiles if _are_for_pytorch(values) else _multiply)(table, values, bias)
    return out.reshape(*input.shape[:-1], table.num_embeddings)


def _multiply(table: PackedTable, values: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply vectors straight from the packed bytes, in float32."""
    added = None if bias is None else bias.detach().float().numpy()
    return torch.from_numpy(table.linear(values.float().numpy(), added)).to(values.dtype)


def _multiply_tiles(table: PackedTable, values: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply vectors by PyTorch, by rows that are unpacked some at a time."""
    out = values.new_empty((len(values), table.num_embeddings))
    dtype = values.dtype
    values = _rotate(values) if table.rotation else values
    added = None if bias is None else bias.detach().to(dtype)
    for start, rows in _unpack(table.as_packed, dtype):
        columns = slice(start, start + len(rows))
        product = values @ rows.T if added is None else torch.addmm(added[columns], values, rows.T)
        out[:, columns] = product
    return out


def _are_for_pytorch(values: Tensor) -> bool:
    """Whether PyTorch is to multiply vectors: by instructions for bfloat16, or in float64."""
    return values.dtype == torch.float64 or (
        values.dtype == torch.bfloat16 and len(values) > _MOST_FROM_CODES and _has_bfloat16()
    )


def _linear_by_input(
    packed: Tensor, row_format: str, gradient: Tensor, clusters: Tensor | None = None, codebooks: Tensor | None = None
) -> Tensor:
    refuse_forward_mode("embpack::linear_by_input")
    table = as_table(packed, row_format, clusters, codebooks)
    _check("gradient", gradient, table.num_embeddings)
    # Products of all rows are added up, which is not to be done in 16 bits.
    dtype = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    values = gradient.detach().reshape(-1, table.num_embeddings).to(dtype)
    out = values.new_zeros((len(values), table.embedding_dim))
    for start, rows in _unpack(table.as_packed, dtype):
        out.addmm_(values[:, start : start + len(rows)], rows)
    out = _rotate_back(out) if table.rotation else out
    return out.to(gradient.dtype).reshape(*gradient.shape[:-1], table.embedding_dim)


def _unpack(table: PackedTable, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Unpack a table a few rows at a time: where they start, and the rows, which the next overwrite."""
    name = "float32" if dtype == torch.float64 else DTYPE_NAMES[dtype]
    count = max(1, _TILE_BYTES * torch.get_num_threads() // (table.embedding_dim * torch.float32.itemsize))
    buffer = np.empty((min(count, table.num_embeddings), table.embedding_dim), OUTPUT_DTYPES[name])
    for start in range(0, table.num_embeddings, count):
        indices = np.arange(start, min(start + count, table.num_embeddings))
        rows = buffer[: len(indices)]
        fault = table.native_view.gather(indices, rows)
        if fault != -1:
            raise table.explain_fault(fault, indices)
        yield start, torch.from_numpy(rows).view(getattr(torch, name)).to(dtype)


def _rotate(values: Tensor) -> Tensor:
    """Rotate vectors as rows were, so that rows need not be rotated back: products of the two are the same."""
    return torch.from_numpy(rotate(values.float().numpy())).to(values.dtype)


def _rotate_back(values: Tensor) -> Tensor:
    return torch.from_numpy(rotate_back(values.float().numpy())).to(values.dtype)


@cache
def _has_bfloat16() -> bool:
    """Whether the CPU has instructions that multiply values of bfloat16."""
    known: Any = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def _check(what: str, values: Tensor, size: int) -> None:
    """Raise if the values that rows are multiplied by are of another type or size."""
    if values.dtype not in _FLOATS:
        raise TypeError(f"{what} is {values.dtype}; it must be torch.float32, float16, bfloat16 or float64")
    if not values.ndim or values.shape[-1] != size:
        raise ValueError(f"{what} has shape {list(values.shape)}; the table needs {size} values in its last axis")


def _check_bias(bias: Tensor | None, size: int) -> None:
    if bias is not None and (bias.dtype not in _FLOATS or bias.shape != (size,)):
        raise ValueError(
            f"bias is {bias.dtype} of shape {list(bias.shape)}; it must be a float type of shape [{size}], a value for "
            "each row of the table"
        )


library.impl("linear", _linear, "CPU")
library.impl("linear_by_input", _linear_by_input, "CPU")


def _fake_linear(
    packed: Tensor, row_format: str, input: Tensor, bias: Tensor | None = None, *shared: Tensor | None
) -> Tensor:
    check_devices(packed, input=input, bias=bias)
    _check("input", input, RowFormat.parse(row_format).embedding_dim)
    _check_bias(bias, packed.shape[0])
    refuse_forward_mode("embpack::linear")
    return input.new_empty((*input.shape[:-1], packed.shape[0]))


def _fake_linear_by_input(packed: Tensor, row_format: str, gradient: Tensor, *shared: Tensor | None) -> Tensor:
    check_devices(packed, gradient=gradient)
    _check("gradient", gradient, packed.shape[0])
    refuse_forward_mode("embpack::linear_by_input")
    return gradient.new_empty((*gradient.shape[:-1], RowFormat.parse(row_format).embedding_dim))


torch.library.register_fake("embpack::linear", _fake_linear, lib=library)
torch.library.register_fake("embpack::linear_by_input", _fake_linear_by_input, lib=library)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    packed, row_format, _, bias, clusters, codebooks = inputs
    ctx.row_format = row_format
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(packed, clusters, codebooks)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    packed, clusters, codebooks = ctx.saved_tensors
    by_input = by_bias = None
    if ctx.needs_input_grad[2]:
        by_input = torch.ops.embpack.linear_by_input(packed, ctx.row_format, gradient, clusters, codebooks)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        by_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.bias_dtype)
    return None, None, by_input, by_bias, None, None


def _remember_by_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    packed, row_format, _, clusters, codebooks = inputs
    ctx.row_format = row_format
    ctx.save_for_backward(packed, clusters, codebooks)


def _differentiate_by_input(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    """Its derivative by the gradient that it is given is the layer itself, without its bias."""
    packed, clusters, codebooks = ctx.saved_tensors
    by_gradient = torch.ops.embpack.linear(packed, ctx.row_format, gradient, None, clusters, codebooks)
    return None, None, by_gradient, None, None


torch.library.register_autograd("embpack::linear", _differentiate, setup_context=_remember, lib=library)
torch.library.register_autograd(
    "embpack::linear_by_input", _differentiate_by_input, setup_context=_remember_by_input, lib=library
)
