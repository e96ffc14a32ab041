"""What tables 2 and 3 share: a model trained for each embedding_dim, then every table packed by every method."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress, track

from embpack import MissingExtraError
from experiments.guan2019.criteo import NUM_CATEGORICAL, Clicks, PlantedClicks, read_clicks, take_examples
from experiments.guan2019.report import console
from experiments.guan2019.series import SERIES, Series

if TYPE_CHECKING:
    from experiments.guan2019.model import ClickModel

DIMS = (8, 16, 32, 64, 128)
FP32 = "FP32"
# All of the paper's tables 2 and 3, and our greedy.
TRAINED_SERIES = tuple(name for name in SERIES if name not in ("TABLE", "GREEDY (opt)", "KMEANS"))
# Table 2 is of one table: the third categorical feature, which has the most categories.
SHOWN_TABLE = 2


@dataclass(frozen=True)
class Setting:
    """What is trained on what.

    Attributes:
        dims: embedding_dim of each model.
        rows: of each of the 26 tables; categories are hashed to them.
        examples: trained on, once.
        held_out: examples that follow, which models are measured on.
        data: a log in Criteo's format; None for the generator.
        seed: of the generator and of the models' first values.
    """

    dims: tuple[int, ...] = DIMS
    rows: int = 4096
    examples: int = 600_000
    held_out: int = 200_000
    data: Path | None = None
    seed: int = 0

    def as_json(self) -> dict[str, str | int]:
        """Where the examples come from, and how many."""
        data = str(self.data) if self.data else "generated"
        sizes = {"rows": self.rows, "examples": self.examples, "held_out": self.held_out, "seed": self.seed}
        return {"data": data, "tables": NUM_CATEGORICAL, **sizes}

    def describe(self) -> str:
        """One line of the same."""
        source = self.data or "generated clicks"
        counts = f"{self.examples:,} examples trained on, {self.held_out:,} held out"
        return f"{source}: {counts}; {NUM_CATEGORICAL} tables of {self.rows:,} rows; seed {self.seed}"


@dataclass(frozen=True)
class Measured:
    """One model under one method.

    Attributes:
        loss: normalized l2 loss of SHOWN_TABLE.
        loss_of_all: the same, over all tables.
        log_loss: mean over the held-out examples.
        cost: log_loss less that of the fp32 model.
        cost_error: standard error of cost, which is a mean of differences, example by example.
        quadratic_cost: mean of cost and of what the same errors cost with their signs turned. What a model would gain
            or lose by moving its rows a little cancels; what the size of errors costs is left.
        quadratic_cost_error: its standard error.
        auc: area under the ROC curve.
        nbytes: of all tables.
    """

    loss: float
    loss_of_all: float
    log_loss: float
    cost: float
    cost_error: float
    quadratic_cost: float
    quadratic_cost_error: float
    auc: float
    nbytes: int


@cache
def measure(setting: Setting) -> dict[int, dict[str, Measured]]:
    """Train and measure; the second table that asks gets the same models.

    Returns:
        What was measured, by embedding_dim and series; first of them FP32.

    Raises:
        MissingExtraError: PyTorch is not installed.
        ValueError: the data are too few, or not in Criteo's format.
    """
    try:
        import torch
    except ImportError:
        raise MissingExtraError("training the paper's model", "PyTorch", "torch") from None
    # Batches of 100 gain little from a second thread, and wait a lot for it on a busy machine.
    torch.set_num_threads(1)
    return {d: _measure_width(setting, d) for d in setting.dims}


def _measure_width(setting: Setting, d: int) -> dict[str, Measured]:
    from experiments.guan2019.model import evaluate

    model, held_out = _train(setting, d)
    trained = model.tables.copy()
    fp32 = evaluate(model, held_out)
    measured = {FP32: Measured(0.0, 0.0, fp32.log_loss, 0.0, 0.0, 0.0, 0.0, fp32.auc, trained.nbytes)}
    chosen = [SERIES[name] for name in TRAINED_SERIES]
    for series in track(chosen, f"d = {d}: packing", console=console, transient=True):
        losses, nbytes = _replace_tables(model, trained, series)
        evaluation = evaluate(model, held_out)
        costs = evaluation.log_losses - fp32.log_losses
        model.tables[:] = 2 * trained - model.tables
        turned = evaluate(model, held_out).log_losses - fp32.log_losses
        of_costs = (*_estimate_mean(costs), *_estimate_mean((costs + turned) / 2))
        measured[series.name] = Measured(*losses, evaluation.log_loss, *of_costs, evaluation.auc, nbytes)
    return measured


def _estimate_mean(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def _train(setting: Setting, d: int) -> tuple["ClickModel", list[Clicks]]:
    """Return a trained model and what was held out."""
    from experiments.guan2019.model import ClickModel, train

    chunks = iter(PlantedClicks(setting.seed) if setting.data is None else read_clicks(setting.data))
    model = ClickModel(setting.rows, d, setting.seed)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"d = {d}: training", total=setting.examples)
        train(model, take_examples(chunks, setting.examples), lambda count: progress.advance(task, count))
    held_out = list(take_examples(chunks, setting.held_out))
    if sum(map(len, held_out)) < setting.held_out:
        raise ValueError(
            f"{setting.data} ends before {setting.examples:,} examples to train on and {setting.held_out:,} to hold "
            "out; ask for fewer with --examples and --held-out"
        )
    return model, held_out


def _replace_tables(model: "ClickModel", trained: np.ndarray, series: Series) -> tuple[tuple[float, float], int]:
    """Put what the packed tables come back as into the model.

    Returns:
        Normalized l2 losses of SHOWN_TABLE and of all tables; and the bytes of all.
    """
    packed = [series.quantize(table) for table in trained]
    for values, table in zip(model.tables, packed, strict=True):
        values[:] = table.dequantize()
    square_errors = _sum_squares(before - after for before, after in zip(trained, model.tables, strict=True))
    squares = _sum_squares(trained)
    shown = math.sqrt(square_errors[SHOWN_TABLE] / squares[SHOWN_TABLE])
    of_all = math.sqrt(math.fsum(square_errors) / math.fsum(squares))
    return (shown, of_all), sum(table.nbytes for table in packed)


def _sum_squares(tables: Iterable[np.ndarray]) -> list[float]:
    return [float(np.square(table, dtype=np.float64).sum()) for table in tables]


def list_numbers(setting: Setting) -> Iterator[tuple[str, int, Measured]]:
    """All that was measured, series by series."""
    widths = measure(setting)
    for name in (FP32, *TRAINED_SERIES):
        for d, measured in widths.items():
            yield name, d, measured[name]


def find_paper(numbers: dict[str, tuple[float | None, ...]], series: str, d: int) -> float | None:
    """The paper's number for a width; None where it has none."""
    return numbers[series][DIMS.index(d)] if series in numbers and d in DIMS else None
