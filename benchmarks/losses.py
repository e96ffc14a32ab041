"""What python -m benchmarks.loss measures: the tables, our ways to pack them, what is lost."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import floor
from typing import Any

import numpy as np
from numpy.typing import NDArray

import embpack
from benchmarks.peers import Quantizer, Restored
from embpack.layouts.trellis import LEAST_BITS, MOST_BITS
from embpack.samples import make_checkpoint

EXACT = "optimal:effort=exact"
SPECS = (*embpack.METHODS, "optimal:effort=fast", EXACT)
# Beside these at 4 bits: rows in another basis, trellis-coded ones of as many bytes as peers without a header, and what
# else there is for rows of very few bytes and of many.
ROTATED = ("optimal", "trellis")
FEWER_BITS = 3.5
OTHER_BITS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((spec, {"bits": 2}) for spec in ("optimal", "kmeans", "trellis")),
    ("optimal", {"bits": 8, "param_dtype": "float16"}),
)
# Of uniform rows' float16 scale and bias. Trellis-coded rows of as many bits have as many bytes.
PARAM_BYTES = 4
# What losses are divided by: the first of these that is there.
BASELINES = (("PyTorch", "embedding_bag_4bit_prepack, greedy"), ("FBGEMM", "FusedNBitRowwiseQuantizedSBHalf"))
TABLES = ("demo", "normal", "laplace")

Values = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Way:
    """What one way to quantize leaves of a table.

    Attributes:
        library: whose.
        method: which of its ways.
        bytes_per_row: of everything that packing leaves, by the number of rows.
        errors: float64 [n], the squared error of each of the first n rows; the others were not packed.
    """

    library: str
    method: str
    bytes_per_row: float
    errors: NDArray[np.float64]


@dataclass(frozen=True)
class Loss:
    """What one way to quantize a table comes to.

    Attributes:
        library: whose.
        method: which of its ways.
        rows: that were measured, the first ones.
        bytes_per_row: of everything that packing leaves, by the number of rows.
        loss: normalized l2 loss ||X - Q(X)|| / ||X|| of these rows.
        common_loss: the same of the rows that everybody packed.
        by_baseline: the loss by the baseline's on the same rows; None where no baseline is installed.
        on_front: whether no other way has less loss at no more bytes, or fewer bytes at no more loss, of the rows that
            both packed.
    """

    library: str
    method: str
    rows: int
    bytes_per_row: float
    loss: float
    common_loss: float
    by_baseline: float | None
    on_front: bool


@dataclass(frozen=True)
class TableLosses:
    """A table and what is lost of it, by rising bytes, then by rising loss.

    common_rows were packed by everybody; left_out says who cannot pack any, and why.
    """

    table: str
    num_embeddings: int
    embedding_dim: int
    common_rows: int
    losses: list[Loss]
    left_out: dict[str, str]


def list_ours(exact_rows: int) -> list[Quantizer]:
    """List our ways to pack; the exact search packs that many rows at most."""
    ours = [_make_ours(spec, exact_rows if spec == EXACT else None) for spec in SPECS]
    ours += [_make_ours(spec, rotate="hadamard") for spec in ROTATED]
    ours += [_make_ours(spec, **options) for spec, options in OTHER_BITS]
    return [*ours, _make_ours("trellis", bits=FEWER_BITS)]


def list_trellis(sizes: Iterable[float], embedding_dim: int) -> list[Quantizer]:
    """List trellis-coded rows of the most bytes that others' rows, of these sizes, are not below."""
    bits = {min((floor(size) - PARAM_BYTES) * 8 / embedding_dim, MOST_BITS) for size in sizes}
    return [_make_ours("trellis", bits=number) for number in sorted(bits - {4, FEWER_BITS}) if number > LEAST_BITS]


def _make_ours(spec: str, most_rows: int | None = None, **options: Any) -> Quantizer:
    shown = (f'{name}="{value}"' if isinstance(value, str) else f"{name}={value:g}" for name, value in options.items())
    return Quantizer("embpack", ", ".join((spec, *shown)), partial(_restore, spec, most_rows, options))


def _restore(spec: str, most_rows: int | None, options: dict[str, Any], weight: Values) -> Restored:
    table = embpack.quantize(weight[:most_rows], spec, **options)
    return Restored(table.dequantize(), table.nbytes)


