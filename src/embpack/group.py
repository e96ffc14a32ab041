"""TableGroup: many tables, looked up in one call."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embpack import _native
from embpack.bags import (
    as_array,
    as_integers,
    as_weights,
    check_mode,
    check_weighted,
    count_bags_of_features,
    explain_offsets,
    sum_lengths,
)
from embpack.disk import DiskGroup, DiskTable
from embpack.errors import kind_of
from embpack.lookups import Table, output_dtype


class TableGroup:
    """Tables whose bags are pooled together, in one call of the core whatever their number.

    Attributes:
        tables: each of any layout, bits and embedding_dim, in memory, mapped or on the disk.
        table_of: for each feature, the number of the table that it reads; by default one feature for each table.
        modes: for each feature, or one for all, "sum", "mean" or "max". The default is FBGEMM's, "sum"; that of
            PackedTable.embedding_bag is PyTorch's, "mean".

    Raises:
        TypeError: a table is neither a PackedTable nor a DiskTable.
        ValueError: there is no feature, a feature reads no table of the group, or a mode is unknown.

    Source: torchrec.EmbeddingBagCollection and FBGEMM's table-batched embeddings, the meaning of their arguments.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        table_of: Sequence[int] | None = None,
        modes: str | Sequence[str] = "sum",
    ) -> None:
        self.tables = tuple(tables)
        self.table_of = tuple(range(len(self.tables))) if table_of is None else tuple(table_of)
        self.modes = (modes,) * len(self.table_of) if isinstance(modes, str) else tuple(modes)
        self._check()
        self._set_native()

    def _set_native(self) -> None:
        self._native: Any
        if any(isinstance(table, DiskTable) for table in self.tables):
            self._native = DiskGroup(self.tables, self.table_of, self.modes)
        else:
            views = [table.native_view for table in self.tables]
            self._native = _native.TableGroup(views, list(self.table_of), list(self.modes))
        self._width = sum(self.embedding_dims)  # once: a hundred tables take a while to ask

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled and copied: all but the core's view, which is made anew.

        copy.copy shares the tables. copy.deepcopy copies their bytes, and pickle carries them, those of mapped tables
        too.
        """
        return {name: value for name, value in self.__dict__.items() if name != "_native"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_native()

    def _check(self) -> None:
        for number, each in enumerate(self.tables):
            if not isinstance(each, Table):
                raise TypeError(f"tables[{number}] is {kind_of(each)}; it must be an embpack.PackedTable or DiskTable")
        if not self.table_of:
            raise ValueError("the group has no feature; give it a table")
        for feature, table in enumerate(self.table_of):
            if not 0 <= table < len(self.tables):
                raise ValueError(
                    f"table_of[{feature}] is {table}, but the group has {len(self.tables)} tables "
                    f"(valid: 0 to {len(self.tables) - 1})"
                )
        if len(self.modes) != len(self.table_of):
            raise ValueError(f"there are {len(self.modes)} modes for {len(self.table_of)} features; give one for each")
        for feature, mode in enumerate(self.modes):
            check_mode(mode, f"modes[{feature}]")

    @property
    def embedding_dims(self) -> tuple[int, ...]:
        """Values that each feature has in a row of the output."""
        return tuple(self.tables[table].embedding_dim for table in self.table_of)

    def __repr__(self) -> str:
        return f"TableGroup({len(self.tables)} tables, {len(self.table_of)} features, {self._width} values)"

    def embedding_bag(
        self,
        indices: Any,
        offsets: Any = None,
        *,
        lengths: Any = None,
        per_sample_weights: Any = None,
        dtype: str = "float32",
    ) -> NDArray[Any]:
        """Pool the bags of all features.

        Args:
            indices: integers of any type [L]: those of the first feature's bags, then those of the second's, and so on;
                the values of a TorchRec KeyedJaggedTensor.
            offsets: integers of any type [F * B + 1] for F features and B bags each, non-decreasing from 0 to L: where
                each bag starts, feature by feature, and where the last one ends.
            lengths: integers of any type [F * B], how many indices each bag has, in place of offsets.
            per_sample_weights: float32 [L], or a list, what each row is multiplied by; only if all modes are "sum".
            dtype: of the values: "float32", "float16" or "bfloat16", as PackedTable.embedding_bag takes it.

        Returns:
            [B, sum of embedding_dims], C-contiguous: the features' values side by side. An empty bag is zeros.
            bfloat16, which NumPy lacks, as its bits in uint16.

        Raises:
            IndexError: an index is out of range; names its position, value and feature.
            TypeError: an argument is of another type.
            ValueError: offsets, lengths, per_sample_weights or dtype are not as above.
        """
        array = as_integers(indices, "indices")
        if array.ndim != 1:
            raise ValueError(f"indices have {array.ndim} dimensions; they must be 1-D, feature after feature")
        starts, batch = self._read_bags(array, offsets, lengths)
        weights = None
        if per_sample_weights is not None:
            for feature, mode in enumerate(self.modes):
                check_weighted(mode, f"feature {feature}")
            weights = as_weights(per_sample_weights, array)
        out = np.empty((batch, self._width), output_dtype(dtype))
        feature, fault = self._native.pool(array, starts, weights, out)
        if fault != -1:
            given = starts if offsets is None else as_array(offsets, "offsets")
            raise self._explain(feature, fault, as_array(indices, "indices"), given)
        return out

    def _read_bags(self, indices: NDArray[Any], offsets: Any, lengths: Any) -> tuple[NDArray[Any], int]:
        """Return where each bag starts and the last one ends, and how many bags each feature has."""
        if (offsets is None) == (lengths is None):
            raise ValueError("give either offsets or lengths")
        if lengths is None:
            starts = as_integers(offsets, "offsets")
            batch = count_bags_of_features(len(self.table_of), indices, starts, include_last_offset=True)
        else:
            counts = as_integers(lengths, "lengths")
            starts = sum_lengths(counts, len(indices))
            batch = count_bags_of_features(len(self.table_of), indices, counts, include_last_offset=False)
        return starts, batch

    def _explain(self, feature: int, fault: int, indices: NDArray[Any], starts: NDArray[Any]) -> Exception:
        if fault == _native.bad_offsets:
            return explain_offsets(starts, len(indices))
        table = self.table_of[feature]
        error = self.tables[table].explain_fault(fault, indices)
        return type(error)(f"feature {feature}, table {table}: {error}")
