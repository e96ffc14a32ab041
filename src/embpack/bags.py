"""What is asked of a lookup: indices, bags of them and weights, as arrays of NumPy or tensors of PyTorch.

The checks, and what they say, are here once: for tables, groups, PyTorch's operators and modules, and ONNX. Those of an
Array look at its shape and type only, as fake tensors have no values. Those of values the core makes while it reads
them, and explain_offsets says what it has found.

Every index is in one bag, wherever bags are asked for: offsets start at 0, do not decrease, and end with the indices if
they have an end. FBGEMM, TorchRec and PyTorch's 4-bit operator refuse indices after it, too. nn.EmbeddingBag has no one
answer: its sums leave them out, or add them to the last bag if rows are float64 or padding_idx is set, a mean leaves
them out and counts them, and the largest values are found among them, too.
"""

from collections.abc import Sequence
from functools import lru_cache
from operator import index
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

MODES = ("sum", "mean", "max")
INTEGERS = ("int32", "int64")
_NATIVE_INTEGERS = frozenset(map(np.dtype, INTEGERS))


class Array(Protocol):
    """What NumPy's arrays and PyTorch's tensors have in common."""

    @property
    def ndim(self) -> int:
        """Number of axes."""

    @property
    def shape(self) -> Sequence[int]:
        """Size of each axis."""

    @property
    def dtype(self) -> Any:
        """Type of the values."""


@lru_cache
def name_of(dtype: Any) -> str:
    """The name that a type has in both NumPy and PyTorch, such as "int64", whatever its byte order."""
    return getattr(dtype, "name", None) or str(dtype).removeprefix("torch.")


def wrong_type(what: str, values: Array, *names: str) -> TypeError:
    """The error for values of another type than those of these names."""
    library = "torch." if str(values.dtype).startswith("torch.") else ""
    return TypeError(f"{what} are {values.dtype}; they must be {' or '.join(library + name for name in names)}")


def check_integers(what: str, values: Array) -> None:
    """Raise TypeError if indices or offsets are neither int32 nor int64."""
    if name_of(values.dtype) not in INTEGERS:
        raise wrong_type(what, values, *INTEGERS)


def as_array(values: Any, what: str) -> NDArray[Any]:
    """Make an array of what NumPy makes one of; of an empty list, which it takes for floats, integers.

    Raises:
        TypeError: it is a nested tensor of PyTorch.
        ValueError: it is lists of different lengths.
    """
    if isinstance(values, np.ndarray):
        return values
    if getattr(values, "is_nested", False):
        raise TypeError(
            f"{what} are a nested tensor; give its values(), and its offsets() with include_last_offset=True"
        )
    try:
        array = np.asarray(values)
    except ValueError as error:  # of NumPy, which speaks of inhomogeneous shapes
        raise ValueError(
            f"{what} make no array: {error}; bags of different sizes are 1-D indices and offsets"
        ) from error
    return array if array.size or hasattr(values, "dtype") else array.astype(np.int64)


def as_integers(values: Any, what: str) -> NDArray[Any]:
    """Make indices or offsets an array: int32 or int64 of any shape, contiguous.

    Other integers become int64. One that int64 cannot hold becomes negative, which no row is: it is refused as those
    are, and explained by the array that was given.

    Raises:
        TypeError: they are no integers.
    """
    array = values if type(values) is np.ndarray else as_array(values, what)
    if array.dtype in _NATIVE_INTEGERS:
        return array if array.flags.c_contiguous else np.ascontiguousarray(array)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{what} are {array.dtype}; they must be integers")
    return np.asarray(array, np.int32 if array.dtype.name == "int32" else np.int64, order="C")


def as_weights(values: Any, indices: Array) -> NDArray[np.float32]:
    """Make per_sample_weights an array: float32 [L], contiguous. Numbers in a list, which have no type, become float32.

    Raises:
        TypeError: they are of another type.
        ValueError: their shape is not that of indices.
    """
    if not hasattr(values, "dtype"):
        array = as_array(values, "per_sample_weights")
        values = array.astype(np.float32) if array.dtype.kind in "iuf" else array
    check_weights(values, indices)
    array = as_array(values.detach() if hasattr(values, "detach") else values, "per_sample_weights")
    return np.ascontiguousarray(array, np.float32).reshape(-1)


def check_weights(weights: Array, indices: Array) -> None:
    """Raise TypeError or ValueError if per_sample_weights are not float32, or not shaped like indices."""
    if name_of(weights.dtype) != "float32":
        raise wrong_type("per_sample_weights", weights, "float32")
    if weights.shape != indices.shape:
        raise ValueError(
            f"per_sample_weights have shape {list(weights.shape)}, indices {list(indices.shape)}; they must agree"
        )


