"""Train a DLRM-like model on generated clicks, pack its tables, and see what that does to the log loss.

python examples/dlrm.py                # under a minute on two cores
python examples/dlrm.py --steps 500    # seconds; the model has learned less

Five categorical fields, two of them with several values an example, and dense features go through a model like DLRM
(Naumov et al. 2019). Clicks are drawn by a planted model. As it knows the chance of each click, log losses here are
expected ones, free of the luck of the draw. Needs embpack[torch].
"""

import argparse
import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional

from embpack.torch import quantize_

METHODS = (("asym", 4), ("greedy", 4), ("kmeans", 4), ("greedy", 2))
STEPS, BATCH, HELD_OUT = 5000, 1024, 200_000
DENSE_FEATURES, EMBEDDING_DIM, LATENT_DIM = 8, 32, 4

Bags = Mapping[str, tuple[Tensor, Tensor]]  # indices and offsets of each field, as nn.EmbeddingBag takes them


class Field(NamedTuple):
    """A categorical field: one value an example, or up to so many, whose rows are pooled."""

    name: str
    rows: int
    values: int = 1
    mode: str = "sum"


FIELDS = (
    Field("user", 10_000),
    Field("item", 5000),
    Field("site", 300),
    Field("tags", 1000, values=4),
    Field("history", 5000, values=10, mode="mean"),
)


class Clicks(NamedTuple):
    """Some examples, and how likely each was to be a click."""

    dense: Tensor
    bags: Bags
    labels: Tensor
    chances: Tensor


class PlantedClicks:
    """Draws clicks, whose logit is a sum over fields and over the inner products of all pairs of fields."""

    def __init__(self, seed: int = 0) -> None:
        self.random = torch.Generator().manual_seed(seed)
        spread = torch.tensor([0.3] + [0.6] * LATENT_DIM)  # the first is what a value adds by itself
        self.dense = self._normal(DENSE_FEATURES, 1 + LATENT_DIM) * spread / DENSE_FEATURES**0.5
        self.tables = {field: self._normal(field.rows, 1 + LATENT_DIM) * spread for field in FIELDS}

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def draw(self, examples: int) -> Clicks:
        """Draw examples, new ones at each call."""
        dense, vectors, bags = self._normal(examples, DENSE_FEATURES), [], {}
        for field, table in self.tables.items():
            indices, offsets = bags[field.name] = self._draw_bags(field, examples)
            vectors.append(functional.embedding_bag(indices, table, offsets, mode=field.mode))
        stacked = torch.stack([dense @ self.dense, *vectors])
        alone, latents = stacked[..., 0], stacked[..., 1:]
        pairs = (latents.sum(dim=0).square() - latents.square().sum(dim=0)).sum(dim=1) / 2
        chances = torch.sigmoid(alone.sum(dim=0) + pairs - 2)
        return Clicks(dense, bags, torch.bernoulli(chances, generator=self.random), chances)

    def _draw_bags(self, field: Field, examples: int) -> tuple[Tensor, Tensor]:
        fewest = 1 if field.values == 1 else 0
        lengths = torch.randint(fewest, field.values + 1, (examples,), generator=self.random)
        uniform = torch.rand(int(lengths.sum()), generator=self.random)
        return (field.rows * uniform**3).long(), lengths.cumsum(0) - lengths  # some values are common, most are rare


