"""Which method and how many bits each table of a model gets: the least error in the bytes that there are."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embpack.comparison.array import Comparison, Sample
from embpack.comparison.checkpoint import ABOUT, TableComparison, compare_sample, compare_table
from embpack.comparison.front import find_front
from embpack.convert import check_max_loss
from embpack.errors import naming
from embpack.formats import open_checkpoint
from embpack.layouts import LAYOUTS, RowFormat
from embpack.rows import as_rows, spread_rows
from embpack.rules import Decision, Rules, decide_all, list_names, match_names, suggest
from embpack.selection import list_ways, select_variants
from embpack.sizes import parse_size
from embpack.text import printable
from embpack.variant import Variant

# The variants that are measured by default.
VARIANTS = tuple(select_variants())
# Rows that a table is measured by, evenly spread.
SAMPLE_ROWS = 20_000
# Sums of choices that are kept after each table. Models of few tables never have more; others lose next to nothing.
MOST_SUMS = 1 << 14
# Larger ones are taken for a mistake, or mean no limit, and their squares and sums might overflow.
_MOST_COUNT, _MOST_LOSS = 1e18, 1e9


@dataclass(frozen=True)
class PlannedTable:
    """What a table becomes.

    Attributes:
        variant: how it is packed.
        num_bytes: of the packed table.
        loss: normalized l2 loss, measured on a sample.
        reason: for the user to read.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    variant: Variant
    num_bytes: int
    loss: float
    reason: str


