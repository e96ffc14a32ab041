"""The paper's model: embeddings and dense features, concatenated, through two layers of width 512 to a logit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from experiments.guan2019.criteo import NUM_CATEGORICAL, NUM_DENSE, Clicks, make_features

BATCH, WIDTH = 100, 512
TABLE_LEARNING_RATE, DENSE_LEARNING_RATE = 0.015, 0.005
EPSILON = 1e-10
EVALUATED_AT_ONCE = 2000


class ClickModel:
    """26 tables of the same number of rows, one after another in a single array, and the layers on top.

    Attributes:
        rows: of each table.
        weight: float32 [26 * rows, d], started as uniform values within 1 / sqrt(rows).
        layers: from concatenated features to a logit.
    """

    def __init__(self, rows: int, embedding_dim: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.rows = rows
        self.weight = torch.empty(NUM_CATEGORICAL * rows, embedding_dim).uniform_(-(rows**-0.5), rows**-0.5)
        self.layers = nn.Sequential(
            nn.Linear(NUM_DENSE + NUM_CATEGORICAL * embedding_dim, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, 1),
        )

    def predict(self, dense: Tensor, embeddings: Tensor) -> Tensor:
        """Logits [n] of dense features, float32 [n, 13], and looked up rows, float32 [n, 26, d]."""
        logits: Tensor = self.layers(torch.cat([dense, embeddings.flatten(1)], dim=1)).squeeze(1)
        return logits

    @property
    def tables(self) -> NDArray[np.float32]:
        """The tables, float32 [26, rows, d]: a view, writing to it changes the model."""
        return self.weight.numpy().reshape(NUM_CATEGORICAL, self.rows, -1)


class _RowAdagrad:
    """Adagrad (Duchi et al. 2011) on the rows that a batch looked up; the others' gradients are zero."""

    def __init__(self, weight: Tensor, learning_rate: float) -> None:
        self._weight, self._learning_rate = weight, learning_rate
        self._square_sums = torch.zeros_like(weight)

    def step(self, rows: Tensor, gradients: Tensor) -> None:
        """Update distinct rows, int64 [u], by their gradients, float32 [u, d]."""
        sums = self._square_sums[rows] + gradients.square()
        self._square_sums[rows] = sums
        self._weight[rows] -= self._learning_rate * gradients / (sums.sqrt() + EPSILON)


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts clicks: the log loss of each example, float64 [n], and the area under the ROC curve."""

    log_losses: NDArray[np.float64]
    auc: float

    @property
    def log_loss(self) -> float:
        """The mean."""
        return float(self.log_losses.mean())


def train(model: ClickModel, chunks: Iterator[Clicks], advance: Callable[[int], None]) -> None:
    """Go through the examples once, in batches of 100, with Adagrad.

    Args:
        model: trained in place.
        chunks: the examples.
        advance: told of examples done.
    """
    of_tables = _RowAdagrad(model.weight, TABLE_LEARNING_RATE)
    of_layers = torch.optim.Adagrad(model.layers.parameters(), lr=DENSE_LEARNING_RATE, fused=True)
    for clicks in chunks:
        for dense, positions, labels in _split(clicks, model.rows, BATCH):
            used, places = positions.unique(return_inverse=True)
            embeddings = model.weight[used].requires_grad_()
            logits = model.predict(dense, functional.embedding(places, embeddings))
            functional.binary_cross_entropy_with_logits(logits, labels).backward()
            assert embeddings.grad is not None
            of_tables.step(used, embeddings.grad)
            of_layers.step()
            of_layers.zero_grad()
        advance(len(clicks))


def _split(clicks: Clicks, rows: int, batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield dense features, positions in ClickModel.weight and labels of each batch."""
    dense, ids = make_features(clicks, rows)
    positions = ids + np.arange(NUM_CATEGORICAL) * rows
    arrays = (dense, positions, clicks.labels.astype(np.float32))
    yield from zip(*(torch.from_numpy(array).split(batch) for array in arrays), strict=True)


@torch.no_grad()
def evaluate(model: ClickModel, held_out: list[Clicks]) -> Evaluation:
    """Measure a model on examples it was not trained on.

    Raises:
        ValueError: they are all clicks, or none is.
    """
    losses, scores = [], []
    for clicks in held_out:
        for dense, positions, labels in _split(clicks, model.rows, EVALUATED_AT_ONCE):
            logits = model.predict(dense, functional.embedding(positions, model.weight)).double()
            losses.append(functional.binary_cross_entropy_with_logits(logits, labels.double(), reduction="none"))
            scores.append(logits)
    clicked = np.concatenate([clicks.labels for clicks in held_out])
    return Evaluation(torch.cat(losses).numpy(), measure_auc(torch.cat(scores).numpy(), clicked))


def measure_auc(scores: NDArray[np.float64], labels: NDArray[np.uint8]) -> float:
    """Area under the ROC curve: how often a click scores higher than what was not clicked; ties count half.

    Raises:
        ValueError: there are only clicks, or none.
    """
    clicks = int(labels.sum())
    others = len(labels) - clicks
    if not clicks or not others:
        raise ValueError(f"{clicks} of the {len(labels)} held-out examples are clicks; take more examples")
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(sizes) - (sizes - 1) / 2)[group]
    return float((ranks[labels == 1].sum() - clicks * (clicks + 1) / 2) / (clicks * others))
