"""What python -m benchmarks.loss measures: the tables, our ways to pack them, what is lost."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

import embpack
from benchmarks.peers import Quantizer, Restored
from embpack.samples import make_checkpoint

EXACT = "optimal:effort=exact"
SPECS = (*embpack.METHODS, "optimal:effort=fast", EXACT)
# Beside these at 4 bits, rows in another basis, and trellis-coded ones of as many bytes as peers without a header.
ROTATED = ("optimal", "trellis")
FEWER_BITS = 3.5
# What losses are divided by: the first of these that is there.
BASELINES = (("PyTorch", "embedding_bag_4bit_prepack, greedy"), ("FBGEMM", "FusedNBitRowwiseQuantizedSBHalf"))
TABLES = ("demo", "normal", "laplace")

Values = NDArray[np.float32]


@dataclass(frozen=True)
class Loss:
    """What one way to quantize a table comes to.

    Attributes:
        library: whose.
        method: which of its ways.
        rows: that were measured, the first ones.
        bytes_per_row: of everything that packing leaves, by the number of rows.
        loss: normalized l2 loss ||X - Q(X)|| / ||X||.
        by_baseline: that loss by the baseline's on the same rows; None where no baseline is installed.
        on_front: whether no other way, of all rows, has less loss at no more bytes, or fewer bytes at no more loss.
    """

    library: str
    method: str
    rows: int
    bytes_per_row: float
    loss: float
    by_baseline: float | None
    on_front: bool = False


@dataclass(frozen=True)
class TableLosses:
    """A table and what is lost of it, by rising bytes, then by rising loss; left_out says who cannot, and why."""

    table: str
    num_embeddings: int
    embedding_dim: int
    losses: list[Loss]
    left_out: dict[str, str]


def list_ours(exact_rows: int) -> list[Quantizer]:
    """List our ways to pack; the exact search packs that many rows at most."""
    ways: list[tuple[str, str, dict[str, Any]]] = [(spec, spec, {}) for spec in SPECS]
    ways += [(f'{spec}, rotate="hadamard"', spec, {"rotate": "hadamard"}) for spec in ROTATED]
    ways.append((f"trellis, bits={FEWER_BITS}", "trellis", {"bits": FEWER_BITS}))
    return [
        Quantizer("embpack", name, partial(_restore, spec, options), most_rows=exact_rows if spec == EXACT else None)
        for name, spec, options in ways
    ]


def _restore(spec: str, options: dict[str, Any], weight: Values) -> Restored:
    table = embpack.quantize(weight, spec, **options)
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


def measure_table(name: str, weight: Values, quantizers: Sequence[Quantizer]) -> TableLosses:
    """Quantize a table in every way."""
    rows, d = weight.shape
    square = np.square(weight, dtype=np.float64).sum(axis=1)
    found: list[tuple[Quantizer, float, NDArray[np.float64]]] = []
    left_out: dict[str, str] = {}
    for quantizer in quantizers:
        way = f"{quantizer.library}: {quantizer.method}"
        if d % quantizer.multiple_of:
            left_out[way] = f"{d} values a row are no multiple of {quantizer.multiple_of}"
            continue
        part = weight[: quantizer.most_rows]
        try:
            restored = quantizer.restore(part)
        except RuntimeError as error:  # What PyTorch's operators raise where there is no kernel for a CPU.
            left_out[way] = str(error).partition("\n")[0]
            continue
        found.append((quantizer, restored.nbytes / len(part), measure_errors(part, restored.values)))
    baseline = _find_baseline(found)
    losses = []
    for quantizer, bytes_per_row, errors in found:
        n = len(errors)
        by_baseline = None if baseline is None else float(np.sqrt(errors.sum() / baseline[:n].sum()))
        loss = float(np.sqrt(errors.sum() / square[:n].sum()))
        losses.append(Loss(quantizer.library, quantizer.method, n, bytes_per_row, loss, by_baseline))
    return TableLosses(name, rows, d, mark_front(losses, rows), left_out)


def _find_baseline(found: Sequence[tuple[Quantizer, float, NDArray[np.float64]]]) -> NDArray[np.float64] | None:
    errors = {(quantizer.library, quantizer.method): errors for quantizer, _, errors in found}
    return next((errors[baseline] for baseline in BASELINES if baseline in errors), None)


def mark_front(losses: Sequence[Loss], rows: int) -> list[Loss]:
    """Sort by bytes, then by loss, and mark the Pareto front of those that packed so many rows."""
    marked: list[Loss] = []
    least = np.inf
    for own in sorted(losses, key=lambda own: (own.bytes_per_row, own.loss)):
        on_front = own.rows == rows and own.loss < least
        least = own.loss if on_front else least
        marked.append(replace(own, on_front=on_front))
    return marked