class DLRM(nn.Module):
    """Dense features through an MLP, a row of each table, inner products of all pairs of these, an MLP on top."""

    def __init__(self, fields: Sequence[Field] = FIELDS) -> None:
        super().__init__()
        bags = {field.name: nn.EmbeddingBag(field.rows, EMBEDDING_DIM, mode=field.mode) for field in fields}
        for bag in bags.values():
            nn.init.normal_(bag.weight, std=EMBEDDING_DIM**-0.5)
        self.tables = nn.ModuleDict(bags)
        pairs = len(fields) * (len(fields) + 1) // 2
        self.bottom = nn.Sequential(nn.Linear(DENSE_FEATURES, 64), nn.ReLU(), nn.Linear(64, EMBEDDING_DIM))
        self.top = nn.Sequential(nn.Linear(EMBEDDING_DIM + pairs, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, dense: Tensor, bags: Bags) -> Tensor:
        """Return the logit of each example."""
        bottom = self.bottom(dense)
        vectors = torch.stack([bottom, *(table(*bags[name]) for name, table in self.tables.items())], dim=1)
        first, second = torch.triu_indices(vectors.shape[1], vectors.shape[1], offset=1)
        products = (vectors @ vectors.transpose(1, 2))[:, first, second]
        logits: Tensor = self.top(torch.cat([bottom, products], dim=1)).squeeze(1)
        return logits


def train(model: DLRM, planted: PlantedClicks, steps: int, progress: str) -> None:
    """Train on new clicks at each step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=steps)
    for _ in track(range(steps), progress, console=Console(stderr=True)):
        clicks = planted.draw(BATCH)
        functional.binary_cross_entropy_with_logits(model(clicks.dense, clicks.bags), clicks.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def find_losses(model: DLRM, clicks: Clicks) -> Tensor:
    """Return the log loss that is expected of each example."""
    logits = model(clicks.dense, clicks.bags).double()
    return functional.binary_cross_entropy_with_logits(logits, clicks.chances.double(), reduction="none")


def save_and_load(packed: DLRM, method: str, bits: int) -> DLRM:
    """Return a packed model as it comes back from a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.safetensors")
        save_model(packed, path)
        loaded = DLRM()
        quantize_(loaded, method, bits=bits)  # the same packed modules, with rows that do not matter
        load_model(loaded, path)
    return loaded


class Row(NamedTuple):
    """A model: its log loss and, with tables, their bytes, their mean normalized l2 loss, and what packing added."""

    name: str
    log_loss: float
    nbytes: int | None = None
    l2_loss: float | None = None
    added: float | None = None
    standard_error: float | None = None


def run(steps: int = STEPS) -> list[Row]:
    """Train, pack with each method, and measure: base rate, no tables, float32, the methods, the planted model."""
    torch.manual_seed(0)
    planted = PlantedClicks()
    held_out = planted.draw(HELD_OUT)
    chances = held_out.chances.double()
    without, model = DLRM(()), DLRM()
    train(without, planted, steps, "Training without tables")
    train(model, planted, steps, "Training with tables   ")

    losses = find_losses(model, held_out)
    float_bytes = sum(weight.nbytes for weight in model.tables.parameters())
    rows = [
        Row("always the base rate", functional.binary_cross_entropy(chances.mean(), chances.mean()).item()),
        Row("without tables", find_losses(without, held_out).mean().item()),
        Row("float32 tables", losses.mean().item(), float_bytes),
    ]
    for method, bits in METHODS:
        packed = copy.deepcopy(model)
        tables = quantize_(packed, method, bits=bits).tables
        packed_losses = find_losses(save_and_load(packed, method, bits), held_out)
        added = packed_losses - losses
        row = Row(
            f"{method}, {bits} bits",
            log_loss=packed_losses.mean().item(),
            nbytes=sum(table.bytes_after for table in tables),
            l2_loss=sum(table.loss for table in tables) / len(tables),
            added=added.mean().item(),
            standard_error=(added.std() / len(added) ** 0.5).item(),
        )
        rows.append(row)
    return [*rows, Row("the planted model", functional.binary_cross_entropy(chances, chances).item())]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what packing with each method comes to."""
    parser = argparse.ArgumentParser(description="Pack a DLRM-like model, and see what that does to the log loss.")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training, %(default)s if not given")
    steps = parser.parse_args(arguments).steps
    rows = run(steps)
    base_rate, _, floats = rows[:3]
    table = Table(title=f"{steps:,} steps of {BATCH:,} clicks, {HELD_OUT:,} held out", box=None)
    table.add_column("model")
    for column in ("bytes", "of float32", "l2 loss", "log loss", "added by packing", "of what was learned"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = ["", "", "", f"{row.log_loss:.5f}"]
        if row.nbytes and floats.nbytes:
            cells[:2] = f"{row.nbytes:,}", f"{100 * row.nbytes / floats.nbytes:.2f} %"
        if row.l2_loss is not None and row.added is not None:
            share = row.added / (base_rate.log_loss - floats.log_loss)
            cells[2] = f"{row.l2_loss:.4f}"
            cells += [f"{row.added:.5f} ± {row.standard_error:.5f}", f"{100 * share:.2f} %"]
        table.add_row(row.name, *cells)
    Console(highlight=False, width=120).print(table)


if __name__ == "__main__":
    main()