def make_tables(names: Sequence[str], dims: Sequence[int], rows: int) -> Iterator[tuple[str, Values]]:
    """Make the tables; the demo's has the width that it has."""
    if "demo" in names:
        yield "demo", make_checkpoint(np.random.default_rng(0))["user_embedding.weight"][:rows]
    for name in (name for name in TABLES if name in names and name != "demo"):
        for d in dims:
            rng, size = np.random.default_rng(0), (rows, d)
            values = rng.standard_normal(size) if name == "normal" else rng.laplace(size=size)
            yield name, values.astype(np.float32)


def measure_errors(weight: Values, values: NDArray[Any]) -> NDArray[np.float64]:
    """Measure the squared error of each row, float64 [n], of the first n rows, that there are values of."""
    errors = values.astype(np.float64) - weight[: len(values)]
    squares: NDArray[np.float64] = np.square(errors).sum(axis=1)
    return squares


def measure_table(name: str, weight: Values, ours: Sequence[Quantizer], peers: Sequence[Quantizer]) -> TableLosses:
    """Quantize a table in every way; ours also have trellis-coded rows of as many bytes as each of the peers' rows."""
    theirs, left_out = measure_ways(weight, peers)
    at_their_bytes = list_trellis((way.bytes_per_row for way in theirs), weight.shape[1])
    own, _ = measure_ways(weight, [*ours, *at_their_bytes])
    ways = [*own, *theirs]
    rows, d = weight.shape
    return TableLosses(name, rows, d, min(len(way.errors) for way in ways), compare_ways(weight, ways), left_out)


def measure_ways(weight: Values, quantizers: Iterable[Quantizer]) -> tuple[list[Way], dict[str, str]]:
    """Quantize a table in these ways; say of those that cannot why."""
    d = weight.shape[1]
    found: list[Way] = []
    left_out: dict[str, str] = {}
    for quantizer in quantizers:
        way = f"{quantizer.library}: {quantizer.method}"
        if d % quantizer.multiple_of:
            left_out[way] = f"{d} values a row are no multiple of {quantizer.multiple_of}"
            continue
        try:
            restored = quantizer.restore(weight)
        except RuntimeError as error:  # What PyTorch's operators raise where there is no kernel for a CPU.
            left_out[way] = str(error).partition("\n")[0]
            continue
        errors = measure_errors(weight, restored.values)
        found.append(Way(quantizer.library, quantizer.method, restored.nbytes / len(errors), errors))
    return found, left_out


def compare_ways(weight: Values, ways: Sequence[Way]) -> list[Loss]:
    """Make losses of errors, by rising bytes, then by rising loss."""
    squares = np.square(weight, dtype=np.float64).sum(axis=1)
    common = min(len(way.errors) for way in ways)
    baseline = _find_baseline(ways)

    def measure_loss(way: Way, rows: int) -> float:
        return float(np.sqrt(way.errors[:rows].sum() / squares[:rows].sum()))

    ways = sorted(ways, key=lambda way: (way.bytes_per_row, measure_loss(way, len(way.errors))))
    losses = []
    for number, way in enumerate(ways):
        rows = len(way.errors)
        by_baseline = None if baseline is None else float(np.sqrt(way.errors.sum() / baseline[:rows].sum()))
        on_front = not any(_is_better(other, way, first=i < number) for i, other in enumerate(ways) if i != number)
        of_rows = (measure_loss(way, rows), measure_loss(way, common))
        losses.append(Loss(way.library, way.method, rows, way.bytes_per_row, *of_rows, by_baseline, on_front))
    return losses


def _is_better(way: Way, other: Way, *, first: bool) -> bool:
    """Whether a way leaves nothing to another, of the rows that both packed; of equal ones the first is better."""
    if way.bytes_per_row > other.bytes_per_row:
        return False
    rows = min(len(way.errors), len(other.errors))
    error, others_error = way.errors[:rows].sum(), other.errors[:rows].sum()
    return bool(error < others_error or (error == others_error and first))


def _find_baseline(ways: Sequence[Way]) -> NDArray[np.float64] | None:
    errors = {(way.library, way.method): way.errors for way in ways}
    return next((errors[baseline] for baseline in BASELINES if baseline in errors), None)
