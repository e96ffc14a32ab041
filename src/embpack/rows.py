"""Weights as the kernels take them: contiguous rows of float32, float16 or bfloat16."""

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embpack.errors import kind_of

# NumPy has no bfloat16: its bits travel as uint16.
ROW_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
}
# Their names, where NumPy's own take longer to find than some hundred rows to pack.
_NAMES = {dtype: name for name, dtype in ROW_DTYPES.items() if dtype.name == name}
# The largest finite value of a type.
LARGEST = {"float16": np.float32(65504), "bfloat16": np.uint32(0x7F7F0000).view(np.float32)}


def as_rows(weight: Any) -> tuple[NDArray[Any], str]:
    """View a table as an array that the kernels know the type of.

    Args:
        weight: [num_embeddings, embedding_dim] of float32, float16 or bfloat16; NumPy (bfloat16 from ml_dtypes)
            or PyTorch, contiguous or not, of any byte order, on any device.

    Returns:
        The array, bfloat16 as uint16, without a copy where that is possible; and the name of its type.

    Raises:
        TypeError: it is of another type, or a tensor whose values are not simply in memory: sparse, quantized, spread
            over processes.
        ValueError: it is not 2-D, has no rows or no columns, or is on PyTorch's meta device.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(weight, torch.Tensor):
        _check_tensor(weight, torch)
        weight = weight.detach().cpu().resolve_neg()
        if weight.dtype == torch.bfloat16:
            return _check_shape(weight.view(torch.uint16).numpy()), "bfloat16"
        weight = weight.numpy()
    array = np.asarray(weight)
    name = _NAMES.get(array.dtype) or array.dtype.name
    if name not in ROW_DTYPES:
        raise _explain_type(name, "weight.astype(numpy.float32)" if array.dtype.kind in "fiu" else None)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return _check_shape(array.view(np.uint16) if name == "bfloat16" else array), name


def _check_tensor(weight: Any, torch: Any) -> None:
    """Refuse a PyTorch tensor whose values are not simply in memory, and say what makes one of which they are."""
    if weight.is_meta:
        raise ValueError("weight is on the meta device and has no values; load them first")
    if hasattr(weight, "full_tensor"):
        raise _explain_type(f"{kind_of(weight)}, spread over processes", "weight.full_tensor()")
    if weight.is_quantized:
        raise _explain_type(str(weight.dtype).removeprefix("torch."), "weight.dequantize()")
    if weight.is_nested:
        raise ValueError("weight is nested, but a table is 2-D: [num_embeddings, embedding_dim]")
    if weight.layout != torch.strided:
        raise _explain_type(str(weight.layout).removeprefix("torch."), "weight.to_dense()")
    name = str(weight.dtype).removeprefix("torch.")
    if name not in ROW_DTYPES:
        raise _explain_type(name, None if weight.dtype.is_complex else "weight.float()")
    if hasattr(weight, "__tensor_flatten__"):  # what such a tensor is made of is not its values, as torchao's
        raise _explain_type(kind_of(weight), "weight.dequantize()")


def _explain_type(found: str, conversion: str | None) -> TypeError:
    hint = f"; convert it with {conversion}" if conversion else ""
    return TypeError(f"weight is {found}, but a table is float32, float16 or bfloat16{hint}")


def _check_shape(array: NDArray[Any]) -> NDArray[Any]:
    if array.ndim != 2:
        raise ValueError(f"weight has shape {list(array.shape)}, but a table is 2-D: [num_embeddings, embedding_dim]")
    if 0 in array.shape:
        raise ValueError(f"weight has shape {list(array.shape)}; a table needs at least one row and one column")
    return array


def widen(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Make rows float32; uint16 is taken for bfloat16."""
    if rows.dtype == np.uint16:
        return (rows.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return rows.astype(np.float32)


def narrow(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Round float32 values to a type in ROW_DTYPES, to nearest, ties to even; bfloat16 comes as uint16.

    A finite value that the type cannot hold becomes its largest: a level may lie a little outside the range of the
    weights, which were finite. Infinities and NaN stay.
    """
    if dtype == "float32":
        return values
    values = np.where(np.isfinite(values), np.clip(values, -LARGEST[dtype], LARGEST[dtype]), values)
    if dtype == "float16":
        return values.astype(np.float16)
    bits = values.view(np.uint32)
    rounded = bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))
    return (np.where(np.isnan(values), bits | np.uint32(0x400000), rounded) >> np.uint32(16)).astype(np.uint16)


def spread_rows(num_embeddings: int, count: int) -> NDArray[np.int64]:
    """Choose rows evenly: the middle one of each of `count` equal parts, int64 [count]."""
    return (2 * np.arange(count, dtype=np.int64) + 1) * num_embeddings // (2 * count)


def explain_not_finite(row: NDArray[np.float32], name: str, number: int) -> ValueError:
    """Make the error of a row, float32 [embedding_dim], of a table that has NaN or infinity."""
    column = int(np.flatnonzero(~np.isfinite(row))[0])
    return ValueError(
        f"{name}[{number}, {column}] is {row[column]}; NaN and infinity cannot be packed, replace them first"
    )
