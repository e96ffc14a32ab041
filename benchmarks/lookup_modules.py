"""The race of modules: what models call, and what a call costs there."""

from collections.abc import Iterator
from typing import Any

import embpack
from benchmarks.bags import Expected, make_bags, make_table, make_uneven_bags
from benchmarks.harness import Contestant, Workload
from benchmarks.lookup_setup import OTHER_DIM, Setup, describe_group_race, find_wrong_by
from benchmarks.peers import Lookup

BAG_SIZE = 20
# Of each table of a collection.
BATCHES = (1, 100)


def race_modules(setup: Setup) -> Iterator[Workload[Any]]:
    """Our modules against PyTorch's and TorchRec's."""
    try:
        import torch

        from benchmarks.peers.modules import BAGS, FLOAT_BAG
    except ImportError as error:
        setup.left_out["modules"] = str(error)
        return
    table = make_table(setup.sizes.rows, OTHER_DIM)
    for indices in (BAG_SIZE, setup.sizes.indices):
        bags = make_bags(len(table), BAG_SIZE, indices)
        arguments = torch.from_numpy(bags.indices), torch.from_numpy(bags.offsets)
        calls = {name: _bind(make(table), *arguments) for name, make in BAGS.items()}
        goals = {FLOAT_BAG: setup.goals.module} if indices == BAG_SIZE else {}
        yield _make_workload(calls, [table], bags, goals)
    yield from _race_collections(setup)


def _race_collections(setup: Setup) -> Iterator[Workload[Any]]:
    try:
        import torch
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor  # type: ignore[import-untyped]

        from benchmarks.peers.modules import make_collections
    except ImportError as error:
        setup.left_out["TorchRec's modules"] = str(error)
        return
    tables = [make_table(setup.sizes.rows, OTHER_DIM, seed) for seed in range(setup.sizes.tables)]
    collections = make_collections(tables)
    keys = [str(number) for number in range(len(tables))]
    for batch in BATCHES:
        bags = make_uneven_bags(setup.sizes.rows, BAG_SIZE, len(tables) * batch)
        indices, offsets = torch.from_numpy(bags.indices), torch.from_numpy(bags.offsets)

        def make_features(indices: Any = indices, offsets: Any = offsets) -> Any:
            # In the call: TorchRec's modules keep in it what they have found out about it.
            return KeyedJaggedTensor(keys, indices, offsets=offsets)

        calls = {name: _bind_features(module, make_features) for name, module in collections.items()}
        yield _make_workload(calls, tables, bags, {})


def _bind(module: Any, *arguments: Any) -> Lookup:
    return lambda: module(*arguments)


def _bind_features(module: Any, make_features: Any) -> Lookup:
    return lambda: module(make_features()).values()


def _make_workload(
    calls: dict[str, Lookup], tables: list[Any], bags: Any, goals: dict[str, float | None]
) -> Workload[Any]:
    """Make a race of one thread each; the first call is ours."""
    import torch

    from benchmarks.peers.modules import find_isa

    def make_ready() -> None:
        embpack.set_num_threads(1)
        torch.set_num_threads(1)

    ours, *others = (
        Contestant(name, call, len(bags.indices), make_ready, find_isa(name), goals.get(name))
        for name, call in calls.items()
    )
    settings = describe_group_race("modules", tables, bags)
    return Workload(settings, ours, others, find_wrong_by(Expected(tables, bags)))