def check_mode(mode: object, what: str = "mode") -> None:
    """Raise ValueError if there is no such mode."""
    if mode not in MODES:
        raise ValueError(f"{what} is {mode!r}; choose one of {', '.join(MODES)}")


def check_weighted(mode: object, owner: str = "") -> None:
    """Raise ValueError if bags of this mode take no per_sample_weights; owner says whose mode it is, of several."""
    if mode != "sum":
        found = f"and {owner} has mode {mode!r}" if owner else f"not {mode!r}"
        raise ValueError(f"per_sample_weights go with mode 'sum' only, {found}")


def as_row(padding_idx: Any, num_embeddings: int) -> int:
    """The row that padding_idx names, an integer of Python, NumPy or a tensor; negative counts from the end.

    Raises:
        TypeError: it is no integer.
        ValueError: there is no such row.
    """
    try:
        row = index(padding_idx)
    except TypeError:
        raise TypeError(f"padding_idx is {padding_idx!r}; it must be an integer, the number of a row") from None
    if not -num_embeddings <= row < num_embeddings:
        raise ValueError(f"padding_idx is {row}, but the table has {num_embeddings} rows")
    return row % num_embeddings


def count_bags(indices: Array, offsets: Array | None, *, include_last_offset: bool) -> int:
    """Number of bags of these arguments of torch.nn.functional.embedding_bag.

    Raises:
        ValueError: they do not go together.
    """
    if indices.ndim == 2:
        if offsets is not None:
            raise ValueError("offsets are for 1-D indices; each row of 2-D indices is a bag by itself")
        return indices.shape[0]
    if indices.ndim != 1:
        raise ValueError(f"indices have {indices.ndim} dimensions; a bag takes 1-D with offsets, or 2-D")
    if offsets is None:
        raise ValueError("1-D indices need offsets: where each bag starts; 2-D ones have a bag a row")
    if offsets.ndim != 1:
        raise ValueError(f"offsets have {offsets.ndim} dimensions; they must be 1-D")
    if include_last_offset and offsets.shape[0] == 0:
        raise ValueError("offsets are empty; with include_last_offset they end with where the last bag ends")
    return offsets.shape[0] - include_last_offset


def count_bags_of_features(
    num_features: int, indices: Array, offsets: Array | None, *, include_last_offset: bool
) -> int:
    """How many bags each feature has; indices are those of the first feature, then those of the second, and so on.

    Raises:
        ValueError: indices and offsets do not go together, or features have different numbers of bags.
    """
    num_bags = count_bags(indices, offsets, include_last_offset=include_last_offset)
    if num_features < 1 or num_bags % num_features:
        has_end = include_last_offset and offsets is not None
        end = f", the last of {num_bags + 1} offsets being an end" if has_end else ""
        raise ValueError(f"there are {num_bags} bags{end}; {num_features} features take a multiple of {num_features}")
    return num_bags // num_features


def sum_lengths(lengths: NDArray[Any], num_indices: int) -> NDArray[np.int64]:
    """Make offsets of how many indices each bag has: where each starts, and where the last one ends.

    Raises:
        ValueError: lengths are not 1-D, one is negative, or they are not those of the indices.
    """
    if lengths.ndim != 1 or (lengths < 0).any():
        raise ValueError("lengths must be 1-D and not negative: how many indices each bag has")
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    if offsets[-1] != num_indices:
        raise ValueError(f"lengths add up to {offsets[-1]}, but there are {num_indices} indices")
    return offsets


def explain_offsets(offsets: NDArray[Any], num_indices: int) -> ValueError:
    """Say what is wrong with offsets that the core has refused."""
    if not len(offsets):
        return ValueError(f"offsets are empty, but there are {num_indices} indices; each must be in a bag")
    if offsets[0] != 0:
        return ValueError(f"offsets[0] is {offsets[0]}; the first bag must start at 0")
    decreases = np.flatnonzero(offsets[1:] < offsets[:-1])
    if decreases.size:
        at = int(decreases[0])
        return ValueError(
            f"offsets[{at + 1}] is {offsets[at + 1]}, less than offsets[{at}], {offsets[at]}; offsets cannot decrease"
        )
    last, found = len(offsets) - 1, f"{offsets[-1]}, but there are {num_indices} indices"
    if offsets[-1] > num_indices:
        return ValueError(f"offsets[{last}] is {found}; no offset may be larger")
    return ValueError(f"offsets[{last}], where the last bag ends, is {found}; each must be in a bag")
