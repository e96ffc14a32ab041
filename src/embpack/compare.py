"""Methods side by side on a table: loss, bytes, speed, and the rows that fare worst."""

import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from embpack.layouts import RowFormat
from embpack.methods import DEFAULT_METHOD, METHODS, Method, parse_method
from embpack.quantize import quantize, span_rows
from embpack.rows import as_rows, widen
from embpack.table import PackedTable

# What the losses of the rows are summed up by.
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
# A fast method is timed this often, and the fastest time counts: the first run pays for new memory.
_MOST_RUNS, _ENOUGH_SECONDS = 3, 0.2


@dataclass(frozen=True)
class Variant:
    """One way to pack a table.

    Attributes:
        method: as parse_method reads it: "greedy", "greedy:b=1000,r=0.5".
        bits: of each code.
        param_dtype: "float16" or "float32"; None is what quantize takes for the method and bits.
    """

    method: str
    bits: int
    param_dtype: str | None = None

    def __str__(self) -> str:
        params = f" with {self.param_dtype} parameters" if self.param_dtype else ""
        return f"{self.method} at {self.bits} bits{params}"


@dataclass(frozen=True)
class Comparison:
    """What packing a table in one way comes to.

    Attributes:
        table: its name.
        layout: of the packed rows.
        loss: normalized l2 loss ||X - Q(X)|| / ||X|| over all rows that were measured.
        bytes_per_row: of everything that packing leaves, codebooks included, by the number of rows.
        share_of_float32: those bytes as a share of the row in float32.
        worst_row: number of the row with the largest loss of its own.
        worst_row_loss: that loss.
        row_losses: normalized l2 loss of single rows at QUANTILES. A row of zeros has no loss of its own and is left
            out here and in worst_row.
        rows_per_second: that quantize packs in memory, with as many threads as are set.
    """

    table: str
    method: str
    bits: int
    param_dtype: str
    layout: str
    loss: float
    bytes_per_row: float
    share_of_float32: float
    worst_row: int
    worst_row_loss: float
    row_losses: tuple[float, ...]
    rows_per_second: float

    @property
    def variant(self) -> Variant:
        """How the table was packed."""
        return Variant(self.method, self.bits, self.param_dtype)


@dataclass(frozen=True)
class Skipped:
    """A way in which a table cannot be packed, and why."""

    table: str
    variant: Variant
    reason: str


def make_variants(
    methods: Sequence[str | Method] | None = None,
    bits: int | Sequence[int] | None = None,
    param_dtype: str | Sequence[str] | None = None,
) -> list[Variant]:
    """List what is compared: every method at every number of bits with every type of parameters.

    Args:
        methods: as for quantize; None is all of embpack.METHODS.
        bits: one or more of 2, 4 and 8; None is 4, and where methods is None too, asym and optimal also at 2 and 8.
        param_dtype: one or more of "float16" and "float32"; None is what quantize takes for the method and bits.

    Raises:
        ValueError: no such method, bits or param_dtype, or an empty list of them.
    """
    pairs = list(product([_name(method) for method in (METHODS if methods is None else methods)], _as_bits(bits)))
    if methods is None and bits is None:
        pairs += product(("asym", DEFAULT_METHOD), (2, 8))
    dtypes = (param_dtype,) if isinstance(param_dtype, str) or param_dtype is None else param_dtype
    variants = [Variant(name, n, dtype) for name, n in pairs for dtype in dtypes]
    for variant in variants:
        RowFormat(1, variant.bits, variant.param_dtype or "float16")  # refuses what there is not
    if not variants:
        raise ValueError("there is nothing to compare; give at least one method, number of bits and param_dtype")
    return list(dict.fromkeys(variants))


def _name(method: str | Method) -> str:
    """Name a method as its user would, after a check that there is such a one."""
    parsed = parse_method(method)
    if isinstance(method, str):
        return method
    return parsed.name if parsed == METHODS[parsed.name]() else parsed.spec


def _as_bits(bits: int | Sequence[int] | None) -> Sequence[int]:
    if bits is None:
        return (4,)
    return bits if isinstance(bits, Sequence) else (bits,)


def compare(
    weight: Any,
    methods: Sequence[str | Method] | None = None,
    bits: int | Sequence[int] | None = None,
    param_dtype: str | Sequence[str] | None = None,
) -> list[Comparison]:
    """Pack a table in several ways and measure each.

    Args:
        weight: as for quantize: [num_embeddings, embedding_dim] of float32, float16 or bfloat16.
        methods: names, with parameters if need be, or Methods; None is all of embpack.METHODS.
        bits: one or more of 2, 4 and 8; None is 4, and where methods is None too, asym and optimal also at 2 and 8.
        param_dtype: one or more of "float16" and "float32"; None is what quantize takes for the method and bits.

    Returns:
        One Comparison for each method, bits and param_dtype, in this order; combinations that a method does not
        support are left out with a warning.

    Raises:
        TypeError: weight is of another type.
        ValueError: weight is not 2-D, is empty or has NaN or infinity; no such method, bits or param_dtype; or
            nothing asked for can be done.
    """
    rows, dtype = as_rows(weight)
    variants = make_variants(methods, bits, param_dtype)
    results, skipped = compare_rows(widen(rows) if dtype == "bfloat16" else rows, variants, "weight")
    for item in skipped:
        warnings.warn(f"left out {item.variant}: {item.reason}", stacklevel=2)
    return results


