"""Packed tables sharded by TorchRec: over two and four processes, which talk by gloo, and by its own sharder in one."""

import itertools
import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import embpack

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what TorchRec and FBGEMM say while they are imported is not ours
    pytest.importorskip("torchrec")
    from torchrec.distributed import global_settings, sharding_plan
    from torchrec.distributed.fused_params import FUSED_PARAM_QUANT_STATE_DICT_SPLIT_SCALE_BIAS
    from torchrec.distributed.quant_embeddingbag import QuantEmbeddingBagCollectionSharder
    from torchrec.distributed.types import ShardingEnv
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.modules.embedding_modules import EmbeddingBagCollection

    from embpack import torchrec as bridge
    from embpack.torchrec.sharding import _fill_part

from serving_processes import (
    CASES,
    FEATURES,
    PLANS,
    POOLINGS,
    ROWS,
    WORLDS,
    make_configs,
    make_features,
    make_model,
    make_tables,
)

CPU, META = torch.device("cpu"), torch.device("meta")
BIG_ROWS, BIG_DIM = 1_000_001, 64


@pytest.fixture(scope="module")
def tables():
    return make_tables()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """By number of processes: for each process, pooled values by name and what else it reports."""
    folder = tmp_path_factory.mktemp("serving")
    packed = np.random.default_rng(3).integers(0, 60, (BIG_ROWS, BIG_DIM // 2 + 4), np.uint8)
    embpack.save(folder / "big.safetensors", {"big": embpack.PackedTable.from_packed(packed, embedding_dim=BIG_DIM)})
    command = [sys.executable, "-W", "ignore", "-m", "tests.serving_processes", str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {
        world: [
            (np.load(folder / f"{world}-{rank}.npz"), json.loads((folder / f"{world}-{rank}.json").read_text()))
            for rank in range(world)
        ]
        for world in WORLDS
    }


def pool_exactly(table, features, key, pooling):
    """Pooled rows in float64, and how far any order of float32 operations may be, but for the number of shards.

    A row is fma(w * scale, code, sum + w * bias): each of its n indices rounds w * scale, w * bias, the sum with it and
    the fma, so a sum is within 4 n u of the magnitudes, and so are the sums of shards together.
    """
    one = features[key]
    lengths, indices = one.lengths().numpy(), one.values().numpy().astype(np.int64)
    weights = np.ones(len(indices)) if one.weights_or_none() is None else one.weights().numpy().astype(np.float64)
    code_bytes = table.row_format.code_bytes
    scale, bias = np.ascontiguousarray(table.packed[:, code_bytes:]).view(np.float16).astype(np.float64).T[..., None]
    rows = table.dequantize().astype(np.float64)
    magnitudes = np.abs(rows - bias) + np.abs(bias)
    assert scale.shape == bias.shape
    bags = np.repeat(np.arange(len(lengths)), lengths)
    sums, bounds = np.zeros((2, len(lengths), rows.shape[1]))
    np.add.at(sums, bags, weights[:, None] * rows[indices])
    np.add.at(bounds, bags, np.abs(weights)[:, None] * magnitudes[indices])
    counts = np.maximum(lengths, 1)[:, None]
    return (sums / counts, bounds / counts, counts) if pooling == "MEAN" else (sums, bounds, counts)


def one_process(tables, case):
    return bridge.from_tables(tables, make_configs(case.pooling), is_weighted=case.is_weighted)


def table_of(key):
    name, _, table = key.partition("@")
    return table or next(table for table, keys in FEATURES.items() if name in keys)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_are_those_of_one_process(served, tables, case, world):
    """Bit for bit, but for rows on several processes: their sums are added shard by shard."""
    whole = one_process(tables, case)
    for rank, (found, _) in enumerate(served[world]):
        features = make_features(case, rank)
        wanted = whole(features)
        names = [name.removeprefix(f"{case.name}/") for name in found if name.startswith(f"{case.name}/")]
        assert sorted(names) == sorted(wanted.keys()) == ["i@item", "i@site", "s", "t", "u1", "u2"]
        for key in names:
            values, name = found[f"{case.name}/{key}"], table_of(key)
            assert values.dtype == np.float32
            if PLANS[case.plan][name] != "row":
                np.testing.assert_array_equal(values, wanted[key].numpy())
                continue
            pooling = POOLINGS[case.pooling][name]
            exact, magnitudes, counts = pool_exactly(tables[name], features, key.partition("@")[0], pooling)
            # 4 u an index, one for each other shard, two for the mean's reciprocal and product.
            bound = (4 * counts + world + 2) * 2.0**-24 * magnitudes + 2.0**-149
            assert np.all(np.abs(values - exact) <= bound), (rank, key)
            assert not values[0].any()  # an empty bag
            if not case.is_weighted:
                np.testing.assert_array_equal(values[1], wanted[key].numpy()[1])  # a bag of one, a mean or not


@pytest.mark.parametrize("world", WORLDS)
def test_a_process_holds_its_part_alone(served, world):
    """Of a mapped table of 36 MB; some pages more for what TorchRec makes besides."""
    part = BIG_ROWS * (BIG_DIM // 2 + 4) / world
    for _, report in served[world]:
        assert part * 0.99 < report["taken"] < part + 2**20


@pytest.mark.parametrize("world", WORLDS)
def test_a_model_with_a_plan_of_torchrecs_planner(served, tables, world):
    whole = bridge.from_tables(tables, make_configs("sum"))
    layer = make_model(whole)["over"]
    for rank, (found, report) in enumerate(served[world]):
        features = make_features(CASES[0], rank)
        wanted = whole(features)
        for key in wanted.keys():
            np.testing.assert_allclose(found[f"model/{key}"], wanted[key].numpy(), rtol=0, atol=1e-4)
        assert report["state"] == [f"over.{name}" for name in sorted(dict(layer.named_parameters()))]


@pytest.mark.parametrize("world", WORLDS)
def test_features_with_more_bags_than_others_are_refused(served, world):
    for _, report in served[world]:
        assert report["errors"]["bags"].startswith("features differ in their number of bags")


# What TorchRec does by itself


def test_torchrecs_own_sharder_over_processes_takes_no_packed_rows(served):
    for _, report in served[2]:
        assert report["errors"]["torchrec"] == "Compute kernel not supported EmbeddingComputeKernel.QUANT"


@pytest.fixture
def propagated():
    """TorchRec's quantized sharding looks for a CUDA device unless it is told to go by the one that it is given."""
    before = global_settings.get_propogate_device()
    global_settings.set_propogate_device(True)
    yield
    global_settings.set_propogate_device(before)


def shard_in_one_process(tables, pooling, plan):
    """TorchRec's own quantized sharding, of four ranks, all of them in this process."""
    whole = bridge.from_tables(tables, make_configs(pooling), quant_state_dict_split_scale_bias=True)
    generators = {
        name: sharding_plan.row_wise(compute_kernel="quant")
        if how == "row"
        else sharding_plan.column_wise(ranks=[3, 0], compute_kernel="quant")
        if how == "column"
        else sharding_plan.table_wise(rank=number, compute_kernel="quant")
        for number, (name, how) in enumerate(PLANS[plan].items())
    }
    sharder = QuantEmbeddingBagCollectionSharder({FUSED_PARAM_QUANT_STATE_DICT_SPLIT_SCALE_BIAS: True})
    plan = sharding_plan.construct_module_sharding_plan(whole, generators, sharder, 4, 4, "cpu")
    sharded = sharder.shard(whole, plan, ShardingEnv.from_local(4, 0), CPU)
    for tbe, config in sharded.tbes_configs().items():
        _fill_part(tbe, config.embedding_tables, tables)
    return sharded, whole


@pytest.mark.parametrize(("plan", "pooling"), [*itertools.product(PLANS, ["sum"]), ("tables", "mean")])
def test_torchrecs_quantized_sharding_in_one_process(propagated, tables, plan, pooling):
    sharded, whole = shard_in_one_process(tables, pooling, plan)
    features = make_features(CASES[0], 0)
    found, wanted = sharded(features), whole(features)
    for key in wanted.keys():
        np.testing.assert_allclose(found[key].numpy(), wanted[key].numpy(), rtol=0, atol=1e-4)


def test_torchrecs_quantized_sharding_divides_means_in_each_shard(propagated, tables):
    """So it is wrong by rows, and a Sharder has sums there; should this fail, TorchRec has mended it."""
    sharded, whole = shard_in_one_process(tables, "mean", "rows")
    features = make_features(CASES[0], 0)
    assert (sharded(features)["u1"] - whole(features)["u1"]).abs().max() > 0.1


def test_torchrecs_quantized_sharding_wants_cuda(tables):
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        shard_in_one_process(tables, "sum", "tables")


# Errors


def make_meta(configs=None):
    return EmbeddingBagCollection(make_configs("sum") if configs is None else configs, device=META)


def shard(tables, meta=None, generators=None, *, world=2, plan=None, env=None, device=CPU):
    """Shard without processes: what is refused is refused before they are needed."""
    meta = make_meta() if meta is None else meta
    sharder = bridge.Sharder(tables)
    if plan is None:
        names = [config.name for config in meta.embedding_bag_configs()]
        generators = dict.fromkeys(names, sharding_plan.row_wise()) | (generators or {})
        plan = sharding_plan.construct_module_sharding_plan(meta, generators, sharder, world, world, "cpu")
    if env is None:
        env = ShardingEnv.from_local(world, 0)
        env.process_group = SimpleNamespace()
    return sharder.shard(meta, plan, env, device)


def one_table(weight, method="greedy", **options):
    """A collection of one table, and the table."""
    rows, dim = weight.shape
    config = EmbeddingBagConfig(name="user", num_embeddings=rows, embedding_dim=dim, feature_names=["u"])
    return make_meta([config]), {"user": embpack.quantize(weight, method, **options)}


UNREAD = {
    "trellis": (dict(method="trellis"), r"table 'user' has rows of the trellis layout, .* 'greedy' or 'asym'"),
    "codebook": (dict(method="kmeans"), r"table 'user' has rows of the codebook layout, .* 'greedy' or 'asym'"),
    "rotated": (dict(rotate="hadamard"), r"table 'user' has rotation 'hadamard', .* pack its weights without rotate"),
    "float32": (dict(param_dtype="float32"), r"table 'user' has float32 parameters, .* param_dtype='float16'"),
}


@pytest.mark.parametrize(("options", "message"), UNREAD.values(), ids=UNREAD)
def test_rows_that_fbgemm_does_not_read(rng, options, message):
    meta, tables = one_table(rng.standard_normal((40, 64), np.float32), **options)
    with pytest.raises(ValueError, match=message):
        shard(tables, meta)


def test_a_table_that_stays_on_the_disk(rng, tmp_path):
    meta, tables = one_table(rng.standard_normal((40, 64), np.float32))
    embpack.save(tmp_path / "tables.safetensors", tables)
    with pytest.raises(TypeError, match="table 'user' is DiskTable, not PackedTable; load it mapped"):
        shard(embpack.load(tmp_path / "tables.safetensors", access="disk"), meta)


def test_tables_and_collection_differ(rng, tables):
    with pytest.raises(ValueError, match="the collection has table 'item', but the tables are user; add it"):
        shard({"user": tables["user"]})
    with pytest.raises(ValueError, match="table 'user' is 38 x 16, but its config says 37 x 16"):
        shard(tables | {"user": embpack.quantize(rng.standard_normal((38, 16), np.float32))})


def test_what_is_no_collection(tables):
    with pytest.raises(
        TypeError, match=r"module is an EmbeddingBag; a Sharder takes a torchrec\.EmbeddingBagCollection"
    ):
        shard(tables, torch.nn.EmbeddingBag(3, 4), plan={})


def test_without_processes(tables):
    with pytest.raises(ValueError, match=r"there is no process group; call .*init_process_group\('gloo'\)"):
        shard(tables, env=ShardingEnv.from_local(2, 0))


def test_another_device(tables):
    with pytest.raises(ValueError, match=r"device is cuda:0; .* on CPUs: device='cpu'"):
        shard(tables, device=torch.device("cuda:0"))


PLANS_REFUSED = {
    "data parallel": (
        {"user": sharding_plan.data_parallel()},
        "the plan shards table 'user' 'data_parallel', .* choose one of row_wise, table_wise, column_wise",
    ),
    "no such rank": (
        {"user": sharding_plan.table_wise(rank=2)},
        r"the plan has table 'user' on ranks \[2\], but there are 2 processes \(valid: 0 to 1\)",
    ),
    "uneven rows": (
        {"user": sharding_plan.row_wise(([30, 7], "cpu"))},
        r"shards of table 'user' begin at rows \[0, 30\] and end at 37, but of 2 processes TorchRec asks for rows from "
        r"\[0, 19\] to 37",
    ),
}


@pytest.mark.parametrize(("generators", "message"), PLANS_REFUSED.values(), ids=PLANS_REFUSED)
def test_plans_that_are_refused(tables, generators, message):
    with pytest.raises(ValueError, match=message):
        shard(tables, generators=generators)


def test_a_plan_for_another_number_of_processes(tables):
    meta, sharder = make_meta(), bridge.Sharder(tables)
    rows = dict.fromkeys(ROWS, sharding_plan.row_wise())
    plan = sharding_plan.construct_module_sharding_plan(meta, rows, sharder, 4, 4, "cpu")
    with pytest.raises(ValueError, match=r"begin at rows \[0, 10, 20, 30\] and end at 37, but of 2 processes"):
        shard(tables, meta, plan=plan)
    del plan["item"]
    with pytest.raises(ValueError, match="the plan says nothing of table 'item'; add how it is sharded"):
        shard(tables, meta, plan=plan, world=4)


def test_columns_are_cut_between_bytes(tables):
    meta, sharder = make_meta(), bridge.Sharder(tables)
    generators = dict.fromkeys(ROWS, sharding_plan.row_wise()) | {"site": sharding_plan.column_wise(ranks=[0, 1])}
    plan = sharding_plan.construct_module_sharding_plan(meta, generators, sharder, 2, 2, "cpu")
    first, second = plan["site"].sharding_spec.shards
    first.shard_sizes, second.shard_sizes, second.shard_offsets = [50, 126], [50, 130], [0, 126]
    with pytest.raises(ValueError, match=r"has columns 0 to 126 of table 'site' on one process, .* multiples of 4; "):
        shard(tables, meta, plan=plan)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"num_embeddings_post_pruning": 37}, "table 'user' is pruned, and shards do not map indices"),
        ({"use_virtual_table": True, "total_num_buckets": 1}, "table 'user' is virtual"),
    ],
    ids=["pruned", "virtual"],
)
def test_tables_with_other_indices(tables, option, message):
    meta = make_meta()
    [config] = [config for config in meta.embedding_bag_configs() if config.name == "user"]
    for name, value in option.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        shard(tables, meta, generators=None)
