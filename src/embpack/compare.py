"""Methods side by side on a table: loss, bytes, speed, and the rows that fare worst."""

import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from embpack.layouts import LEAST_SHARED_DIM, RowFormat, default_param_dtype
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
        bits: of each code; float where it has a fraction.
        param_dtype: "float16" or "float32"; None is what quantize takes for the method and bits.
        rotate: what quantize takes.
    """

    method: str
    bits: float
    param_dtype: str | None = None
    rotate: str | None = None

    def __str__(self) -> str:
        params = f" with {self.param_dtype} parameters" if self.param_dtype else ""
        return f"{self.name} at {self.bits} bits{params}"

    @property
    def name(self) -> str:
        """The method, and the rotation if there is one."""
        return f"{self.method}, {self.rotate}" if self.rotate else self.method


@dataclass(frozen=True)
class Comparison:
    """What packing a table in one way comes to.

    Attributes:
        table: its name.
        layout: of the packed rows.
        loss: normalized l2 loss ||X - Q(X)|| / ||X|| over all rows that were measured.
        bytes_per_row: of everything that packing the whole table leaves, codebooks included, by its number of rows.
        share_of_float32: those bytes as a share of the row in float32.
        worst_row: number of the row with the largest loss of its own.
        worst_row_loss: that loss.
        row_losses: normalized l2 loss of single rows at QUANTILES. A row of zeros has no loss of its own and is left
            out here and in worst_row.
        rows_per_second: that quantize packs in memory, with as many threads as are set.
    """

    table: str
    method: str
    bits: float
    param_dtype: str
    rotate: str | None
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
        return Variant(self.method, self.bits, self.param_dtype, self.rotate)


@dataclass(frozen=True)
class Skipped:
    """A way in which a table cannot be packed, and why."""

    table: str
    variant: Variant
    reason: str


# Beside every method at 4 bits, what is compared if nobody says.
_OTHERS = (
    *(Variant(method, bits) for method in ("asym", DEFAULT_METHOD) for bits in (2, 8)),
    *(Variant("trellis", bits) for bits in (2, 3, 6)),
    *(Variant(method, 4, rotate="hadamard") for method in (DEFAULT_METHOD, "trellis")),
)


def make_variants(
    methods: Sequence[str | Method] | None = None,
    bits: float | Sequence[float] | None = None,
    param_dtype: str | Sequence[str] | None = None,
    rotate: str | Sequence[str | None] | None = None,
) -> list[Variant]:
    """List what is compared: every method at every number of bits, with every type of parameters and rotation.

    Args:
        methods: as for quantize; None is all of embpack.METHODS, each at the bits that it has.
        bits: one or more numbers that quantize takes; None is 4, and where nothing else is said, asym and optimal also
            at 2 and 8, trellis at 2, 3 and 6, and optimal and trellis of rotated rows.
        param_dtype: one or more of "float16" and "float32"; None is what quantize takes for the method and bits.
        rotate: one or more of None and "hadamard".

    Raises:
        ValueError: no such method, param_dtype or rotation, bits that no method has, or an empty list of them.
    """
    names = [_name(method) for method in (METHODS if methods is None else methods)]
    dtypes, rotations = _as_list(param_dtype), _as_list(rotate)
    variants = []
    for number in (4,) if bits is None else bits if isinstance(bits, Sequence) else (bits,):
        refused = [_find_refusal(name, number, dtype) for name in names for dtype in dtypes]
        if refused and all(refused):
            raise ValueError(refused[0])
        own = product(names, [number], dtypes, rotations)
        variants += [Variant(*way) for way in own if methods is not None or not _find_refusal(way[0], number, way[2])]
    variants.sort(key=lambda variant: names.index(variant.method))
    if methods is None and bits is None and rotate is None:
        variants += [Variant(each.method, each.bits, dtype, each.rotate) for each in _OTHERS for dtype in dtypes]
        variants = [each for each in variants if not _find_refusal(each.method, each.bits, each.param_dtype)]
    if not variants:
        raise ValueError("there is nothing to compare; give at least one method, number of bits and param_dtype")
    for rotation in rotations:
        RowFormat(1, rotation=rotation)  # refuses what there is not
    return list(dict.fromkeys(variants))


def _as_list(values: Any) -> Sequence[Any]:
    return (values,) if values is None or isinstance(values, str) else values


def _find_refusal(method: str, bits: float, param_dtype: str | None) -> str | None:
    """Say why no row is packed so, None if rows are."""
    layout = parse_method(method).layout
    try:
        RowFormat(LEAST_SHARED_DIM, bits, param_dtype or default_param_dtype(bits, layout), layout)
    except TypeError:
        return f"bits is {bits}; choose 2, 4 or 8"
    except ValueError as error:
        return str(error)
    return None


def _name(method: str | Method) -> str:
    """Name a method as its user would, after a check that there is such a one."""
    parsed = parse_method(method)
    if isinstance(method, str):
        return method
    return parsed.name if parsed == METHODS[parsed.name]() else parsed.spec


def compare(
    weight: Any,
    methods: Sequence[str | Method] | None = None,
    bits: float | Sequence[float] | None = None,
    param_dtype: str | Sequence[str] | None = None,
    rotate: str | Sequence[str | None] | None = None,
) -> list[Comparison]:
    """Pack a table in several ways and measure each.

    Args:
        weight: as for quantize: [num_embeddings, embedding_dim] of float32, float16 or bfloat16.
        methods: names, with parameters if need be, or Methods; None is all of embpack.METHODS.
        bits: one or more numbers that quantize takes; None is 4, and where nothing else is said, asym and optimal also
            at 2 and 8, trellis at 2, 3 and 6, and optimal and trellis of rotated rows.
        param_dtype: one or more of "float16" and "float32"; None is what quantize takes for the method and bits.
        rotate: one or more of None and "hadamard".

    Returns:
        One Comparison for each method, bits, param_dtype and rotation, in this order; combinations that a method does
        not support are left out with a warning.

    Raises:
        TypeError: weight is of another type.
        ValueError: weight is not 2-D, is empty or has NaN or infinity; no such method, bits, param_dtype or
            rotation; or nothing asked for can be done.
    """
    rows, dtype = as_rows(weight)
    variants = make_variants(methods, bits, param_dtype, rotate)
    results, skipped = compare_rows(widen(rows) if dtype == "bfloat16" else rows, variants, "weight")
    for item in skipped:
        warnings.warn(f"left out {item.variant}: {item.reason}", stacklevel=2)
    return results


def compare_rows(
    rows: NDArray[Any],
    variants: Sequence[Variant],
    name: str,
    numbers: NDArray[np.int64] | None = None,
    num_embeddings: int | None = None,
    progress: Callable[[str, int], None] = lambda name, rows: None,
) -> tuple[list[Comparison], list[Skipped]]:
    """Do what compare does, for a sample of a table.

    Args:
        rows: float32 or float16 [n, embedding_dim].
        variants: how to pack them.
        name: of the table.
        numbers: int64 [n], of the rows in the table; None is 0 to n - 1.
        num_embeddings: rows of the table; None is n.
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
            results.append(_describe(rows, table, variant, name, numbers, num_embeddings or len(rows), seconds))
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
        table = quantize(rows, variant.method, variant.bits, variant.param_dtype, rotate=variant.rotate)
        times.append(time.perf_counter() - started)
    return table, min(times)


