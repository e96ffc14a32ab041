"""Methods side by side on the rows of a table: loss, bytes, speed, and the rows that fare worst."""

import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embpack.chunks import span_rows
from embpack.packing import pack
from embpack.readers import find_readers
from embpack.rows import ROW_DTYPES, explain_not_finite, widen
from embpack.rules import explain_growth
from embpack.table import PackedTable
from embpack.text import printable
from embpack.threads import get_num_threads, set_num_threads
from embpack.variant import Variant

# The quantiles by which the losses of single rows are summed up.
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
# A fast method is timed this often, and the fastest time counts: the first run pays for new memory.
_MOST_RUNS, _ENOUGH_SECONDS = 3, 0.2
# Lookups are timed so often, after a run that warms the cache; each sums so many bags.
_LOOKUP_RUNS, _NUM_BAGS, _BAG_SIZE = 5, 1000, 20


@dataclass(frozen=True)
class Comparison:
    """What packing a table in one way comes to.

    Attributes:
        table: its name.
        layout: of the packed rows.
        loss: normalized l2 loss ||X - Q(X)|| / ||X|| over all rows that were measured.
        bytes_per_row: of everything that packing the whole table leaves, codebooks included, by its number of rows.
        share_of_float32: those bytes as a share of the row in float32.
        is_smaller: whether the whole table takes fewer bytes than its weights, whatever their type; others are left as
            they are by quantize.
        worst_row: number of the row with the largest loss of its own.
        worst_row_loss: that loss.
        row_losses: normalized l2 loss of single rows at QUANTILES. A row of zeros has no loss of its own and is left
            out here and in worst_row.
        rows_per_second: that quantize packs in memory, with as many threads as are set.
        lookups_per_second: rows that embedding_bag sums on one thread, in bags of 20 rows drawn at random from what was
            packed, which lie in the cache if they fit there.
        readers: who else reads such rows as they are: names in embpack.readers.READERS. embpack reads all.
        metric: the user's own figure of all tables packed so; None if there is none, or this is one of several tables.
        metric_of_floats: the same of the float tables.
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
    is_smaller: bool
    worst_row: int
    worst_row_loss: float
    row_losses: tuple[float, ...]
    rows_per_second: float
    lookups_per_second: float
    readers: tuple[str, ...]
    metric: float | None = field(default=None, kw_only=True)
    metric_of_floats: float | None = field(default=None, kw_only=True)

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


@dataclass(frozen=True, eq=False)
class Sample:
    """Rows of a table by which ways to pack it are measured.

    Attributes:
        name: of the table.
        place: the table for messages: its name, after the file that it is in.
        dtype: what its weights are: "float32", "float16" or "bfloat16".
        rows: float32 or float16 [n, embedding_dim].
        numbers: int64 [n], theirs in the table.
        num_embeddings: rows of the table.
        weight_bytes: of the table that is not packed.
    """

    name: str
    place: str
    dtype: str
    rows: NDArray[Any]
    numbers: NDArray[np.int64]
    num_embeddings: int
    weight_bytes: int

    @classmethod
    def make(
        cls,
        name: str,
        rows: NDArray[Any],
        dtype: str,
        numbers: NDArray[np.int64],
        num_embeddings: int,
        place: str | None = None,
        weight_bytes: int | None = None,
    ) -> "Sample":
        """Make a sample of rows as as_rows or a file has them, bfloat16 as its bits in uint16.

        No place is the name, and no weight_bytes are those that the dtype takes.

        Raises:
            ValueError: a value is NaN or infinite; row, by its number in the table, and column are named.
        """
        values = widen(rows) if dtype == "bfloat16" else rows
        wrong = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(wrong):
            raise explain_not_finite(widen(values[wrong[0]]), place or printable(name), int(numbers[wrong[0]]))
        if weight_bytes is None:
            weight_bytes = num_embeddings * rows.shape[1] * ROW_DTYPES[dtype].itemsize
        return cls(name, place or printable(name), dtype, values, numbers, num_embeddings, weight_bytes)


def compare_rows(
    sample: Sample,
    variants: Sequence[Variant],
    progress: Callable[[str, int], None] = lambda name, rows: None,
) -> tuple[list[Comparison], list[Skipped]]:
    """Pack a sample of a table in several ways and measure each.

    Args:
        sample: what is packed.
        variants: how to pack it.
        progress: called with the table's name and the number of rows for each variant that is done.

    Raises:
        ValueError: no variant can be done.
    """
    results, skipped = [], []
    for variant in variants:
        try:
            table, seconds = _time(sample.rows, variant)
        except (TypeError, ValueError) as error:  # a TypeError of bits that have a fraction
            skipped.append(Skipped(sample.name, variant, name_place(str(error), sample)))
        else:
            results.append(_describe(sample, table, variant, seconds))
        progress(sample.name, len(sample.rows))
    if not results:
        raise ValueError(f"{sample.place}: nothing asked for can be done; {skipped[0].variant}: {skipped[0].reason}")
    return results, skipped


def name_place(message: str, sample: Sample) -> str:
    """Name a row of the table where quantize names one of the sample."""
    return re.sub(r"^weight\[(\d+)", lambda found: f"{sample.name}[{sample.numbers[int(found[1])]}", message)


def _time(rows: NDArray[Any], variant: Variant) -> tuple[PackedTable, float]:
    """Pack, and return the seconds of the fastest run."""
    times: list[float] = []
    while len(times) < _MOST_RUNS and sum(times) < _ENOUGH_SECONDS:
        started = time.perf_counter()
        table, _ = pack(rows, variant)
        times.append(time.perf_counter() - started)
    return table, min(times)


def _time_lookups(table: PackedTable) -> float:
    """Return how many rows a second one thread sums: the median of a few runs.

    More threads would do so few rows no sooner than it takes to wake them.
    """
    indices = np.random.default_rng(0).integers(0, len(table), (_NUM_BAGS, _BAG_SIZE))
    threads = get_num_threads()
    set_num_threads(1)
    try:
        times = [_time_call(lambda: table.embedding_bag(indices, mode="sum")) for _ in range(1 + _LOOKUP_RUNS)]
    finally:
        set_num_threads(threads)
    return indices.size / statistics.median(times[1:])


def _time_call(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _describe(sample: Sample, table: PackedTable, variant: Variant, seconds: float) -> Comparison:
    assert table.loss is not None  # quantize measures it
    rows = sample.rows
    losses = measure_rows(rows, table)
    of_rows = np.flatnonzero(~np.isnan(losses))
    worst = int(of_rows[losses[of_rows].argmax()]) if of_rows.size else 0
    shown = np.quantile(losses[of_rows], QUANTILES) if of_rows.size else np.zeros(len(QUANTILES))
    shared = 0 if table.codebooks is None else table.codebooks.nbytes
    bytes_per_row = (table.nbytes - shared) / len(rows) + shared / sample.num_embeddings
    return Comparison(
        table=sample.name,
        method=variant.spec,
        bits=variant.bits,
        param_dtype=table.row_format.param_dtype,
        rotate=variant.rotate,
        layout=table.layout,
        loss=table.loss,
        bytes_per_row=bytes_per_row,
        share_of_float32=bytes_per_row / (4 * rows.shape[1]),
        is_smaller=explain_growth(sample.weight_bytes, variant, sample.num_embeddings, rows.shape[1]) is None,
        worst_row=int(sample.numbers[worst]),
        worst_row_loss=float(losses[worst]) if of_rows.size else 0.0,
        row_losses=tuple(map(float, shown)),
        rows_per_second=len(rows) / seconds,
        lookups_per_second=_time_lookups(table),
        readers=find_readers(table.row_format),
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
