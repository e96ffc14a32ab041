"""What a delta is: rows of tables as they are to be from now on, and which rows these are."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

INT8_PARAM_BYTES = 4
"""Bytes of a row of uint8 that follow its codes: a scale and a bias of float16, as FBGEMM has them."""

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class ColumnNames:
    """What the columns of a delta are called; the defaults are TorchEasyRec's names.

    Attributes:
        table: names of tables; None is "table_fqn", if there is such a column.
        ids: integers, rows of the table.
        rows: lists of floats, or of uint8 as FBGEMM quantizes rows.
        step: integers, when rows were written; None is "global_step", if there is such a column.
    """

    table: str | None = None
    ids: str = "key_id"
    rows: str = "embedding"
    step: str | None = None


@dataclass(frozen=True)
class Keys:
    """Where some rows of a delta go, which are all of one table.

    Attributes:
        table: its name, as the delta has it; None if it has none.
        positions: int64 [n], of the rows in the delta, ascending.
        ids: [n] of some type of integers, of the rows in the table.
        steps: int64 [n], when they were written; zeros where the delta does not say.
    """

    table: str | None
    positions: Positions
    ids: NDArray[Any]
    steps: NDArray[np.int64]


class Rows(ABC):
    """The values of rows [start, stop) of a delta, as long as no others are asked for."""

    start: int
    stop: int

    @abstractmethod
    def take(self, positions: Positions, embedding_dim: int) -> NDArray[Any]:
        """Return some of the rows.

        Args:
            positions: in [start, stop), in any order.
            embedding_dim: of the table.

        Returns:
            float32, float16 or (bfloat16 as) uint16 [n, embedding_dim], or uint8 [n, embedding_dim + 4].

        Raises:
            ValueError: a row has another number of values.
        """


class Delta(ABC):
    """Rows of tables that are read from a file, or from two, which are open while any of it is read.

    Attributes:
        num_rows: how many.
        has_steps: whether it says when they were written.
    """

    num_rows: int
    has_steps: bool

    @abstractmethod
    def iter_keys(self) -> Iterator[Keys]:
        """Read where all rows go, in order.

        Raises:
            FormatError: a file is damaged, or was changed.
            ValueError: a value is missing.
        """

    @abstractmethod
    def iter_rows(self, positions: Positions, most_values: int) -> Iterator[Rows]:
        """Read values, in order: at least of the rows at some positions, which ascend.

        Args:
            positions: of the rows.
            most_values: of a row, by what tables have; as a small file may claim to have more than memory holds.

        Raises:
            FormatError: a file is damaged, or was changed, or has many more values than that.
            ValueError: a value is missing.
        """

    @abstractmethod
    def locate(self, position: int | None = None, *, of_id: bool = False) -> str:
        """Say in which file, and which row of it, values lie, or an id, for a message."""


def explain_width(place: str, found: int, embedding_dim: int, *, is_int8: bool) -> ValueError:
    """Make the error of a row that has another number of values than rows of its table."""
    if is_int8:
        return ValueError(
            f"{place} has {found} bytes, but a row of uint8 of this table has {embedding_dim + INT8_PARAM_BYTES}: "
            f"{embedding_dim} codes, scale and bias as float16"
        )
    return ValueError(f"{place} has {found} values, but rows of this table have {embedding_dim}")
