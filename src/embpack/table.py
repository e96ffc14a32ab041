"""PackedTable: packed rows in memory, or mapped from a file."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import ref

import numpy as np
from numpy.typing import NDArray

from embpack import _native
from embpack.formats.mapped import is_of_file, reading_all
from embpack.layouts import RowFormat
from embpack.layouts.uniform import UniformLayout
from embpack.lookups import Table
from embpack.pages import use_huge_pages
from embpack.rows import ROW_DTYPES
from embpack.vectors import as_vectors

if TYPE_CHECKING:
    from embpack.updating import UpdateReport

# What a table has beside its fields, and is not pickled: it is made anew.
_MADE = ("native_view", "as_packed", "_whole")


@dataclass(frozen=True, eq=False, repr=False)
class PackedTable(Table):
    """An embedding table in packed rows, in memory or mapped from a file.

    Attributes:
        packed: uint8 [num_embeddings, row_bytes], C-contiguous: the bytes themselves, never copied.
        row_format: what a row's bytes mean, rotation included (see rotation).
        dtype: what the weights were: "float32", "float16" or "bfloat16".
        method: name and parameters of the method that packed the rows; "" where unknown.
        loss: normalized l2 loss ||X - Q(X)|| / ||X||, measured when packed; None where unknown, as after an update of
            some rows.
        clusters: the array beside the rows with an entry for each: in the clustered layout uint8 or uint16
            [num_embeddings], which codebook a row has; None in others.
        codebooks: the array beside the rows that all share: in the clustered layout [num_codebooks, 2^bits] of the
            parameter type; in the trellis layout float32 [1, n] (embpack.layouts.trellis.TrellisParameters.join); None
            in others.

    Raises:
        ValueError: packed, clusters or codebooks are not what row_format says, or there is no such dtype.
    """

    packed: NDArray[np.uint8]
    row_format: RowFormat
    dtype: str = "float32"
    method: str = ""
    loss: float | None = None
    clusters: NDArray[Any] | None = None
    codebooks: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        packed = self.packed
        if packed.dtype != np.uint8 or packed.ndim != 2 or not packed.flags.c_contiguous:
            raise ValueError(
                f"packed is {packed.dtype} of shape {list(packed.shape)}; it must be C-contiguous uint8 "
                "[num_embeddings, row_bytes]"
            )
        if self.dtype not in ROW_DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; the weights were one of {', '.join(ROW_DTYPES)}")
        expected = self.row_format.row_bytes
        if packed.shape[1] != expected:
            raise ValueError(
                f"packed has {packed.shape[1]} bytes a row, but embedding_dim {self.embedding_dim} at {self.bits} "
                f"bits with {self.row_format.param_dtype} parameters takes {expected}"
            )
        self.row_format.form.check_beside(self.num_embeddings, self.clusters, self.codebooks)
        if self.clusters is not None:  # so that the core's view of them shares their memory, and sees an update
            object.__setattr__(self, "clusters", np.ascontiguousarray(self.clusters))

    @classmethod
    def from_packed(
        cls, packed: Any, embedding_dim: int, bits: int = 4, param_dtype: str | None = None
    ) -> "PackedTable":
        """Adopt rows that PyTorch or FBGEMM packed, without a copy.

        Memory of this process alone is put in huge pages, once (docs/resources.md); no address or value changes.

        Args:
            packed: uint8 [num_embeddings, row_bytes], NumPy or PyTorch on the CPU, as
                torch.ops.quantized.embedding_bag_4bit_prepack returns it.
            embedding_dim: values a row.
            bits: of each code, 2, 4 or 8.
            param_dtype: of scale and bias; None is float16 at 2 and 4 bits, float32 at 8.

        Raises:
            ValueError: packed has another number of bytes a row, or is no C-contiguous uint8 array.
        """
        row_format = RowFormat(embedding_dim, bits, param_dtype or UniformLayout.default_param_dtype(bits))
        table = cls(np.asarray(packed), row_format)
        use_huge_pages(table.packed)
        return table

    @property
    def num_embeddings(self) -> int:
        """Number of rows."""
        return len(self.packed)

    @property
    def nbytes(self) -> int:
        """Bytes of all packed rows, and of the clusters and codebooks beside them."""
        return sum(array.nbytes for array in (self.packed, *self.beside))

    @property
    def beside(self) -> list[NDArray[Any]]:
        """The arrays that lie beside the rows, in the order in which a file and its checksum have them."""
        return [array for array in (self.clusters, self.codebooks) if array is not None]

    def linear(self, input: Any, bias: Any = None) -> NDArray[np.float32]:
        """Multiply vectors by all rows, straight from the packed bytes: an output layer whose weight is this table.

        Up to eight vectors are multiplied by the codes themselves; for more, rows are unpacked, some at a time, within
        the cache. All of it runs on embpack's threads. Results are the same bits whatever the CPU and the number of
        threads; with the number of vectors their last bits may differ, as those of BLAS do.

        Args:
            input: [..., embedding_dim] of float32, float16 or bfloat16 (of ml_dtypes, or its bits in uint16).
            bias: [num_embeddings], of the same types, or None.

        Returns:
            input @ weight.T + bias, float32 [..., num_embeddings], summed in float32.

        Raises:
            TypeError: input or bias is of another type.
            ValueError: input or bias has another shape.
            FormatError: a row has no codebook.

        Source: torch.nn.functional.linear.
        """
        vectors = as_vectors(input, "input", self.embedding_dim)
        added = None if bias is None else as_vectors(bias, "bias", self.num_embeddings)
        if added is not None and added.ndim != 1:
            raise ValueError(f"bias has shape {list(added.shape)}; it must be [{self.num_embeddings}]")
        rows = vectors.reshape(-1, self.embedding_dim)
        out = np.empty((len(rows), self.num_embeddings), np.float32)
        fault = _native.linear(self.native_view, rows, added, out)
        if fault != -1:
            raise self.explain_fault(fault, None)
        return out.reshape(*vectors.shape[:-1], self.num_embeddings)

    def dequantize(self, dtype: str = "float32") -> NDArray[Any]:
        """Return all rows, [num_embeddings, embedding_dim], as gather returns some.

        Args:
            dtype: of the values, as gather takes it.
        """
        with reading_all(self.packed):
            return super().dequantize(dtype)

    def prefetch(self, indices: Any) -> None:  # noqa: D102  (as in Table)
        rows = self._sort_rows(indices)
        if len(rows) and is_of_file(self.packed):
            for array in (self.packed, self.clusters):
                if array is not None:
                    entries = array.reshape(len(array), -1).view(np.uint8)
                    _native.prefetch_mapped_rows(entries, rows)

    def _cluster_of(self, row: int) -> int:
        assert self.clusters is not None
        return int(self.clusters[row])

    @cached_property
    def native_view(self) -> _native.TableView:
        """The table as the core takes it."""
        codebooks = None if self.codebooks is None else np.ascontiguousarray(self.codebooks).view(np.uint8)
        return _native.TableView(self.packed, str(self.row_format), self.clusters, codebooks)

    @cached_property
    def as_packed(self) -> "PackedTable":
        """The table without its rotation, which shares its memory: lookups give the rotated values that were packed."""
        table = replace(self, row_format=replace(self.row_format, rotation=None))
        table.__dict__["_whole"] = ref(self)
        return table

    def update(self, indices: Any, rows: Any, *, method: str | None = None, warn_share: float = 0.01) -> "UpdateReport":
        """Pack new values of some rows as the table is packed, and put them in place of those that it has.

        Rows are packed by the table's method, with what all its rows share as it is (trellis levels and scales,
        codebooks of clusters, the range of "table"), in its layout and rotation. By other methods they become the bytes
        that packing the whole table anew would give them; error_weights that it was packed with are not known any more.
        Whatever has the table's memory sees the change: groups, modules of PyTorch, shallow copies. Nothing is written
        unless all rows can be packed.

        Other threads may look rows up meanwhile: each row that they read is the one before or the one after, whole
        (docs/reliability.md). Update a table in one thread at a time.

        ``loss`` becomes that of the new rows if these are all the table has, and None otherwise: what the others lose
        by themselves is not known. Tables that were made of this one by copy.copy or dataclasses.replace share the rows
        and keep the loss that they had.

        Args:
            indices: integers of any type [n], each in [0, num_embeddings). Of rows that are named more than once the
                last one counts.
            rows: [n, embedding_dim] of float32, float16 or bfloat16; NumPy or PyTorch, as embpack.quantize takes them.
            method: for a table whose method is not known (from_packed, the table of a PyTorch module): name and
                parameters. Leave it out for others, and for layouts that one method alone makes.
            warn_share: from which share of misfits on it warns.

        Returns:
            What was changed: num_rows, each counted once, their own loss, and num_misfits, the rows that what the
            table's rows share does not fit (embpack.updating.find_misfits).

        Warns:
            UserWarning: more than warn_share of the rows are misfits: pack the table anew. Or rows are too small for
                float16 parameters, as embpack.quantize warns.

        Raises:
            IndexError: an index is out of range; names its position and value.
            TypeError: indices or rows are of another type.
            ValueError: the table is mapped from a file, or its memory is read-only; rows have another shape; one is
                NaN, infinite or too large, and is named; the method is not known, or is another one.
        """
        from embpack.updating import update_table  # packers need tables

        return update_table(self, indices, rows, method, warn_share)

    def _set_loss(self, loss: float | None) -> None:
        """Say what the rows lose after they have changed; of this table and of as_packed, whichever it is."""
        table: PackedTable | None = self
        while table is not None and (whole := table.__dict__.get("_whole", lambda: None)()) is not None:
            table = whole
        while table is not None:
            object.__setattr__(table, "loss", loss)
            table = table.__dict__.get("as_packed")

    def copy(self) -> "PackedTable":
        """Return the same table with bytes of its own, in memory, as copy.deepcopy does, and pickle."""
        clusters, codebooks = (None if part is None else np.array(part) for part in (self.clusters, self.codebooks))
        with reading_all(self.packed):
            packed = np.array(self.packed)
        table = replace(self, packed=packed, clusters=clusters, codebooks=codebooks)
        use_huge_pages(table.packed, *table.beside)
        return table

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: all but what is made anew, such as what the core takes."""
        return {name: value for name, value in self.__dict__.items() if name not in _MADE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Read a pickle, whose arrays lie where pickle has put them."""
        self.__dict__.update(state)
        use_huge_pages(self.packed, *self.beside)
