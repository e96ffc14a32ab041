"""Methods side by side on the tables of a checkpoint, and which of them to choose."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embpack.arithmetic import sum_squares
from embpack.chunks import chunk_rows
from embpack.comparison.array import Comparison, Sample, Skipped, compare_rows
from embpack.comparison.choice import Recommendation, keep_readable, recommend
from embpack.comparison.front import find_front
from embpack.comparison.metric import Metrics
from embpack.formats import SourceTensor
from embpack.formats.dtypes import ARRAY_DTYPES
from embpack.layouts import LAYOUTS, RowFormat
from embpack.methods import parse_method
from embpack.readers import READERS
from embpack.rows import spread_rows
from embpack.rules import Decision
from embpack.text import quote
from embpack.variant import Variant


@dataclass(frozen=True)
class TableComparison:
    """What a table comes to.

    Attributes:
        rows_measured: those of the sample, packed as a table of their own, or all.
        square_norm: sum of the squares of their values.
        results: one for each way in which the table could be packed.
        weight_bytes: of the table that is not packed.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    dtype: str
    rows_measured: int
    square_norm: float
    results: tuple[Comparison, ...]
    skipped: tuple[Skipped, ...]
    weight_bytes: int

    def describe_sample(self) -> str:
        """Say what was measured."""
        table = f"{self.num_embeddings:,} rows of {self.embedding_dim} {self.dtype} values"
        if self.rows_measured == self.num_embeddings:
            return f"{table}, all measured"
        return f"{table}, {self.rows_measured:,} of them measured, evenly spread"


@dataclass(frozen=True)
class Total(Comparison):
    """What all tables together come to, each sample standing for all rows of its table.

    Attributes:
        worst_table: the table that worst_row is in; row_losses is empty.
    """

    worst_table: str


@dataclass(frozen=True)
class FileComparison:
    """What the tables of a checkpoint come to.

    Attributes:
        src: path of the checkpoint.
        tables: in file order, at least one.
        include, exclude: globs that chose the tables.
        threads: how many packed them.
        readers: who must be able to read what is recommended, as recommend takes them.
        prefer: what counts most in what is recommended, as recommend takes it.
        metrics: the user's own figure, or None.
    """

    src: Path
    tables: tuple[TableComparison, ...]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    threads: int
    readers: tuple[str, ...] = ()
    prefer: str = "loss"
    metrics: Metrics | None = None

    @cached_property
    def overall(self) -> Sequence[Comparison]:
        """What to choose by: totals of several tables, or the results of the only one."""
        overall = find_overall(self.tables)
        return self.metrics.add_to(overall) if self.metrics else overall

    @property
    def front(self) -> list[Comparison]:
        """The best way at each size, of those that all readers read."""
        return self.find_front(self.overall)

    def find_front(self, results: Sequence[Comparison]) -> list[Comparison]:
        """Find the best of some results at each size, of those that all readers read."""
        return find_front(keep_readable(results, self.readers))

    @cached_property
    def recommendation(self) -> Recommendation | None:
        """What to choose for these readers and by what counts most, and why; see recommend."""
        return recommend(self.overall, self.readers, self.prefer, default_bytes=self.default_bytes)

    @property
    def recommended(self) -> Comparison | None:
        """The way that is recommended; None if nothing is smaller than the weights and read by all readers."""
        return self.recommendation.result if self.recommendation else None

    def explain_nothing(self) -> str:
        """Say why nothing is recommended."""
        read = f" and is read by {', '.join(self.readers)}" if self.readers else ""
        return f"No way that was measured makes all of these tables smaller{read}."

    @property
    def default_bytes(self) -> float:
        """Bytes a row that quantize's defaults take."""
        rows = sum(table.num_embeddings for table in self.tables)
        packed = sum(table.num_embeddings * RowFormat(table.embedding_dim).row_bytes for table in self.tables)
        return packed / rows

    def write_command(self, result: Comparison) -> str:
        """Write the command that packs the checkpoint in one way, ready for a shell."""
        words = ["embpack", "quantize", str(self.src), str(_name_packed(self.src, result))]
        words += ["--method", result.method, "--bits", str(result.bits), "--param-dtype", result.param_dtype]
        words += ["--rotate", result.rotate] if result.rotate else []
        for option, globs in (("--include", self.include), ("--exclude", self.exclude)):
            words += [word for glob in globs for word in (option, glob)]
        return " ".join(map(quote, words))


def count_rows(decision: Decision, most: int | None) -> int:
    """Count the rows of a table that are measured; most None is all."""
    rows = decision.tensor.shape[0]
    return rows if most is None else min(rows, most)


