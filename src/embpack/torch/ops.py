"""The operators embpack::embedding, embpack::embedding_bag and embpack::embedding_bag.weighted.

A table is its tensors and one text. The tensors, all on the CPU, are packed uint8 [num_embeddings, row_bytes] and, if
the layout has arrays beside the rows, clusters uint8 [num_embeddings, bytes of an entry] (little-endian) and codebooks
uint8 [num_codebooks, bytes of a codebook]. The text, str(embpack.layouts.RowFormat), says what the bytes mean:
"uniform:64:4:float16" are layout, embedding_dim, bits and param_dtype; with ":hadamard" after them values are rotated
back. It is one text, and what most tables lack comes last, because each argument takes PyTorch a sixth of a
microsecond.
"""

import math
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from embpack import _native
from embpack.bags import as_row, check_integers, check_mode, check_weights, count_bags
from embpack.layouts import ArraySpec, RowFormat
from embpack.lookups import Table
from embpack.table import PackedTable
from embpack.torch.private import EXCHANGE_API, PYTHON_LIBRARY, handle_of_tensor, in_forward_mode, tensor_of_handle

# What the core calls the types of values; None is the default.
DTYPE_NAMES = {None: "float32", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
TABLE = "Tensor packed, str row_format"
SHARED = "Tensor? clusters=None, Tensor? codebooks=None"
# With a default other than None, AOTInductor could not load what it compiles.
DTYPE = "ScalarType? dtype=None"
LAST = f"bool include_last_offset=False, int? padding_idx=None, {DTYPE}"

# The arguments of an operator are passed on as they come.
_gather_tensors: Any = _native.gather_tensors
_pool_tensors: Any = _native.pool_tensors

_make_library: Any = torch.library.Library  # which has no types
library = _make_library("embpack", "DEF")
library.define(f"embedding({TABLE}, Tensor indices, {SHARED}, *, {DTYPE}) -> Tensor")
library.define(f"embedding_bag({TABLE}, Tensor indices, Tensor? offsets, str mode, {SHARED}, *, {LAST}) -> Tensor")
# Only sums of weighted rows can have gradients. They have an operator of their own, so that all else is spared the time
# that autograd takes.
library.define(
    f"embedding_bag.weighted({TABLE}, Tensor indices, Tensor? offsets, Tensor per_sample_weights, {SHARED}, *, {LAST}) "
    "-> Tensor"
)


def as_table(
    packed: Tensor, row_format: str, clusters: Tensor | None = None, codebooks: Tensor | None = None
) -> PackedTable:
    """Make a PackedTable of a table's tensors, sharing their memory.

    Raises:
        ValueError: they are not a table's (see PackedTable).
    """
    by_row, shared = (None if entries is None else entries.numpy() for entries in (clusters, codebooks))
    return table_of_arrays(row_format, packed.numpy(), by_row, shared)


def table_of_arrays(
    row_format: str,
    packed: NDArray[Any],
    clusters: NDArray[Any] | None = None,
    codebooks: NDArray[Any] | None = None,
    *,
    dtype: str = "float32",
) -> PackedTable:
    """Make a PackedTable of arrays that are as a table's tensors, sharing their memory.

    Raises:
        ValueError: they are not a table's (see PackedTable).
    """
    parsed = RowFormat.parse(row_format)
    by_row, shared = parsed.form.by_row(len(packed)), parsed.form.shared()
    return PackedTable(
        packed, parsed, dtype, clusters=_as_array(clusters, by_row), codebooks=_as_array(codebooks, shared)
    )


def dequantize(table: Table, dtype: torch.dtype) -> Tensor:
    """All rows of a table as a tensor, of a type that operators return."""
    if dtype == torch.float64:
        return dequantize(table, torch.float32).double()
    rows = torch.from_numpy(table.dequantize(DTYPE_NAMES[dtype]))
    return rows.view(dtype) if dtype == torch.bfloat16 else rows  # NumPy has its bits in uint16


def _as_array(array: NDArray[Any] | None, spec: ArraySpec | None) -> NDArray[Any] | None:
    """View the bytes of what lies beside rows as the array that it should be; as it is if it cannot be that."""
    if array is None or spec is None:
        return array
    of_entry: tuple[Any, ...] = spec.shape[1:]
    for dtype in spec.dtypes:
        if array.shape[1:] == (math.prod(of_entry) * dtype.itemsize,):
            return array.view(dtype).reshape(len(array), *of_entry)
    return array


def _embedding(
    packed: Tensor,
    row_format: str,
    indices: Tensor,
    clusters: Tensor | None = None,
    codebooks: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    try:
        found: Tensor | int = _gather_tensors(packed, clusters, codebooks, row_format, indices, DTYPE_NAMES[dtype])
    except (KeyError, ValueError):
        if dtype == torch.float64:
            return _embedding(packed, row_format, indices, clusters, codebooks).double()
        check_types(dtype, indices=indices)
        as_table(packed, row_format, clusters, codebooks)
        if indices.is_contiguous():
            raise
        return _embedding(packed, row_format, indices.contiguous(), clusters, codebooks, dtype=dtype)
    if isinstance(found, int):
        table = as_table(packed, row_format, clusters, codebooks)
        raise table.explain_fault(found, indices.reshape(-1).numpy())
    return found


def _embedding_bag(
    packed: Tensor,
    row_format: str,
    indices: Tensor,
    offsets: Tensor | None,
    mode: str,
    clusters: Tensor | None = None,
    codebooks: Tensor | None = None,
    *,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    dtype: torch.dtype | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    padding = -1 if padding_idx is None else as_row(padding_idx, len(packed))
    try:
        found: Tensor | int = _pool_tensors(
            packed,
            clusters,
            codebooks,
            row_format,
            indices,
            offsets,
            mode,
            weights,
            include_last_offset,
            padding,
            DTYPE_NAMES[dtype],
        )
    except (KeyError, ValueError):
        check_mode(mode)
        count_bags(indices, offsets, include_last_offset=include_last_offset)
        check_types(dtype, indices=indices, offsets=offsets)
        as_table(packed, row_format, clusters, codebooks)
        values, starts = _make_alike(indices, offsets)
        if values is indices and starts is offsets and dtype != torch.float64:
            raise
        again = _embedding_bag(
            packed,
            row_format,
            values,
            starts,
            mode,
            clusters,
            codebooks,
            include_last_offset=include_last_offset,
            padding_idx=padding_idx,
            dtype=None if dtype == torch.float64 else dtype,
            weights=weights,
        )
        found = again.double() if dtype == torch.float64 else again
    if isinstance(found, int):
        starts_array = None if offsets is None else offsets.numpy()
        table = as_table(packed, row_format, clusters, codebooks)
        raise table.explain_fault(found, indices.reshape(-1).numpy(), starts_array)
    return found


def _weighted_embedding_bag(
    packed: Tensor, row_format: str, indices: Tensor, offsets: Tensor | None, weights: Tensor, *shared: Any, **how: Any
) -> Tensor:
    refuse_forward_mode()
    check_weights(weights, indices)
    weights = weights.detach().contiguous()
    return _embedding_bag(packed, row_format, indices, offsets, "sum", *shared, weights=weights, **how)


def _make_alike(indices: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Make indices and offsets contiguous and of one type, as the core has them; themselves if they are."""
    if offsets is None:
        return indices.contiguous(), None
    if offsets.dtype != indices.dtype:
        indices, offsets = indices.long(), offsets.long()
    return indices.contiguous(), offsets.contiguous()


def refuse_forward_mode(what: str = "a lookup with per_sample_weights") -> None:
    """Raise NotImplementedError in forward mode: PyTorch calls operators without the derivatives that come in."""
    if in_forward_mode():
        raise NotImplementedError(f"forward-mode derivatives (torch.func.jvp, jacfwd) of {what}; use backward()")


def check_types(dtype: torch.dtype | None, **integers: Tensor | None) -> None:
    """Say what is wrong with types better than the core, which has refused the arguments, if it is they."""
    check_dtype(dtype)
    for what, values in integers.items():
        if values is not None:
            check_integers(what, values)


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise ValueError if operators do not return values of a type."""
    if dtype not in DTYPE_NAMES and dtype != torch.float64:
        raise ValueError(f"dtype is {dtype}; choose torch.float32, float16, bfloat16 or float64")


_native.use_exchange_api(EXCHANGE_API)
_native.register_operators(PYTHON_LIBRARY, tensor_of_handle, handle_of_tensor, _embedding, _embedding_bag)
library.impl("embedding_bag.weighted", _weighted_embedding_bag, "CPU")
# Nothing in them has gradients, and looking for some takes PyTorch a third of a microsecond.
library.impl("embedding", torch.library.fallthrough_kernel, "Autograd")
library.impl("embedding_bag", torch.library.fallthrough_kernel, "Autograd")


def check_devices(table: Tensor, **arguments: Tensor | None) -> None:
    """Raise ValueError if an argument is not on the table's device."""
    for name, tensor in arguments.items():
        if tensor is not None and table.device != tensor.device:
            raise ValueError(f"the table is on {table.device}, {name} on {tensor.device}; both must be on the CPU")


def make_fake(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
    """Make what stands for values: on the device of a tensor, float32 unless said otherwise."""
    return torch.empty(shape, dtype=dtype or torch.float32, device=like.device)  # None is PyTorch's default type there


def _fake_embedding(
    packed: Tensor, row_format: str, indices: Tensor, *shared: Any, dtype: torch.dtype | None = None
) -> Tensor:
    check_devices(packed, indices=indices)
    return make_fake(packed, (*indices.shape, RowFormat.parse(row_format).embedding_dim), dtype)


def _fake_bags(
    packed: Tensor,
    row_format: str,
    indices: Tensor,
    offsets: Tensor | None,
    mode_or_weights: str | Tensor,
    *shared: Any,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    check_devices(packed, indices=indices, offsets=offsets)
    if isinstance(mode_or_weights, Tensor):
        check_devices(packed, per_sample_weights=mode_or_weights)
        refuse_forward_mode()
        check_weights(mode_or_weights, indices)
    num_bags = count_bags(indices, offsets, include_last_offset=include_last_offset)
    return make_fake(packed, (num_bags, RowFormat.parse(row_format).embedding_dim), dtype)


torch.library.register_fake("embpack::embedding", _fake_embedding, lib=library)
torch.library.register_fake("embpack::embedding_bag", _fake_bags, lib=library)
torch.library.register_fake("embpack::embedding_bag.weighted", _fake_bags, lib=library)


def _remember(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    packed, row_format, indices, offsets, _, clusters, codebooks = inputs
    ctx.row_format = row_format
    ctx.padding_idx = keyword_only_inputs["padding_idx"]
    ctx.save_for_backward(packed, indices, offsets, clusters, codebooks)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    """The derivative by a weight is the product of its row and its bag's gradient."""
    packed, indices, offsets, clusters, codebooks = ctx.saved_tensors
    rows = torch.ops.embpack.embedding(packed, ctx.row_format, indices, clusters, codebooks)
    if offsets is None:
        of_rows = gradient.unsqueeze(1)
    else:
        positions = torch.arange(indices.shape[0], dtype=offsets.dtype)
        of_rows = gradient[torch.searchsorted(offsets.contiguous(), positions, right=True) - 1]
    by_weights = (rows * of_rows).sum(-1)
    if ctx.padding_idx is not None:
        by_weights = by_weights.masked_fill(indices == ctx.padding_idx % packed.shape[0], 0)
    return (None, None, None, None, by_weights, None, None)


torch.library.register_autograd("embpack::embedding_bag.weighted", _differentiate, setup_context=_remember, lib=library)
