"""Train a small TorchRec model, and quantize its tables: by TorchRec, by embpack for TorchRec, and for embpack.

python examples/torchrec_model.py                # under half a minute on two cores
python examples/torchrec_model.py --steps 200    # seconds; the model has learned less

The first three ways make the same module of torchrec.quant, of the same size. TorchRec takes the minimum and maximum of
each row, as embpack's "asym" does, to the byte; "greedy" searches for a better range. Rows of 36 bytes take 48 there,
for TorchRec aligns them to 16. In embpack's own module, which embpack.torch.quantize_ would put in place, they take 36.
Needs embpack[torchrec], and TorchRec itself: pip install --no-deps torchrec==1.9.2
"""

import argparse
import copy
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.ao.quantization import PlaceholderObserver
from torch.nn import functional
from torchrec.modules.embedding_configs import (  # type: ignore[import-untyped]
    EmbeddingBagConfig,
    PoolingType,
    QuantConfig,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection  # type: ignore[import-untyped]
from torchrec.quant import embedding_modules as quant  # type: ignore[import-untyped]
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor  # type: ignore[import-untyped]

import embpack.torchrec
from embpack.torch import PackedEmbeddingBagCollection

logging.getLogger("torch.fx").setLevel(logging.ERROR)  # a warning to TorchRec's developers, not to its users

STEPS, BATCH, HELD_OUT = 1500, 1024, 50_000
EMBEDDING_DIM, LATENT_DIM = 64, 4
# Rows of a table and its features, and how many values of each an example has at most.
ROWS = {"user": 5000, "item": 3000, "tag": 500}
FEATURES = {"user": {"user": 1}, "item": {"item": 1, "history": 10}, "tag": {"tags": 4}}
POOLING = {"user": PoolingType.SUM, "item": PoolingType.MEAN, "tag": PoolingType.SUM}


def make_bags(embedding_dim: int, deviation: float) -> Any:
    """Make tables of normal values."""
    configs = [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=rows,
            embedding_dim=embedding_dim,
            feature_names=list(FEATURES[name]),
            pooling=POOLING[name],
            init_fn=partial(nn.init.normal_, std=deviation),
        )
        for name, rows in ROWS.items()
    ]
    return EmbeddingBagCollection(configs)


