"""What becomes of one table, and whether it is still the table that this was planned for."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from embpack.errors import FormatError
from embpack.formats.base import is_utf8
from embpack.shard_writer import TableReport
from embpack.text import printable
from embpack.variant import Variant

# A table has changed if it has so many times as many rows, or as few, or its loss or the root mean square of its values
# has moved so much: the loss of half a bit more or less moves by 1.41.
MOST_CHANGE = 1.25


@dataclass(frozen=True)
class Better:
    """What more bytes would do for a table.

    Attributes:
        variant: the next way that loses less.
        num_bytes: of the table packed so.
        loss: normalized l2 loss, measured on few rows.
        saved_share: of the squared error of all tables, as the plan counts it, what it would save.
    """

    variant: Variant
    num_bytes: int
    loss: float
    saved_share: float


@dataclass(frozen=True)
class PlannedTable:
    """What a table becomes.

    Attributes:
        variant: how it is packed.
        loss: normalized l2 loss, measured on a sample; of a plan that was saved after packing, on all rows.
        square_norm: sum of the squares of its values, by the same rows.
        error_share: its share of the squared error of all tables, as the plan counts it, from 0 to 1.
        reason: for the user to read, some 30 characters: "4 bits: .0585, +4.0 MB" is what more bytes would do.
        better: the same in numbers; None if nothing loses less, or the plan is from a file.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    variant: Variant
    loss: float
    square_norm: float
    error_share: float
    reason: str
    better: Better | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed table."""
        return self.variant.count_bytes(self.num_embeddings, self.embedding_dim)

    def find_changes(self, report: TableReport) -> list[str]:
        """Say in words what of a table has moved by more than MOST_CHANGE since it was planned."""
        planned = math.sqrt(self.square_norm / (self.num_embeddings * self.embedding_dim))
        found = math.sqrt(report.square_norm / (report.num_embeddings * report.embedding_dim))
        changes = []
        for what, before, after, form in (
            ("rows", self.num_embeddings, report.num_embeddings, ",d"),
            ("loss", self.loss, report.loss, ".5f"),
            ("root mean square", planned, found, ".3g"),
        ):
            if not before <= MOST_CHANGE * after <= MOST_CHANGE**2 * before:
                changes.append(f"{what} {before:{form}} -> {after:{form}}")
        return changes

    def measured(self, report: TableReport) -> "PlannedTable":
        """Return it with what packing came to in place of what was measured on a sample."""
        return replace(self, loss=report.loss, square_norm=report.square_norm)

    def as_json(self) -> dict[str, Any]:
        """Return what a plan's file has of it."""
        return {
            "name": self.name,
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "method": self.variant.parsed_method.spec,
            "bits": self.variant.bits,
            "param_dtype": self.variant.param_dtype,
            "rotation": self.variant.rotate,
            "loss": self.loss,
            "square_norm": self.square_norm,
            "error_share": self.error_share,
            "reason": self.reason,
        }

    @classmethod
    def from_json(cls, where: str, raw: Any) -> "PlannedTable":
        """Read what a plan's file has of a table.

        Raises:
            FormatError: it is not what as_json returns.
        """
        if not isinstance(raw, dict) or raw.keys() != _CHECKS.keys():
            found = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
            raise FormatError(f"{where} has {found}, but a table has {sorted(_CHECKS)}")
        for key, is_right in _CHECKS.items():
            if not is_right(raw[key]):
                raise FormatError(f"{where}: {key} is {raw[key]!r:.80}")
        variant = Variant(*(raw.pop(key) for key in ("method", "bits", "param_dtype", "rotation")))
        try:
            variant.make_row_format(raw["embedding_dim"])
        except (TypeError, ValueError) as error:
            raise FormatError(f"{where}: {error}") from None
        return cls(variant=variant, **raw)

    def __str__(self) -> str:
        return f"{printable(self.name)}: {self.variant}, loss {self.loss:.5f}; {self.reason}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and is_utf8(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 63


def is_measure(value: Any) -> bool:
    """Whether a value of JSON, which Python reads with integers of any size, is a finite number from 0 on."""
    return type(value) in (int, float) and 0 <= value < 1e300


_CHECKS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("name", "method", "param_dtype", "reason"), _is_text),
    **dict.fromkeys(("num_embeddings", "embedding_dim"), _is_count),
    **dict.fromkeys(("loss", "square_norm"), is_measure),
    "bits": lambda value: type(value) in (int, float) and 0 < value < 64,
    "rotation": lambda value: value is None or _is_text(value),
    "error_share": lambda value: is_measure(value) and value <= 1,
}