def read_sample(decision: Decision, most_rows: int | None) -> Sample:
    """Read the rows of a table that are measured.

    Args:
        decision: on a tensor that is a table.
        most_rows: of a larger table this many rows are measured, evenly spread; None is all, in memory.

    Raises:
        FormatError: the source is damaged.
        ValueError: a value that was looked at is NaN or infinite.
    """
    tensor = decision.tensor
    numbers = spread_rows(tensor.shape[0], count_rows(decision, most_rows))
    rows = _read_rows(tensor, numbers)
    of_table = tensor.shape[0], decision.place, decision.bytes_before
    return Sample.make(tensor.name, rows, decision.dtype, numbers, *of_table)


def compare_sample(
    sample: Sample, variants: Sequence[Variant], progress: Callable[[str, int], None] = lambda name, rows: None
) -> TableComparison:
    """Compare on one table.

    Args:
        sample: the rows that are measured.
        variants: how to pack them.
        progress: called with the table's name and the number of rows for each variant that is done.

    Raises:
        ValueError: no variant can be done.
    """
    results, skipped = compare_rows(sample, variants, progress)
    rows = sample.rows
    return TableComparison(
        name=sample.name,
        num_embeddings=sample.num_embeddings,
        embedding_dim=rows.shape[1],
        dtype=sample.dtype,
        rows_measured=len(rows),
        square_norm=sum_squares(rows),
        results=tuple(results),
        skipped=tuple(skipped),
        weight_bytes=sample.weight_bytes,
    )


def _read_rows(tensor: SourceTensor, numbers: NDArray[np.int64]) -> NDArray[Any]:
    """Read chosen rows, in rising order."""
    step = chunk_rows(tensor.shape[1])
    rows = np.empty((len(numbers), tensor.shape[1]), ARRAY_DTYPES[tensor.dtype])
    for i, chunk in enumerate(tensor.chunks(step)):
        begin, end = np.searchsorted(numbers, (i * step, i * step + len(chunk)))
        rows[begin:end] = chunk[numbers[begin:end] - i * step]
    return rows


def find_overall(tables: Sequence[TableComparison]) -> Sequence[Comparison]:
    """Find what to choose by: totals of several tables, or the results of the only one."""
    return sum_tables(tables) if len(tables) > 1 else tables[0].results


def sum_tables(tables: Sequence[TableComparison]) -> list[Total]:
    """Sum up what was measured on every table: one Total for each variant that all tables could be packed in."""
    by_table = [{result.variant: result for result in table.results} for table in tables]
    everywhere = [variant for variant in by_table[0] if all(variant in results for results in by_table)]
    return [_sum(tables, [results[variant] for results in by_table]) for variant in everywhere]


def _sum(tables: Sequence[TableComparison], results: Sequence[Comparison]) -> Total:
    squares = [table.square_norm * table.num_embeddings / table.rows_measured for table in tables]
    errors = [result.loss**2 * square for result, square in zip(results, squares, strict=True)]
    rows = [table.num_embeddings for table in tables]
    packed = sum(result.bytes_per_row * n for result, n in zip(results, rows, strict=True))
    values = [table.num_embeddings * table.embedding_dim for table in tables]
    before = sum(table.weight_bytes for table in tables)
    worst = max(results, key=lambda result: result.worst_row_loss)
    layouts = dict.fromkeys(result.layout for result in results)
    return Total(
        table="total",
        method=worst.method,
        bits=worst.bits,
        param_dtype=worst.param_dtype,
        rotate=worst.rotate,
        layout=", ".join(layouts),
        loss=math.sqrt(sum(errors) / sum(squares)) if sum(squares) else 0.0,
        bytes_per_row=packed / sum(rows),
        share_of_float32=packed / (4 * sum(values)),
        is_smaller=packed < before,
        worst_row=worst.worst_row,
        worst_row_loss=worst.worst_row_loss,
        row_losses=(),
        rows_per_second=_mean_rate(rows, [result.rows_per_second for result in results]),
        lookups_per_second=_mean_rate(rows, [result.lookups_per_second for result in results]),
        readers=tuple(reader for reader in READERS if all(reader in result.readers for result in results)),
        worst_table=worst.table,
    )


def _mean_rate(rows: Sequence[int], rates: Sequence[float]) -> float:
    """Rows a second over all tables, each with a rate of its own."""
    return sum(rows) / sum(n / rate for n, rate in zip(rows, rates, strict=True))


def _name_packed(src: Path, result: Comparison) -> Path:
    """Name the packed checkpoint by how it is packed, beside the source: a folder if that is in shards."""
    default = LAYOUTS[parse_method(result.method).layout].default_param_dtype(result.bits)
    parts = [re.sub(r"[^\w.=]+", "-", result.method), f"{result.bits}bit", result.rotate]
    parts += [result.param_dtype] if result.param_dtype != default else []
    way = "-".join(part for part in parts if part)
    if src.is_dir() or src.suffix == ".json":
        folder = src if src.is_dir() else src.parent
        folder = folder if folder.name else folder.resolve()
        return folder.with_name(f"{folder.name}-{way}")
    return src.with_name(f"{src.stem}-{way}.safetensors")