class TwoTowers(nn.Module):
    """A user with a history meets an item with tags: an MLP for each side, and their inner product is the logit."""

    def __init__(self) -> None:
        super().__init__()
        self.ebc = make_bags(EMBEDDING_DIM, EMBEDDING_DIM**-0.5)
        self.user, self.item = (
            nn.Sequential(nn.Linear(2 * EMBEDDING_DIM, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(2)
        )

    def forward(self, features: Any) -> Tensor:
        """Return the logit of each example of a KeyedJaggedTensor."""
        pooled = self.ebc(features)
        user = self.user(torch.cat([pooled["user"], pooled["history"]], dim=1))
        item = self.item(torch.cat([pooled["item"], pooled["tags"]], dim=1))
        logits: Tensor = (user * item).sum(dim=1)
        return logits


def draw_features(examples: int) -> Any:
    """Draw examples: some values are common, most are rare."""
    keys, lengths, values = [], [], []
    for table, features in FEATURES.items():
        for name, most in features.items():
            keys.append(name)
            lengths.append(torch.randint(int(most == 1), most + 1, (examples,)))
            values.append((ROWS[table] * torch.rand(int(lengths[-1].sum())) ** 2).long())
    return KeyedJaggedTensor(keys, torch.cat(values), lengths=torch.cat(lengths))


def train(model: TwoTowers, steps: int) -> None:
    """Train on clicks whose logit is an inner product of vectors of four values, pooled as the model's are."""
    planted = make_bags(LATENT_DIM, 1.0).requires_grad_(requires_grad=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005, fused=True)
    for _ in track(range(steps), "Training", console=Console(stderr=True)):
        features = draw_features(BATCH)
        pooled = planted(features)
        logits = ((pooled["user"] + pooled["history"]) * (pooled["item"] + pooled["tags"])).sum(dim=1)
        clicks = torch.bernoulli(torch.sigmoid(logits - 1))
        functional.binary_cross_entropy_with_logits(model(features), clicks).backward()
        optimizer.step()
        optimizer.zero_grad()


def quantize_by_torchrec(collection: Any) -> Any:
    """Quantize as TorchRec's own functions for inference do."""
    collection = copy.deepcopy(collection)
    collection.qconfig = QuantConfig(
        activation=PlaceholderObserver.with_args(dtype=torch.float32),
        weight=PlaceholderObserver.with_args(dtype=torch.quint4x2),
    )
    return quant.EmbeddingBagCollection.from_float(collection)


# What takes a float collection and returns one that is looked up in its place.
WAYS: dict[str, Callable[[Any], Any]] = {
    "TorchRec's own": quantize_by_torchrec,
    "embpack, asym": partial(embpack.torchrec.quantize, method="asym"),
    "embpack, greedy": partial(embpack.torchrec.quantize, method="greedy"),
    "embpack's own module": partial(PackedEmbeddingBagCollection.from_float, method="greedy"),
}


class Row(NamedTuple):
    """A way to quantize: bytes in memory, and relative errors (l2) of pooled values and of logits."""

    name: str
    nbytes: int
    pooled_error: float
    logit_error: float


def count_bytes(collection: Any) -> int:
    """Count the bytes of a collection's rows in memory; beside them each of ours has 64 with its format."""
    return sum(tensor.view(torch.uint8).nbytes for tensor in collection.state_dict().values() if tensor.ndim == 2)


def join(pooled: Any) -> Tensor:
    """Join the pooled values of a KeyedTensor in one order of the features: collections differ in theirs."""
    return torch.cat([pooled[name] for name in sorted(pooled.keys())], dim=1)


def find_error(found: Tensor, exact: Tensor) -> float:
    """Return the norm of the errors by the norm of the values."""
    return float(torch.linalg.norm(found - exact) / torch.linalg.norm(exact))


@torch.no_grad()
def compare(model: TwoTowers) -> list[Row]:
    """Measure each way on new examples; the first row is the float model."""
    features, trained = draw_features(HELD_OUT), model.ebc
    pooled, logits = join(trained(features)), model(features)
    rows = [Row("float32", count_bytes(trained), 0.0, 0.0)]
    for name, quantize in WAYS.items():
        model.ebc = quantize(trained)
        errors = find_error(join(model.ebc(features)), pooled), find_error(model(features), logits)
        rows.append(Row(name, count_bytes(model.ebc), *errors))
    model.ebc = trained
    return rows


def run(steps: int = STEPS) -> list[Row]:
    """Train and compare."""
    torch.manual_seed(0)
    model = TwoTowers()
    train(model, steps)
    return compare(model)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what quantizing in each way comes to."""
    parser = argparse.ArgumentParser(description="Quantize a TorchRec model by TorchRec and by embpack.")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training, %(default)s if not given")
    steps = parser.parse_args(arguments).steps
    rows = run(steps)
    table = Table(title=f"{steps:,} steps of {BATCH:,} clicks, errors on {HELD_OUT:,} others", box=None)
    table.add_column("tables")
    for column in ("bytes", "of float32", "error of pooled values", "error of logits"):
        table.add_column(column, justify="right")
    for row in rows:
        share = f"{100 * row.nbytes / rows[0].nbytes:.2f} %"
        errors = (f"{100 * error:.2f} %" if error else "" for error in (row.pooled_error, row.logit_error))
        table.add_row(row.name, f"{row.nbytes:,}", share, *errors)
    Console(highlight=False, width=120).print(table)


if __name__ == "__main__":
    main()
