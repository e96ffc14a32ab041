"""Processes that serve packed tables together, for tests/test_torchrec_sharding.py.

    python -m tests.serving_processes FOLDER

Two processes, then four. FOLDER has big.safetensors, with one table "big". What each process found is written there:
pooled values of its own bags, how much memory its part took, and what was refused.
"""

import itertools
import json
import os
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

import embpack

WORLDS = (2, 4)
ROWS = {"user": 37, "item": 5, "site": 50, "tag": 3}  # four processes have 2, 2, 1 and no rows of "item"
DIMS = {"user": 16, "item": 8, "site": 256, "tag": 16}
BITS = {"user": 4, "item": 8, "site": 2, "tag": 4}
# "user" is read by two features, and "i" reads two tables.
FEATURES = {"user": ["u1", "u2"], "item": ["i"], "site": ["s", "i"], "tag": ["t"]}
KEYS = ("i", "u1", "t", "s", "u2")
LEAST_ROWS = {key: min(ROWS[name] for name in ROWS if key in FEATURES[name]) for key in KEYS}
PLANS = {
    "rows": dict.fromkeys(ROWS, "row"),
    "tables": {"user": "table", "item": "table", "site": "table", "tag": "table"},
    "columns": {"user": "table", "item": "table", "site": "column", "tag": "table"},
    "mixed": {"user": "row", "item": "table", "site": "column", "tag": "row"},
}
POOLINGS = {
    "sum": dict.fromkeys(ROWS, "SUM"),
    "mean": dict.fromkeys(ROWS, "MEAN"),
    "both": {"user": "MEAN", "item": "MEAN", "site": "SUM", "tag": "SUM"},
}


class Case(NamedTuple):
    """How tables are sharded and pooled, and whether processes have as many bags as each other."""

    plan: str
    pooling: str
    is_weighted: bool
    is_even: bool

    @property
    def name(self) -> str:
        return "-".join(
            (self.plan, self.pooling, "weighted" if self.is_weighted else "plain", "even" if self.is_even else "uneven")
        )


CASES = [
    Case(plan, pooling, is_weighted, is_even=is_weighted)
    for plan, pooling, is_weighted in itertools.product(PLANS, POOLINGS, (False, True))
]


def make_tables():
    """Packed tables of each width, and rows that differ in size."""
    rng = np.random.default_rng(5)
    return {
        name: embpack.quantize(
            rng.standard_normal((rows, DIMS[name]), np.float32) * rng.uniform(0.1, 3, (rows, 1)).astype(np.float32),
            bits=BITS[name],
            param_dtype="float16",
        )
        for name, rows in ROWS.items()
    }


def make_configs(pooling):
    from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

    return [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=rows,
            embedding_dim=DIMS[name],
            feature_names=FEATURES[name],
            pooling=PoolingType[POOLINGS[pooling][name]],
        )
        for name, rows in ROWS.items()
    ]


def make_features(case, rank):
    """A process's own bags: empty ones, ones of one index, longer ones; indices of either type."""
    import torch
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    rng = np.random.default_rng(100 + rank)
    lengths = rng.integers(0, 9, (len(KEYS), 8 if case.is_even else 7 + 2 * rank))
    lengths[:, :3] = 0, 1, 30
    dtype = np.int64 if case.is_even else np.int32
    indices = [rng.integers(0, LEAST_ROWS[key], counts.sum()) for key, counts in zip(KEYS, lengths, strict=True)]
    weights = rng.standard_normal(lengths.sum(), np.float32) if case.is_weighted else None
    return KeyedJaggedTensor(
        list(KEYS),
        torch.from_numpy(np.concatenate(indices).astype(dtype)),
        lengths=torch.from_numpy(lengths.reshape(-1).astype(dtype)),
        weights=None if weights is None else torch.from_numpy(weights),
    )


def make_model(collection):
    import torch

    torch.manual_seed(0)
    return torch.nn.ModuleDict({"ebc": collection, "over": torch.nn.Linear(4, 2)})


def _make_plan(plan, world):
    from torchrec.distributed.sharding_plan import column_wise, row_wise, table_wise

    return {
        name: row_wise()
        if how == "row"
        else column_wise(ranks=[world - 1, 0])
        if how == "column"
        else table_wise(rank=number % world)
        for number, (name, how) in enumerate(PLANS[plan].items())
    }


