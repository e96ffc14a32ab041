"""compare: methods side by side on tables in memory."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from embpack.comparison.array import Comparison, Sample
from embpack.comparison.checkpoint import TableComparison, compare_sample, find_overall
from embpack.comparison.metric import Metric, Metrics, measure_floats, measure_packed, name_metric
from embpack.comparison.variants import make_variants
from embpack.errors import kind_of, naming
from embpack.methods import Method
from embpack.rows import as_rows
from embpack.variant import Variant


def compare(
    weight: Any,
    methods: str | Method | Sequence[str | Method] | None = None,
    bits: float | Sequence[float] | None = None,
    param_dtype: str | Sequence[str] | None = None,
    rotate: str | Sequence[str | None] | None = None,
    *,
    metric: Metric | None = None,
) -> list[Comparison]:
    """Pack a table, or several, in several ways and measure each.

    Args:
        weight: as for quantize: [num_embeddings, embedding_dim] of float32, float16 or bfloat16; or several by name.
        methods: one or more names, with parameters if need be, or Methods; None is all of embpack.METHODS.
        bits: one or more numbers that quantize takes; None is 4. If methods and rotate are not given either, asym and
            optimal are also compared at 2 and 8 bits, trellis at 2, 3 and 6, and optimal and trellis with rotated rows.
        param_dtype: one or more of "float16" and "float32"; None is quantize's default for the method and bits.
        rotate: one or more of None and "hadamard".
        metric: a figure of your own, such as an AUC, a log loss or a recall: called with all tables by name, each
            float32 [num_embeddings, embedding_dim], it returns a number. One table alone has the name "weight". It is
            called first with the float tables, then once for each way with their rows as lookups return them; for
            that, tables are packed once more.

    Returns:
        One Comparison for each method, bits, param_dtype and rotation, in this order, of several tables all together;
        combinations that a method, or a table, does not support are left out with a warning.

    Raises:
        TypeError: weight is of another type, metric no function or what it returns no number.
        ValueError: weight is not 2-D, is empty or has NaN or infinity; no such method, bits, param_dtype or rotation;
            nothing asked for can be done; there are no tables; or metric returned NaN or infinity.
    """
    if metric is not None and not callable(metric):
        raise TypeError(f"metric is {kind_of(metric)}; it must be a function of tables by name that returns a number")
    variants = make_variants(methods, bits, param_dtype, rotate)
    named = weight if isinstance(weight, Mapping) else {"weight": weight}
    if not named:
        raise ValueError("there are no tables to compare on")
    samples = [_make_sample(name, each, alone=named is not weight) for name, each in named.items()]
    tables, metrics = compare_samples(samples, variants, metric)
    for item in (item for table in tables for item in table.skipped):
        place = "" if named is not weight else f" of {item.table}"
        warnings.warn(f"left out {item.variant}{place}: {item.reason}", stacklevel=2)
    overall = find_overall(tables)
    return metrics.add_to(overall) if metrics else list(overall)


def _make_sample(name: str, weight: Any, *, alone: bool) -> Sample:
    if alone:
        rows, dtype = as_rows(weight)
    else:
        with naming(name):
            rows, dtype = as_rows(weight)
    return Sample.make(name, rows, dtype, np.arange(len(rows)), len(rows))


def compare_samples(
    samples: Iterable[Sample],
    variants: Sequence[Variant],
    metric: Metric | None = None,
    progress: Callable[[str, int], None] = lambda name, rows: None,
) -> tuple[list[TableComparison], Metrics | None]:
    """Compare on tables one after the other, or, with a metric, on all of them in memory.

    Args:
        samples: of each table; with a metric all of its rows.
        variants: how to pack them.
        metric: as compare takes it.
        progress: called with a table's name and the number of rows for each variant that is done, and with a metric
            for each that it was called for.

    Raises:
        ValueError: no variant can be done on a table.
    """
    if metric is None:
        return [compare_sample(sample, variants, progress) for sample in samples], None
    samples = list(samples)
    of_floats = measure_floats(metric, samples)  # what is wrong with a metric shows before hours are spent
    tables = [compare_sample(sample, variants, progress) for sample in samples]
    of_variants = {}
    for result in find_overall(tables):
        of_variants[result.variant] = measure_packed(metric, samples, result.variant)
        for sample in samples:
            progress(sample.name, len(sample.rows))
    return tables, Metrics(name_metric(metric), of_floats, of_variants)
