"""A figure of the user's own, such as an AUC or a perplexity, of float tables and of them packed in each way."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embpack.comparison.array import Comparison, Sample
from embpack.packing import pack
from embpack.rows import widen
from embpack.variant import Variant

Metric = Callable[[Mapping[str, NDArray[np.float32]]], float]
"""Makes a number of tables by name, all rows of each."""


@dataclass(frozen=True)
class Metrics:
    """What a metric came to.

    Attributes:
        name: of the function.
        of_floats: for the tables as they are.
        of_variants: for all tables packed in one way, each row as lookups return it.
    """

    name: str
    of_floats: float
    of_variants: Mapping[Variant, float]

    def add_to(self, results: Sequence[Comparison]) -> list[Comparison]:
        """Give results of all tables the figure of their way."""
        return [
            replace(result, metric=self.of_variants[result.variant], metric_of_floats=self.of_floats)
            for result in results
        ]


def measure_floats(metric: Metric, samples: Sequence[Sample]) -> float:
    """Call a metric with float tables, of which it gets copies.

    Raises:
        TypeError: it returned no number.
        ValueError: it returned NaN or infinity.
    """
    return _call(metric, {sample.name: widen(sample.rows) for sample in samples}, "float tables")


def measure_packed(metric: Metric, samples: Sequence[Sample], variant: Variant) -> float:
    """Do what measure_floats does, with the tables packed in one way that all can be."""
    tables = {sample.name: pack(sample.rows, variant)[0].dequantize() for sample in samples}
    return _call(metric, tables, f"tables packed by {variant}")


def name_metric(metric: Metric) -> str:
    """Name a function, or what else can be called, by its class."""
    return str(getattr(metric, "__name__", type(metric).__name__))


def _call(metric: Metric, tables: Mapping[str, NDArray[np.float32]], what: str) -> float:
    value: Any = metric(tables)
    is_scalar = getattr(value, "ndim", None) == 0  # of NumPy or PyTorch
    number = value.item() if is_scalar else value
    if not isinstance(number, Real) or isinstance(number, bool):
        raise TypeError(
            f"{name_metric(metric)} returned {value!r} for {what}; a metric returns one number, such as an AUC"
        )
    if not math.isfinite(number):
        raise ValueError(f"{name_metric(metric)} returned {number} for {what}; a metric must be finite to be compared")
    return float(number)