def _make_meta(configs, is_weighted=False):
    import torch
    from torchrec.modules.embedding_modules import EmbeddingBagCollection

    return EmbeddingBagCollection(configs, is_weighted=is_weighted, device=torch.device("meta"))


def _serve(case, tables, rank, world):
    import torch
    from torchrec.distributed.shard import shard

    from embpack.torchrec import Sharder

    meta = _make_meta(make_configs(case.pooling), case.is_weighted)
    sharded = shard(meta, _make_plan(case.plan, world), sharder=Sharder(tables))
    with torch.inference_mode():
        pooled = sharded(make_features(case, rank))
        return {f"{case.name}/{key}": pooled[key].numpy() for key in pooled.keys()}


def _serve_model(tables, rank):
    """A model whose plan TorchRec's planner makes; its state is that of the layer."""
    import torch
    import torch.distributed as dist
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology

    from embpack.torchrec import Sharder

    model = make_model(_make_meta(make_configs("sum")))
    size = dist.get_world_size()
    planner = EmbeddingShardingPlanner(Topology(size, "cpu", local_world_size=size))
    plan = planner.collective_plan(model, [Sharder(tables)], dist.GroupMember.WORLD)
    served = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=[Sharder(tables)])
    served.load_state_dict(served.state_dict())
    pooled = served.module["ebc"](make_features(CASES[0], rank))
    found = {f"model/{key}": pooled[key].detach().numpy() for key in pooled.keys()}
    return found, sorted(served.state_dict())


def _private_bytes():
    """Memory that no other process has, pages of mapped files not counted."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def _serve_big(folder):
    """The bytes that a table's part took, and those of whole tables that a process reads itself."""
    from torchrec.distributed.shard import shard
    from torchrec.distributed.sharding_plan import row_wise
    from torchrec.modules.embedding_configs import EmbeddingBagConfig

    from embpack.torchrec import Sharder

    tables = embpack.load(folder / "big.safetensors")
    rows, dim = tables["big"].shape
    meta = _make_meta([EmbeddingBagConfig(name="big", num_embeddings=rows, embedding_dim=dim, feature_names=["b"])])
    before = _private_bytes()
    sharded = shard(meta, row_wise(), sharder=Sharder(tables))
    taken = _private_bytes() - before
    del sharded
    return taken


def _refused(tables, world):
    """What the others say: TorchRec of packed rows in its own sharder, ours of bags that differ in number."""
    import torch
    import torch.distributed as dist
    from torchrec.distributed import sharding_plan
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.shard import shard
    from torchrec.distributed.types import ShardingEnv
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    from embpack.torchrec import Sharder

    errors = {}
    meta = _make_meta(make_configs("sum"))
    sharder, per_table = (
        EmbeddingBagCollectionSharder(),
        dict.fromkeys(ROWS, sharding_plan.row_wise(compute_kernel="quant")),
    )
    plan = sharding_plan.construct_module_sharding_plan(meta, per_table, sharder, world, world, "cpu")
    try:
        sharder.shard(meta, plan, ShardingEnv.from_process_group(dist.GroupMember.WORLD), torch.device("cpu"))
    except ValueError as error:
        errors["torchrec"] = str(error)
    sharded = shard(meta, _make_plan("rows", world), sharder=Sharder(tables))
    bags = [[2], [1], [1], [1], [1]]
    try:
        sharded(
            KeyedJaggedTensor(
                list(KEYS),
                torch.zeros(6, dtype=torch.int64),
                lengths=torch.ones(6, dtype=torch.int64),
                stride_per_key_per_rank=bags,
            )
        )
    except ValueError as error:
        errors["bags"] = str(error)
    return errors


def _run(rank, folder, world):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous{world}", rank=rank, world_size=world)
    taken = _serve_big(folder)
    tables = make_tables()
    found, state = _serve_model(tables, rank)
    for case in CASES:
        found |= _serve(case, tables, rank, world)
    np.savez(folder / f"{world}-{rank}.npz", **found)
    report = {"taken": taken, "state": state, "errors": _refused(tables, world)}
    (folder / f"{world}-{rank}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    import torch.multiprocessing

    folder = Path(sys.argv[1]).absolute()
    with warnings.catch_warnings(action="ignore"):
        import embpack.torchrec  # noqa: F401 - once, not in each process
    for world in WORLDS:
        os.environ["LOCAL_WORLD_SIZE"] = str(world)
        torch.multiprocessing.start_processes(_run, (folder, world), world, start_method="fork")


if __name__ == "__main__":
    main()
