"""A TorchRec collection of which some tables are too small to be packed: floats, packed with floats, all packed."""

import argparse
import statistics
from collections.abc import Sequence
from time import thread_time
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor  # type: ignore[import-untyped]

import embpack
from embpack.torch import quantize_

TABLES, ROWS, SMALL_ROWS, DIM = 26, 5000, 8, 64
REPETITIONS = 200


def make_model(num_small: int) -> nn.Module:
    """Make a model of a collection, of which the first tables are small."""
    configs = [
        EmbeddingBagConfig(
            name=f"table{number}",
            feature_names=[f"feature{number}"],
            num_embeddings=SMALL_ROWS if number < num_small else ROWS,
            embedding_dim=DIM,
        )
        for number in range(TABLES)
    ]
    return nn.Sequential(EmbeddingBagCollection(tables=configs))


def make_features(batch: int) -> Any:
    """Make features of one index a bag, which every table has."""
    names = [f"feature{number}" for number in range(TABLES)]
    indices = torch.randint(0, SMALL_ROWS, (TABLES * batch,))
    return KeyedJaggedTensor.from_lengths_sync(names, indices, torch.ones(TABLES * batch, dtype=torch.int64))


def time_models(models: Sequence[nn.Module], batch: int) -> list[float]:
    """Microseconds of processor time a call, medians, of the models in turns."""
    times: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for _ in range(REPETITIONS):
            for model, of_model in zip(models, times, strict=True):
                features = make_features(batch)
                start = thread_time()
                model(features)
                of_model.append(1e6 * (thread_time() - start))
    return [statistics.median(of_model) for of_model in times]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print how long a call takes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small_tables", description=__doc__)
    parser.add_argument("--small", type=int, nargs="+", default=[3, 13, 25], help=f"small tables of {TABLES}")
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 2048])
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    embpack.set_num_threads(1)
    console = Console()
    for num_small in chosen.small:
        models = _, mixed, packed = [make_model(num_small) for _ in range(3)]
        quantize_(mixed, "asym")
        quantize_(packed, "asym", filter=lambda module, name: True)
        for batch in chosen.batch:
            of_floats, of_mixed, of_packed = time_models(models, batch)
            console.print(
                f"{num_small} small tables of {TABLES}, {batch} bags each: {of_floats:,.0f} us float, {of_mixed:,.0f} "
                f"packed and small ones float ({of_floats / of_mixed:.2f} times as fast), {of_packed:,.0f} all packed "
                f"({of_floats / of_packed:.2f})",
                highlight=False,
                soft_wrap=True,
            )


if __name__ == "__main__":
    main()