def compare_rows(
    rows: NDArray[Any],
    variants: Sequence[Variant],
    name: str,
    numbers: NDArray[np.int64] | None = None,
    progress: Callable[[str, int], None] = lambda name, rows: None,
) -> tuple[list[Comparison], list[Skipped]]:
    """Do what compare does, for a sample of a table.

    Args:
        rows: float32 or float16 [n, embedding_dim].
        variants: how to pack them.
        name: of the table.
        numbers: int64 [n], of the rows in the table; None is 0 to n - 1.
        progress: called with the name and n for each variant that is done.

    Raises:
        ValueError: a value is NaN or infinite, or no variant can be done.
    """
    numbers = np.arange(len(rows)) if numbers is None else numbers
    _refuse_not_finite(rows, name, numbers)
    results, skipped = [], []
    for variant in variants:
        try:
            table, seconds = _time(rows, variant)
        except ValueError as error:
            skipped.append(Skipped(name, variant, _name_place(str(error), name, numbers)))
        else:
            results.append(_describe(rows, table, variant, name, numbers, seconds))
        progress(name, len(rows))
    if not results:
        raise ValueError(f"{name}: nothing asked for can be done; {skipped[0].variant}: {skipped[0].reason}")
    return results, skipped


def _refuse_not_finite(rows: NDArray[Any], name: str, numbers: NDArray[np.int64]) -> None:
    finite = np.isfinite(rows)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise ValueError(
            f"{name}[{numbers[row]}, {column}] is {rows[row, column]}; NaN and infinity cannot be packed, replace "
            "them first"
        )


def _name_place(message: str, name: str, numbers: NDArray[np.int64]) -> str:
    """Name a row of the table where quantize names one of the sample."""
    return re.sub(r"^weight\[(\d+)", lambda found: f"{name}[{numbers[int(found[1])]}", message)


def _time(rows: NDArray[Any], variant: Variant) -> tuple[PackedTable, float]:
    """Pack, and return the seconds of the fastest run."""
    times: list[float] = []
    while len(times) < _MOST_RUNS and sum(times) < _ENOUGH_SECONDS:
        started = time.perf_counter()
        table = quantize(rows, variant.method, variant.bits, variant.param_dtype)
        times.append(time.perf_counter() - started)
    return table, min(times)


def _describe(
    rows: NDArray[Any],
    table: PackedTable,
    variant: Variant,
    name: str,
    numbers: NDArray[np.int64],
    seconds: float,
) -> Comparison:
    assert table.loss is not None  # quantize measures it
    losses = measure_rows(rows, table)
    of_rows = np.flatnonzero(~np.isnan(losses))
    worst = int(of_rows[losses[of_rows].argmax()]) if of_rows.size else 0
    shown = np.quantile(losses[of_rows], QUANTILES) if of_rows.size else np.zeros(len(QUANTILES))
    return Comparison(
        table=name,
        method=variant.method,
        bits=variant.bits,
        param_dtype=table.row_format.param_dtype,
        layout=table.layout,
        loss=table.loss,
        bytes_per_row=table.nbytes / len(rows),
        share_of_float32=table.nbytes / (4 * rows.size),
        worst_row=int(numbers[worst]),
        worst_row_loss=float(losses[worst]) if of_rows.size else 0.0,
        row_losses=tuple(map(float, shown)),
        rows_per_second=len(rows) / seconds,
    )


def measure_rows(rows: NDArray[Any], table: PackedTable) -> NDArray[np.float64]:
    """Measure the normalized l2 loss of each row [n], a few at a time; NaN for a row of zeros."""
    losses = np.empty(len(rows))
    step = span_rows(rows.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, min(start + step, len(rows)))
        values = rows[part].astype(np.float64)
        errors = values - table[np.arange(part.start, part.stop)]
        norms = np.sqrt(np.square(values).sum(axis=1))
        with np.errstate(invalid="ignore", divide="ignore"):
            losses[part] = np.where(norms > 0, np.sqrt(np.square(errors).sum(axis=1)) / norms, math.nan)
    return losses


Result = TypeVar("Result", bound=Comparison)


def find_front(results: Sequence[Result]) -> list[Result]:
    """Find the Pareto front: the results that are smaller than float32 and that no other beats.

    A result beats another if it has fewer bytes and no more loss, or less loss and no more bytes; of equal ones the
    first counts. The front comes by rising bytes, that is, by falling loss.
    """
    front: list[Result] = []
    for result in sorted(results, key=lambda result: (result.bytes_per_row, result.loss)):
        if result.share_of_float32 < 1 and (not front or result.loss < front[-1].loss):
            front.append(result)
    return front


def name_variant(result: Comparison, others: Iterable[Comparison]) -> str:
    """Name a result as short as tells it from the others of the same method and bits."""
    twins = {other.param_dtype for other in others if (other.method, other.bits) == (result.method, result.bits)}
    return f"{result.method}, {result.param_dtype}" if len(twins) > 1 else result.method