def _describe(
    rows: NDArray[Any],
    table: PackedTable,
    variant: Variant,
    name: str,
    numbers: NDArray[np.int64],
    num_embeddings: int,
    seconds: float,
) -> Comparison:
    assert table.loss is not None  # quantize measures it
    losses = measure_rows(rows, table)
    of_rows = np.flatnonzero(~np.isnan(losses))
    worst = int(of_rows[losses[of_rows].argmax()]) if of_rows.size else 0
    shown = np.quantile(losses[of_rows], QUANTILES) if of_rows.size else np.zeros(len(QUANTILES))
    shared = 0 if table.codebooks is None else table.codebooks.nbytes
    bytes_per_row = (table.nbytes - shared) / len(rows) + shared / num_embeddings
    return Comparison(
        table=name,
        method=variant.method,
        bits=variant.bits,
        param_dtype=table.row_format.param_dtype,
        rotate=variant.rotate,
        layout=table.layout,
        loss=table.loss,
        bytes_per_row=bytes_per_row,
        share_of_float32=bytes_per_row / (4 * rows.shape[1]),
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


# A rotation counts only if the loss without it is so many times as much: lookups have to undo it.
_LEAST_GAIN = 1.01


def find_front(results: Sequence[Result]) -> list[Result]:
    """Find the Pareto front: the results that are smaller than float32 and that no other beats.

    A result beats another if it has fewer bytes and no more loss, or less loss and no more bytes; of equal ones the
    first counts. Results of rotated rows are left out unless they lose 1 % less than the same without rotation. The
    front comes by rising bytes, that is, by falling loss.
    """
    plain = {result.variant: result.loss for result in results if result.rotate is None}
    front: list[Result] = []
    for result in sorted(results, key=lambda result: (result.bytes_per_row, result.loss)):
        unrotated = plain.get(replace(result.variant, rotate=None), math.inf)
        if result.rotate is not None and unrotated < _LEAST_GAIN * result.loss:
            continue
        if result.share_of_float32 < 1 and (not front or result.loss < front[-1].loss):
            front.append(result)
    return front


def name_variant(result: Comparison, others: Iterable[Comparison]) -> str:
    """Name a result as short as tells it from the others of the same method and bits."""
    name = result.variant.name
    twins = {other.param_dtype for other in others if (other.variant.name, other.bits) == (name, result.bits)}
    return f"{name}, {result.param_dtype}" if len(twins) > 1 else name
