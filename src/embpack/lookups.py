"""Table: what all tables of packed rows are, wherever their rows lie."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from embpack import _native
from embpack.bags import (
    as_array,
    as_integers,
    as_row,
    as_weights,
    check_mode,
    check_weighted,
    count_bags,
    explain_offsets,
)
from embpack.errors import FormatError
from embpack.layouts import RowFormat

# Types themselves, of which NumPy need not make one at each call.
OUTPUT_DTYPES: dict[str, Any] = {
    name: np.dtype(kept_as) for name, kept_as in (("float32", "f4"), ("float16", "f2"), ("bfloat16", "u2"))
}
_ROWS_AT_A_TIME = 256
_ALL = slice(None)


class Table(ABC):
    """An embedding table in packed rows: a PackedTable, or a DiskTable.

    Attributes:
        row_format: what a row's bytes mean, rotation included (see rotation).
        dtype: what the weights were: "float32", "float16" or "bfloat16".
        method: name and parameters of the method that packed the rows; "" where unknown.
        loss: normalized l2 loss ||X - Q(X)|| / ||X||, measured when packed; None where unknown.
        codebooks: the array beside the rows that all share: in the clustered layout [num_codebooks, 2^bits] of the
            parameter type; in the trellis layout float32 [1, n] (embpack.layouts.trellis.TrellisParameters.join); None
            in others.
    """

    row_format: RowFormat
    dtype: str
    method: str
    loss: float | None
    codebooks: NDArray[Any] | None

    @property
    @abstractmethod
    def num_embeddings(self) -> int:
        """Number of rows."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all packed rows, and of the clusters and codebooks beside them."""

    @property
    @abstractmethod
    def native_view(self) -> Any:
        """What looks rows up: _native.TableView, or what has its gather and pool."""

    @property
    @abstractmethod
    def as_packed(self) -> Self:
        """The table without its rotation, which shares its rows: lookups give the rotated values that were packed."""

    @abstractmethod
    def prefetch(self, indices: Any) -> None:
        """Start to read rows from the disk, and return at once, so that a lookup of them soon after need not wait.

        Rows of a file are read into the system's cache of pages: they take no memory of this process, and stay there
        as long as the system has room. Any number of prefetches may be under way, in any number of threads; lookups
        that wait come first. Of rows in memory nothing but the indices is looked at.

        Args:
            indices: integers of any type and shape, each in [0, num_embeddings).

        Raises:
            IndexError: an index is out of range; names its position and value.
            TypeError: indices are of another type.
        """

    @abstractmethod
    def _cluster_of(self, row: int) -> int:
        """The number of the codebook of a row, in a layout that has such numbers."""

    @property
    def embedding_dim(self) -> int:
        """Values a row."""
        return self.row_format.embedding_dim

    @property
    def shape(self) -> tuple[int, int]:
        """(num_embeddings, embedding_dim)."""
        return self.num_embeddings, self.embedding_dim

    @property
    def bits(self) -> Any:
        """Bits of a code; for the trellis layout those of a value, which may have a fraction."""
        return self.row_format.bits

    @property
    def layout(self) -> str:
        """Name of the layout of a row."""
        return self.row_format.layout

    @property
    def rotation(self) -> str | None:
        """What rows were multiplied by before they were packed, and lookups undo: None or "hadamard"."""
        return self.row_format.rotation

    @property
    def row_bytes(self) -> int:
        """Bytes of a packed row."""
        return self.row_format.row_bytes

    def __len__(self) -> int:
        return self.num_embeddings

    def __repr__(self) -> str:
        loss = "" if self.loss is None else f", loss={self.loss:.5f}"
        method = f", method={self.method!r}" if self.method else ""
        rotation = f", rotation={self.rotation!r}" if self.rotation else ""
        return (
            f"{type(self).__name__}({self.num_embeddings} x {self.embedding_dim}, {self.layout}, {self.bits} bits, "
            f"{self.row_format.param_dtype} parameters, {self.nbytes} bytes{method}{rotation}{loss})"
        )

    def dequantize(self, dtype: str = "float32") -> NDArray[Any]:
        """Return all rows, [num_embeddings, embedding_dim], as gather returns some.

        Args:
            dtype: of the values, as gather takes it.
        """
        return self._gather(None, self.num_embeddings, dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """All rows, for numpy.asarray: float32, or of a type that NumPy makes of it.

        Raises:
            ValueError: copy is False, but packed rows have to be unpacked.
        """
        if copy is False:
            raise ValueError("rows are packed: an array of them is a copy; leave out copy=False")
        wanted = np.dtype(np.float32 if dtype is None else dtype)
        if wanted.name == "bfloat16":  # of ml_dtypes
            return self.dequantize("bfloat16").view(wanted)
        return self.dequantize("float16" if wanted.name == "float16" else "float32").astype(wanted, copy=False)

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        """Each row, float32 [embedding_dim]; some are unpacked at a time."""
        for start in range(0, self.num_embeddings, _ROWS_AT_A_TIME):
            yield from self[start : start + _ROWS_AT_A_TIME]

    def __getitem__(self, key: Any) -> Any:
        """Look rows up as an array of NumPy is indexed: numpy.asarray(table)[key], but only these rows are unpacked.

        Args:
            key: an integer, integers of any type and shape, a slice, ``...``, or a mask, bool [num_embeddings].
                Negative integers count from the end, which gather refuses. Or a pair: one of these, and one for
                columns.

        Returns:
            float32: [..., embedding_dim] of integers [...] or of the rows that are chosen; of a pair what NumPy makes
            of it, such as one value of table[3, 5] and [num_embeddings] of table[:, 2].

        Raises:
            IndexError: an index is out of range; names its position and value. Or a mask has another shape, or there
                are more than two keys.
            TypeError: the key is of another type.
        """
        rows, columns = _split_key(key) if isinstance(key, tuple) or key is ... or key is None else (key, _ALL)
        numbers = _as_numbers(rows, self.num_embeddings, "indices")
        if columns is _ALL:
            return self._gather_from_end(numbers)
        if isinstance(columns, slice):
            return self._gather_from_end(numbers)[..., columns]
        chosen = _as_columns(columns, self.embedding_dim)
        if isinstance(rows, slice):
            return self._gather_from_end(numbers)[..., chosen]
        try:
            numbers, chosen = np.broadcast_arrays(numbers, chosen)
        except ValueError as error:
            raise IndexError(f"the keys of rows and columns do not go together: {error}") from None
        return np.take_along_axis(self._gather_from_end(numbers), chosen[..., np.newaxis], axis=-1)[..., 0][()]

    def _gather_from_end(self, numbers: NDArray[Any]) -> NDArray[np.float32]:
        """Look rows up by numbers of which negative ones count from the end: they are seldom there."""
        try:
            return self.gather(numbers)
        except IndexError:
            is_from_end = (numbers < 0) & (numbers >= -self.num_embeddings)
            if not is_from_end.any():
                raise
        wide = numbers.astype(np.int64)
        return self.gather(np.where(is_from_end, wide + self.num_embeddings, wide))

    def gather(self, indices: Any, dtype: str = "float32", *, rotate_back: bool = True) -> NDArray[Any]:
        """Look rows up.

        Args:
            indices: integers of any type and shape [...], each in [0, num_embeddings).
            dtype: of the values: "float32", "float16" or "bfloat16", rounded to nearest, ties to even. A finite value
                that the type cannot hold becomes its largest.
            rotate_back: False leaves rows of a rotated table as they were packed (see embpack.rotation.matrix).

        Returns:
            [..., embedding_dim]; bfloat16, which NumPy lacks, as its bits in uint16.

        Raises:
            IndexError: an index is out of range; names its position and value.
            TypeError: indices are of another type.
            ValueError: there is no such dtype.
        """
        array = as_integers(indices, "indices")
        table = self if rotate_back else self.as_packed
        return table._gather(array, array.size, dtype, indices).reshape(*array.shape, self.embedding_dim)

    def embedding_bag(
        self,
        indices: Any,
        offsets: Any = None,
        mode: str = "mean",
        per_sample_weights: Any = None,
        *,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        dtype: str = "float32",
        rotate_back: bool = True,
    ) -> NDArray[Any]:
        """Pool bags of rows straight from the packed bytes.

        Args:
            indices: integers of any type, each in [0, num_embeddings): 1-D [L] with offsets, or 2-D [B, n] for B bags
                of n. Each is in a bag.
            offsets: integers of any type [B], non-decreasing from 0, at most L: where each bag starts in 1-D indices;
                with include_last_offset [B + 1], the last one being L, where the last bag ends.
            mode: "sum", "mean" or "max". The default is PyTorch's, "mean"; a TableGroup's is FBGEMM's, "sum".
            per_sample_weights: float32, or a list, shaped like indices: what each row is multiplied by; only for
                "sum".
            include_last_offset: see offsets.
            padding_idx: rows of this index are left out, of a mean's count too; negative counts from the end.
            dtype: of the values: "float32", or "float16" or "bfloat16", to which the float32 sums are rounded as gather
                does it; infinities, as of sums that float32 cannot hold, stay.
            rotate_back: False pools rows of a rotated table as they were packed (see embpack.rotation.matrix); the
                maxima of "max" are then those of rotated values.

        Returns:
            [B, embedding_dim], C-contiguous; an empty bag is zeros. Rows are added in the order of indices. bfloat16,
            which NumPy lacks, as its bits in uint16.

        Raises:
            IndexError: an index is out of range; names its position and value.
            TypeError: an argument is of another type.
            ValueError: shapes, offsets, mode, padding_idx or dtype are not as above.

        Source: torch.nn.functional.embedding_bag, its meaning and defaults.
        """
        check_mode(mode)
        array = as_integers(indices, "indices")
        starts = None if offsets is None else as_integers(offsets, "offsets")
        num_bags = count_bags(array, starts, include_last_offset=include_last_offset)
        weights = None
        if per_sample_weights is not None:
            check_weighted(mode)
            weights = as_weights(per_sample_weights, array)
        padding = -1 if padding_idx is None else as_row(padding_idx, self.num_embeddings)
        out = np.empty((num_bags, self.embedding_dim), output_dtype(dtype))
        bag_size = array.shape[1] if starts is None else 0
        flat = array if array.ndim == 1 else array.reshape(-1)
        table = self if rotate_back else self.as_packed
        fault = table.native_view.pool(flat, starts, bag_size, weights, padding, mode, out)
        if fault != -1:
            given = None if offsets is None else as_array(offsets, "offsets")
            raise self.explain_fault(fault, as_array(indices, "indices").reshape(-1), given)
        return out

    def _gather(self, indices: NDArray[Any] | None, count: int, dtype: str, given: Any = None) -> NDArray[Any]:
        out = np.empty((count, self.embedding_dim), output_dtype(dtype))
        fault = self.native_view.gather(None if indices is None else indices.reshape(-1), out)
        if fault != -1:
            raise self.explain_fault(fault, None if indices is None else as_array(given, "indices").reshape(-1))
        return out

    def _sort_rows(self, indices: Any) -> NDArray[np.int64]:
        """Check indices of rows; int64 [L], ascending.

        Raises:
            IndexError: an index is out of range; names its position and value.
            TypeError: they are of another type.
        """
        rows = as_integers(indices, "indices").reshape(-1)
        fault = find_outside(rows, self.num_embeddings)
        if fault != -1:
            raise self.explain_fault(fault, as_array(indices, "indices").reshape(-1))
        return np.sort(rows).astype(np.int64, copy=False)

    def explain_fault(self, fault: int, indices: NDArray[Any] | None, offsets: NDArray[Any] | None = None) -> Exception:
        """Make an error of what the core has found (see _native.TableView)."""
        if fault == _native.bad_offsets:
            assert indices is not None and offsets is not None
            return explain_offsets(offsets, len(indices))
        if fault >= 0:
            assert indices is not None
            rows = self.num_embeddings
            valid = f" (valid: 0 to {rows - 1})" if rows else ""
            return IndexError(f"indices[{fault}] is {indices[fault]}, but the table has {rows} rows{valid}")
        assert self.codebooks is not None
        row = -2 - fault if indices is None else int(indices[-2 - fault])
        return FormatError(
            f"row {row} is of cluster {self._cluster_of(row)}, but the table has {len(self.codebooks)} codebooks; "
            "its clusters are damaged"
        )


def find_outside(indices: NDArray[Any], num_embeddings: int) -> int:
    """The position of the first of 1-D indices that is out of range; -1 if there is none."""
    if not len(indices) or (indices.min() >= 0 and indices.max() < num_embeddings):
        return -1
    return int(np.argmax((indices < 0) | (indices >= num_embeddings)))


def output_dtype(name: str) -> Any:
    """NumPy's type for values of a lookup.

    Raises:
        ValueError: there is no such type.
    """
    if name not in OUTPUT_DTYPES:
        raise ValueError(f"dtype is {name!r}; choose one of {', '.join(OUTPUT_DTYPES)}")
    return OUTPUT_DTYPES[name]


def _split_key(key: Any) -> tuple[Any, Any]:
    """The keys of rows and of columns that a key of two axes has, as NumPy reads it."""
    if not isinstance(key, tuple):
        key = (key,)
    if any(part is None for part in key):
        raise TypeError("None is no key of a table; add the axis to what it returns")
    dots = [at for at, part in enumerate(key) if part is Ellipsis]
    given = len(key) - len(dots[:1])
    if len(dots) > 1 or given > 2:
        raise IndexError(f"there are {len(key)} keys; a table has two axes: rows and columns")
    at = dots[0] if dots else len(key)
    keys = [*key[:at], *(_ALL for _ in range(2 - given)), *key[at + 1 :]]
    return keys[0], keys[1]


def _as_numbers(key: Any, size: int, what: str) -> NDArray[Any]:
    """The numbers that a key of one axis names."""
    if isinstance(key, slice):
        return np.arange(*key.indices(size))
    numbers = as_array(key, what)
    if numbers.dtype.kind != "b":
        return numbers
    if numbers.shape != (size,):
        raise IndexError(f"a mask for {what} has shape {list(numbers.shape)}; it must be [{size}]")
    return np.flatnonzero(numbers)


def _as_columns(key: Any, size: int) -> NDArray[np.int64]:
    """The columns that a key names, each in [0, size).

    Raises:
        IndexError: there is no such column; names its position and value.
        TypeError: the key is of another type.
    """
    numbers = as_integers(_as_numbers(key, size, "columns"), "columns")
    is_wrong = (numbers < -size) | (numbers >= size)
    if is_wrong.any():
        at = int(np.argmax(is_wrong))
        found = as_array(key, "columns").reshape(-1)[at]
        raise IndexError(f"columns[{at}] is {found}, but the table has {size} columns (valid: 0 to {size - 1})")
    return numbers.astype(np.int64) % size