@dataclass(frozen=True)
class Plan:
    """What becomes of all tables; print shows it as a table.

    Attributes:
        tables: in the model's order.
        loss: normalized l2 loss over all tables; each row counts as often as it is looked up, where that is known.
        float32_bytes: of the tables before.
    """

    tables: tuple[PlannedTable, ...]
    loss: float
    float32_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all packed tables."""
        return sum(table.num_bytes for table in self.tables)

    @property
    def variants(self) -> dict[str, Variant]:
        """How each table is packed, by name: what quantize_file takes."""
        return {table.name: table.variant for table in self.tables}

    def __str__(self) -> str:
        rows = [("table", "rows", "dim", "method", "bits", "bytes", "l2 loss", "why")]
        rows += [
            (
                printable(table.name),
                f"{table.num_embeddings:,}",
                str(table.embedding_dim),
                table.variant.name,
                str(table.variant.bits),
                f"{table.num_bytes:,}",
                f"{table.loss:.5f}",
                table.reason,
            )
            for table in self.tables
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        left = (0, 3, 7)
        lines = [
            "  ".join(
                cell.ljust(width) if i in left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        share = self.num_bytes / self.float32_bytes
        lines.append(f"{self.num_bytes:,} bytes, {share:.2%} of float32; l2 loss {self.loss:.5f}")
        layouts = dict.fromkeys(table.variant.parsed_method.layout for table in self.tables)
        lines += [f"{name}: {LAYOUTS[name].caution}" for name in layouts if LAYOUTS[name].caution]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Measured:
    """A table that was measured, and the ways to pack it that no other beats, by rising bytes.

    Attributes:
        weight: how often one of its rows counts.
        front: the ways.
    """

    table: TableComparison
    weight: float
    front: tuple[Comparison, ...]

    @classmethod
    def make(cls, table: TableComparison, access_counts: Mapping[str, float]) -> "_Measured":
        """Choose among the ways; each row counts 1 where nobody has counted."""
        weight = access_counts[table.name] / table.num_embeddings if table.name in access_counts else 1.0
        smallest = min(table.results, key=lambda result: result.bytes_per_row)
        return cls(table, weight, tuple(find_front(table.results) or [smallest]))

    @property
    def square_norm(self) -> float:
        """Sum of the squares of all values of the table."""
        return self.table.square_norm * self.table.num_embeddings / self.table.rows_measured

    @property
    def sizes(self) -> list[int]:
        """Bytes of the table in each of the ways."""
        return [round(result.bytes_per_row * self.table.num_embeddings) for result in self.front]

    @property
    def errors(self) -> list[float]:
        """Weighted squared error of the table in each of the ways."""
        return [self.weight * result.loss**2 * self.square_norm for result in self.front]


def plan(
    src: str | PathLike[str] | Mapping[str, Any],
    *,
    max_bytes: int | str | None = None,
    max_loss: float | None = None,
    variants: Sequence[Variant] = VARIANTS,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    chosen: Mapping[str, Variant] | None = None,
    readable_by: Sequence[str] = (),
    access_counts: Mapping[str, float] | None = None,
    progress: Callable[[str, int], None] = lambda name, rows: None,
) -> Plan:
    """Choose how to pack each table, by the loss measured on a sample of its rows.

    Without a limit, each table gets the least loss in the bytes that its uniform rows take at 4 bits, or 1 % more. With
    max_bytes, bits are spread over the tables so that the sum of all squared errors is least; with max_loss, so that
    the tables take the fewest bytes. For models of few tables the choice is the best one there is, for models of many
    it is close to that.

    Args:
        src: a checkpoint that quantize_file reads; or weights by name, as quantize takes them.
        max_bytes: of all packed tables, as parse_size reads it: a number, "2 GB", "100 KiB", or a share of their size
            in float32, "12.5 %".
        max_loss: the normalized l2 loss over all tables.
        variants: the ways to pack a table that are measured; embpack.selection.select_variants lists some, such as
            those at 4 bits.
        include: globs of tensor names, as quantize_file takes them.
        exclude: the same, of those never to pack.
        chosen: by name or glob, as quantize_file takes variants, how tables are packed for which there is nothing to
            choose; their bytes and errors count.
        readable_by: names in embpack.readers.READERS: only ways are chosen that all of these read as they are.
        access_counts: by a table's name, how often rows of it are looked up, all in the same time; a row's error counts
            this divided by the table's number of rows. Rows of tables that are not named count 1 each.
        progress: called with a table's name and a number of rows for each variant that was measured.

    Raises:
        FileNotFoundError: there is no src.
        FormatError: src is damaged.
        ValueError: no tensor is a table; a value is NaN or infinite; max_bytes or max_loss is no size or loss, or
            cannot be kept (the message says what can), or both are given; a glob matches nothing, or src is weights,
            among which they do not choose; there is no such reader, or a table in no way that all of them read;
            access_counts name something that is no table, or are not finite, or are
            negative or all 0; there are no weights or no variants.
        TypeError: a weight, a glob or a count is of another type.
    """
    limits = max_bytes, max_loss
    _check_limits(*limits)
    if not variants:
        raise ValueError("there are no variants to measure; give at least one")
    if not isinstance(src, Mapping):
        with open_checkpoint(Path(src)) as checkpoint:
            decisions = decide_all(checkpoint, Rules(include, exclude, variants=chosen or {}))
            return plan_decided(decisions, *limits, variants, access_counts, progress, readable_by=readable_by)
    if include or exclude:
        raise ValueError("include and exclude choose among tensors of a checkpoint; leave weights out of src instead")
    if not src:
        raise ValueError("src has no weights; give at least one")
    check_counts(access_counts or {}, list(src))
    tables = []
    own = {name: variant for pattern, variant in (chosen or {}).items() for name in match_names(pattern, src)}
    for name, weight in src.items():
        with naming(name):
            rows, dtype = as_rows(weight)
            ways = list_ways(rows.shape[1], variants, own.get(name), readable_by)
        numbers = spread_rows(len(rows), min(len(rows), SAMPLE_ROWS))
        sample = Sample.make(name, rows[numbers], dtype, numbers, len(rows))
        tables.append(compare_sample(sample, ways, progress))
    return _choose_variants(tables, *limits, access_counts or {})


def plan_decided(
    decisions: Sequence[Decision],
    max_bytes: int | str | None = None,
    max_loss: float | None = None,
    variants: Sequence[Variant] = VARIANTS,
    access_counts: Mapping[str, float] | None = None,
    progress: Callable[[str, int], None] = lambda name, rows: None,
    readable_by: Sequence[str] = (),
) -> Plan:
    """Do what plan does, for those tensors of an open checkpoint that are tables; is_chosen ones have one way."""
    _check_limits(max_bytes, max_loss)
    decided = [each for each in decisions if each.variant]
    check_counts(access_counts or {}, [each.tensor.name for each in decided])
    tables = []
    for each in decided:
        with naming(each.place):
            ways = list_ways(each.tensor.shape[1], variants, each.variant if each.is_chosen else None, readable_by)
        tables.append(compare_table(each, ways, SAMPLE_ROWS, progress))
    return _choose_variants(tables, max_bytes, max_loss, access_counts or {})


def _check_limits(max_bytes: int | str | None, max_loss: float | None) -> None:
    if max_bytes is not None and max_loss is not None:
        raise ValueError("give max_bytes or max_loss, not both")
    if max_loss is not None:
        check_max_loss(max_loss)


def _choose_variants(
    tables: Sequence[TableComparison],
    max_bytes: int | str | None,
    max_loss: float | None,
    access_counts: Mapping[str, float],
) -> Plan:
    measured = [_Measured.make(table, access_counts) for table in tables]
    float32_bytes = sum(4 * table.num_embeddings * table.embedding_dim for table in tables)
    square = sum(each.weight * each.square_norm for each in measured)
    if max_bytes is None and max_loss is None:
        chosen = [_choose_alone(each) for each in measured]
    else:
        with naming("max_bytes"):
            most_bytes = None if max_bytes is None else parse_size(max_bytes, float32_bytes)
        most_error = None if max_loss is None else min(max_loss, _MOST_LOSS) ** 2 * square
        best = choose([(each.sizes, each.errors) for each in measured], most_bytes, most_error)
        if best is None:
            raise ValueError(
                f"max_loss is {max_loss}, but the least loss is {_least_loss(measured, square):.5f}; allow that much, "
                "or exclude some"
                if max_bytes is None
                else _explain_max_bytes(max_bytes, measured, float32_bytes)
            )
        chosen = best
    total = sum(each.errors[i] for each, i in zip(measured, chosen, strict=True))
    planned = tuple(_describe(each, i, total) for each, i in zip(measured, chosen, strict=True))
    return Plan(planned, math.sqrt(total / square) if square else 0.0, float32_bytes)


def check_counts(access_counts: Mapping[str, float], names: Sequence[str]) -> None:
    """Check how often tables are looked up.

    Args:
        access_counts: as plan takes them.
        names: of the tables.

    Raises:
        TypeError: a count is no number.
        ValueError: a count is of something else, negative or not finite, or all are 0.
    """
    for name, number in access_counts.items():
        if name not in names:
            tables = list_names(names)
            raise ValueError(f"access_counts are of {name!r}, but the tables are {tables}; {suggest(name, names)}")
        what = f"access_counts[{name!r}] is"
        if isinstance(number, bool) or not isinstance(number, Real):
            kind = type(number).__name__
            raise TypeError(f"{what} of type {kind}; give a number: how often rows of the table are looked up in all")
        if not 0 <= number <= _MOST_COUNT:
            raise ValueError(f"{what} {number}; give a number from 0 to {_MOST_COUNT:g}")
    if names and all(access_counts.get(name) == 0 for name in names):
        raise ValueError("access_counts are all 0, so no error counts; leave them out, and each row counts the same")


def _explain_max_bytes(max_bytes: int | str, measured: Sequence[_Measured], float32_bytes: int) -> str:
    """Say which max_bytes can be kept, in the unit in which it was given."""
    least = sum(min(each.sizes) for each in measured)
    can, limit = f"{least:,} bytes", f"{max_bytes:,}" if isinstance(max_bytes, int) else str(max_bytes)
    if limit.rstrip().endswith("%"):
        # Rounded up, so that it can be kept.
        can += f", {math.ceil(least * 10_000 / float32_bytes) / 100} % of float32"
    return f"max_bytes is {limit}, but the tables take at least {can}; allow that much, or exclude some"


def _least_loss(measured: Sequence[_Measured], square: float) -> float:
    """The least loss that there is, rounded up so that it can be kept."""
    return math.ceil(1e5 * math.sqrt(sum(min(each.errors) for each in measured) / square)) / 1e5


def choose(
    options: Sequence[tuple[Sequence[int], Sequence[float]]], max_bytes: int | None, max_error: float | None
) -> list[int] | None:
    """Choose one option of each table: the least sum of errors within max_bytes, or of bytes within max_error.

    Sums of one option of each of the first tables, without those that another beats, are extended table by table.

    Args:
        options: of each table, bytes and errors of its options.
        max_bytes: the largest sum of bytes; None if max_error is given.
        max_error: the largest sum of errors; None if max_bytes is given.

    Returns:
        The number of each table's option; None if the limit cannot be kept.
    """
    sizes, errors = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for own_sizes, own_errors in options:
        all_sizes = np.add.outer(sizes, np.asarray(own_sizes, np.int64)).reshape(-1)
        all_errors = np.add.outer(errors, np.asarray(own_errors, float)).reshape(-1)
        order = np.lexsort((all_errors, all_sizes))
        best = np.minimum.accumulate(all_errors[order])
        kept = order[np.append(True, all_errors[order][1:] < best[:-1])]
        if len(kept) > MOST_SUMS:
            kept = kept[np.linspace(0, len(kept) - 1, MOST_SUMS).round().astype(np.int64)]
        sizes, errors = all_sizes[kept], all_errors[kept]
        steps.append((kept // len(own_sizes), kept % len(own_sizes)))
    # By rising bytes, and falling errors.
    most_bytes, most_error = (math.inf if limit is None else limit for limit in (max_bytes, max_error))
    fits = np.flatnonzero((sizes <= most_bytes) & (errors <= most_error))
    if not len(fits):
        return None
    at = int(fits[-1] if max_bytes is not None else fits[0])
    chosen = []
    for before, option in reversed(steps):
        chosen.append(int(option[at]))
        at = int(before[at])
    return chosen[::-1]


def _choose_alone(measured: _Measured) -> int:
    """The least loss in about the bytes of uniform rows at 4 bits; the fewest bytes if nothing is that small."""
    table = measured.table
    most = ABOUT * RowFormat(table.embedding_dim).row_bytes * table.num_embeddings
    return max((i for i, size in enumerate(measured.sizes) if size <= most), default=0)


def _describe(measured: _Measured, chosen: int, total: float) -> PlannedTable:
    table, sizes, errors = measured.table, measured.sizes, measured.errors
    result, size, error = measured.front[chosen], sizes[chosen], errors[chosen]
    if not measured.weight:
        reason = "never looked up"
    elif not error:
        reason = "no error"
    else:
        reason = f"{error / total:.0%} of the squared error; "
        if len(measured.table.results) == 1:
            reason += "the only way measured"
        elif chosen + 1 < len(measured.front):
            better = measured.front[chosen + 1]
            less, more = (error - errors[chosen + 1]) / total, sizes[chosen + 1] - size
            reason += f"{better.variant.name} at {better.bits} bits: {less:.0%} less for {more:,} bytes more"
        else:
            reason += "nothing measured has less"
    return PlannedTable(
        name=table.name,
        num_embeddings=table.num_embeddings,
        embedding_dim=table.embedding_dim,
        variant=result.variant,
        num_bytes=size,
        loss=result.loss,
        reason=reason,
    )
