"""TorchRec's quantized collections made with our bytes and read back, with TorchRec itself running."""

import copy
import io
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hard_rows import hard_table

import embpack

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what TorchRec and FBGEMM say while they are imported is not ours
    pytest.importorskip("torchrec")
    from torch.ao.quantization import PlaceholderObserver
    from torchrec.modules.embedding_configs import (
        DataType,
        EmbeddingBagConfig,
        EmbeddingConfig,
        PoolingType,
        QuantConfig,
    )
    from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
    from torchrec.quant import embedding_modules as quant
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    from embpack import fbgemm
    from embpack import torchrec as bridge
    from embpack.torch import PackedEmbeddingBag, PackedEmbeddingBagCollection, quantize_

from test_fbgemm import group_bound, random_bags  # after TorchRec: it is skipped without

TORCHREC_DTYPES = {2: torch.quint2x4, 4: torch.quint4x2, 8: torch.qint8}
CPU = torch.device("cpu")
# "user" is read by two features, and "tag" is read by one that reads another table too.
FEATURES = {"user": ["u1", "u2"], "item": ["i"], "tag": ["t", "i"]}
DIMS = {"user": 64, "item": 16, "tag": 8}


def weights_of(rng, dims=DIMS):
    """Normal rows, then those that quantizers get wrong: constant ones, negative and subnormal scales."""
    return {
        name: np.concatenate([rng.standard_normal((40, dim), np.float32), hard_table(dim)])
        for name, dim in dims.items()
    }


def configs_of(weights, poolings=(PoolingType.SUM,) * 3, kind=EmbeddingBagConfig):
    pooled = [{"pooling": pooling} if kind is EmbeddingBagConfig else {} for pooling in poolings]
    return [
        kind(
            name=name,
            num_embeddings=len(weight),
            embedding_dim=weight.shape[1],
            feature_names=FEATURES[name],
            **more,
        )
        for (name, weight), more in zip(weights.items(), pooled, strict=True)
    ]


def make_bags(weights, poolings=(PoolingType.SUM,) * 3, *, is_weighted=False):
    """A float EmbeddingBagCollection, as it comes out of training."""
    ebc = EmbeddingBagCollection(configs_of(weights, poolings), is_weighted=is_weighted, device=CPU)
    ebc.load_state_dict({f"embedding_bags.{name}.weight": torch.from_numpy(array) for name, array in weights.items()})
    return ebc


def make_sequences(weights):
    """A float EmbeddingCollection; all tables have one embedding_dim."""
    ec = EmbeddingCollection(configs_of(weights, kind=EmbeddingConfig), device=CPU, need_indices=True)
    ec.load_state_dict({f"embeddings.{name}.weight": torch.from_numpy(array) for name, array in weights.items()})
    return ec


def torchrecs_own(collection, bits=4):
    """What TorchRec's from_float makes, by minimum and maximum."""
    collection = copy.deepcopy(collection)
    collection.qconfig = QuantConfig(
        activation=PlaceholderObserver.with_args(dtype=torch.float32),
        weight=PlaceholderObserver.with_args(dtype=TORCHREC_DTYPES[bits]),
    )
    is_bags = isinstance(collection, EmbeddingBagCollection)
    return (quant.EmbeddingBagCollection if is_bags else quant.EmbeddingCollection).from_float(collection)


def make_features(rng, rows=40, *, is_weighted=False, keys=("t", "u1", "i", "u2"), dtype=np.int64):
    """A KeyedJaggedTensor whose keys stand in another order than the collection's."""
    indices, offsets = random_bags(rng, [rows] * len(keys), bags=12)
    weights = rng.standard_normal(len(indices), np.float32) if is_weighted else None
    return KeyedJaggedTensor(
        keys=list(keys),
        values=torch.from_numpy(indices.astype(dtype)),
        lengths=torch.from_numpy(np.diff(offsets).astype(dtype)),
        weights=None if weights is None else torch.from_numpy(weights),
    )


def bytes_of(collection):
    return {name: table.packed for name, table in bridge.to_tables(collection).items()}


def assert_same_bytes(ours, theirs):
    assert list(ours) == list(theirs)
    for name, packed in ours.items():
        np.testing.assert_array_equal(packed, theirs[name])


# quantize


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("make", [make_bags, make_sequences])
def test_asym_makes_torchrecs_own_bytes(rng, make, bits):
    collection = make(weights_of(rng, dict.fromkeys(DIMS, 32)))
    ours = bridge.quantize(collection, "asym", bits)
    theirs = torchrecs_own(collection, bits)
    assert type(ours) is type(theirs)
    assert_same_bytes(bytes_of(ours), bytes_of(theirs))
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert type(tensor) is type(theirs[name])
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("method", ["greedy", "greedy-paper", "gss", "hist-apprx"])
def test_the_bytes_are_those_of_embpack(rng, method, bits):
    weights = weights_of(rng)
    quantized = bridge.quantize(make_bags(weights), method, bits)
    wanted = {name: embpack.quantize(weight, method, bits, "float16").packed for name, weight in weights.items()}
    assert_same_bytes(bytes_of(quantized), wanted)


@pytest.mark.parametrize("bits", [2, 4])
def test_greedy_loses_less_than_torchrec(rng, bits):
    """Of every table, and pooled."""
    weights = {name: rng.standard_normal((200, dim), np.float32) for name, dim in DIMS.items()}
    ebc = make_bags(weights)
    greedy, own = bridge.quantize(ebc, "greedy", bits), torchrecs_own(ebc, bits)
    ours, theirs = bridge.to_tables(greedy), bridge.to_tables(own)
    for name, weight in weights.items():
        ours_loss, theirs_loss = (np.linalg.norm(weight - tables[name].dequantize()) for tables in (ours, theirs))
        assert ours_loss < 0.99 * theirs_loss, name
    features = make_features(rng, 200)
    exact = ebc(features).values()
    errors = [torch.linalg.norm(quantized(features).values() - exact) for quantized in (greedy, own)]
    assert errors[0] < errors[1]


POOLINGS = {
    "sum": (PoolingType.SUM,) * 3,
    "mean": (PoolingType.MEAN,) * 3,
    "mixed": (PoolingType.MEAN, PoolingType.SUM, PoolingType.MEAN),
}


@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("is_weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("poolings", POOLINGS.values(), ids=POOLINGS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pooled_values_are_bit_for_bit_torchrecs(rng, bits, poolings, is_weighted, index_dtype):
    """TorchRec's own module, given our bytes the way its from_float does."""
    weights = weights_of(rng)
    ours = bridge.quantize(make_bags(weights, poolings, is_weighted=is_weighted), bits=bits)
    packed = {
        name: torch.from_numpy(embpack.quantize(weight, "optimal", bits, "float16").packed)
        for name, weight in weights.items()
    }
    configs = configs_of(weights, poolings)
    for config in configs:
        config.data_type = {2: DataType.INT2, 4: DataType.INT4, 8: DataType.INT8}[bits]
    theirs = quant.EmbeddingBagCollection(
        configs,
        is_weighted,
        CPU,
        table_name_to_quantized_weights={name: (rows[:, :-4], rows[:, -4:]) for name, rows in packed.items()},
    )
    features = make_features(rng, is_weighted=is_weighted, dtype=index_dtype)
    pooled, wanted = ours(features), theirs(features)
    assert pooled.keys() == wanted.keys()
    assert pooled.length_per_key() == wanted.length_per_key()
    assert pooled.values().dtype == torch.float32
    assert torch.equal(pooled.values(), wanted.values())


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_pooled_values_are_bit_for_bit_those_of_fbgemm(rng, pooling):
    weights = weights_of(rng)
    quantized = bridge.quantize(make_bags(weights, POOLINGS[pooling]))
    features = make_features(rng, keys=("u1", "u2", "i", "t"))
    module = fbgemm.to_tbe(list(bridge.to_tables(quantized).values()), pooling, [0, 0, 1, 2, 2])
    in_order = features.permute([0, 1, 2, 3, 2])  # feature after feature, as the configs have them
    assert torch.equal(quantized(features).values(), module(in_order.values(), in_order.offsets()))


@pytest.mark.parametrize("mode", ["sum", "weighted", "mean"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pooled_values_are_close_to_those_of_a_table_group(rng, bits, mode):
    pooling = "mean" if mode == "mean" else "sum"
    quantized = bridge.quantize(
        make_bags(weights_of(rng), POOLINGS[pooling], is_weighted=mode == "weighted"), bits=bits
    )
    tables = list(bridge.to_tables(quantized).values())
    features = make_features(rng, 60, is_weighted=mode == "weighted")
    pooled = quantized(features).values().numpy()
    in_order = features.permute([1, 3, 2, 0, 2])
    indices, offsets = in_order.values().numpy(), in_order.offsets().numpy()
    weights = in_order.weights().numpy() if mode == "weighted" else None
    table_of = [0, 0, 1, 2, 2]
    group = embpack.TableGroup(tables, table_of, pooling)
    ours = group.embedding_bag(indices, offsets, per_sample_weights=weights).astype(np.float64)
    assert np.all(np.abs(ours - pooled) <= group_bound(tables, table_of, indices, offsets, pooling, weights))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_row_is_read_exactly(rng, bits):
    """Constant rows, negative and subnormal scales among them."""
    weights = {"item": hard_table(16, bits)}
    quantized = bridge.quantize(make_bags(weights, (PoolingType.SUM,)), bits=bits)
    table = bridge.to_tables(quantized)["item"]
    scales = np.ascontiguousarray(table.packed[:, -4:-2]).view(np.float16)
    assert (scales < 0).any() and ((scales != 0) & (np.abs(scales) < 2.0**-14)).any()
    count = len(weights["item"])
    features = KeyedJaggedTensor(keys=["i"], values=torch.arange(count), lengths=torch.ones(count, dtype=torch.int64))
    rows = quantized(features).values().numpy()
    np.testing.assert_array_equal(rows, table.dequantize())
    np.testing.assert_array_equal(rows, embpack.quantize(weights["item"], "optimal", bits, "float16").dequantize())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_embedding_collection_reads_rows_exactly(rng, bits):
    weights = weights_of(rng, dict.fromkeys(DIMS, 16))
    quantized = bridge.quantize(make_sequences(weights), bits=bits)
    assert quantized.need_indices()
    features = make_features(rng)
    found = quantized(features)
    assert set(found) == {"u1", "u2", "i@item", "t", "i@tag"}
    tables = bridge.to_tables(quantized)
    for key, name in {"u1": "user", "u2": "user", "t": "tag", "i@item": "item", "i@tag": "tag"}.items():
        indices = features[key.partition("@")[0]].values().numpy()
        np.testing.assert_array_equal(found[key].values().numpy(), tables[name][indices])
        np.testing.assert_array_equal(found[key].weights().numpy(), indices)  # need_indices puts them there


def test_the_float_collection_is_left_as_it_is(rng):
    weights = weights_of(rng)
    ebc = make_bags(weights)
    quantized = bridge.quantize(ebc)
    assert [config.data_type for config in ebc.embedding_bag_configs()] == [DataType.FP32] * 3
    assert [config.data_type for config in quantized.embedding_bag_configs()] == [DataType.INT4] * 3
    for name, weight in weights.items():
        np.testing.assert_array_equal(ebc.embedding_bags[name].weight.detach().numpy(), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tables(rng, dtype):
    ebc = make_bags({name: rng.standard_normal((30, dim), np.float32) for name, dim in DIMS.items()}).to(dtype)
    wanted = {name: embpack.quantize(bag.weight).packed for name, bag in ebc.embedding_bags.items()}
    assert_same_bytes(bytes_of(bridge.quantize(ebc)), wanted)


def test_output_dtype(rng):
    ebc = make_bags(weights_of(rng))
    features = make_features(rng)
    exact, rounded = (
        bridge.quantize(ebc, output_dtype=dtype)(features).values() for dtype in (torch.float, torch.half)
    )
    assert torch.equal(rounded, exact.half())


def test_what_torchrec_marks_on_the_float_module_counts(rng):
    ebc = make_bags(weights_of(rng))
    kinds = [EmbeddingBagCollection]
    quant.quant_prep_enable_quant_state_dict_split_scale_bias(ebc)
    quant.quant_prep_enable_register_tbes(ebc, kinds)
    quant.quant_prep_customize_row_alignment(ebc, kinds, 8)
    quant.quant_prep_enable_cache_features_order(ebc, kinds)
    ours, theirs = bridge.quantize(ebc, "asym"), torchrecs_own(ebc)
    assert ours.row_alignment == 8
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert "embedding_bags.user.weight_qscale" in ours.state_dict()
    assert len(ours.tbes) == 1
    features = make_features(rng)
    assert torch.equal(ours(features).values(), theirs(features).values())
    assert_same_bytes(bytes_of(ours), bytes_of(theirs))


def test_rows_that_pruning_leaves(rng):
    ebc = make_bags(weights_of(rng))
    setattr(ebc, quant.MODULE_ATTR_EMB_CONFIG_NAME_TO_NUM_ROWS_POST_PRUNING_DICT, {"item": 25})
    ours, theirs = bridge.quantize(ebc, "asym"), torchrecs_own(ebc)
    assert_same_bytes(bytes_of(ours), bytes_of(theirs))
    assert bridge.to_tables(ours)["item"].num_embeddings == 25
    assert [config.num_embeddings_post_pruning for config in ebc.embedding_bag_configs()] == [None] * 3


# State


@pytest.mark.parametrize("split", [False, True], ids=["rows", "split scale and bias"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_state_dict_saves_and_loads(rng, bits, split):
    weights = weights_of(rng)
    ebc = make_bags(weights)
    if split:
        quant.quant_prep_enable_quant_state_dict_split_scale_bias(ebc)
    saved = bridge.quantize(ebc, bits=bits)
    file = io.BytesIO()
    # Cloned: of TorchRec's split state dict, codes and scales view the same memory, which torch.save refuses.
    torch.save(
        {name: tensor.clone() for name, tensor in saved.state_dict().items()} if split else saved.state_dict(), file
    )
    file.seek(0)
    fresh = bridge.quantize(make_bags_like(ebc, split), "asym", bits)
    features = make_features(rng)
    assert not torch.equal(fresh(features).values(), saved(features).values())
    fresh.load_state_dict(torch.load(file, weights_only=False))  # TorchRec's UInt4Tensor is no plain tensor
    assert torch.equal(fresh(features).values(), saved(features).values())
    assert_same_bytes(bytes_of(fresh), bytes_of(saved))


def make_bags_like(ebc, split):
    """Another collection of the same shape, of zeros."""
    other = EmbeddingBagCollection(copy.deepcopy(ebc.embedding_bag_configs()), device=CPU)
    for bag in other.embedding_bags.values():
        torch.nn.init.zeros_(bag.weight)
    if split:
        quant.quant_prep_enable_quant_state_dict_split_scale_bias(other)
    return other


def test_torchrecs_own_module_loads_our_state_dict(rng):
    ebc = make_bags(weights_of(rng))
    ours, theirs = bridge.quantize(ebc), torchrecs_own(ebc)
    theirs.load_state_dict(ours.state_dict())
    features = make_features(rng)
    assert torch.equal(theirs(features).values(), ours(features).values())


def test_tables_go_through_a_safetensors_file(tmp_path, rng):
    """As TorchRec's own state dict does not."""
    quantized = bridge.quantize(make_bags(weights_of(rng)))
    embpack.save(tmp_path / "ebc.safetensors", bridge.to_tables(quantized))
    loaded = embpack.load(tmp_path / "ebc.safetensors")
    again = bridge.from_tables(loaded, quantized.embedding_bag_configs())
    features = make_features(rng)
    assert torch.equal(again(features).values(), quantized(features).values())


# from_tables and to_tables


@pytest.mark.parametrize("row_alignment", [1, 16])
@pytest.mark.parametrize("bits", [(2, 4, 8), (4, 4, 4), (8, 2, 2)])
def test_round_trip_is_byte_for_byte(rng, bits, row_alignment):
    """Of tables of different bits too, in the order of the configs."""
    weights = weights_of(rng)
    tables = {
        name: embpack.quantize(weight, "greedy", number, "float16")
        for (name, weight), number in zip(weights.items(), bits, strict=True)
    }
    collection = bridge.from_tables(tables, configs_of(weights, POOLINGS["mixed"]), row_alignment=row_alignment)
    assert collection.row_alignment == row_alignment
    back = bridge.to_tables(collection)
    assert_same_bytes({name: table.packed for name, table in back.items()}, bytes_of(collection))
    assert list(back) == list(tables)
    for name, table in tables.items():
        np.testing.assert_array_equal(back[name].packed, table.packed)
        assert back[name].row_format == table.row_format


def test_sequences_go_round_trip(rng):
    weights = weights_of(rng, dict.fromkeys(DIMS, 8))
    tables = {name: embpack.quantize(weight) for name, weight in weights.items()}
    collection = bridge.from_tables(tables, configs_of(weights, kind=EmbeddingConfig), need_indices=True)
    assert collection.need_indices()
    assert_same_bytes(bytes_of(collection), {name: table.packed for name, table in tables.items()})


def test_weighted_bags_from_tables(rng):
    weights = weights_of(rng)
    tables = {name: embpack.quantize(weight) for name, weight in weights.items()}
    collection = bridge.from_tables(tables, configs_of(weights), is_weighted=True)
    wanted = bridge.quantize(make_bags(weights, is_weighted=True))
    features = make_features(rng, is_weighted=True)
    assert torch.equal(collection(features).values(), wanted(features).values())


def test_configs_are_copied(rng):
    weights = weights_of(rng)
    configs = configs_of(weights)
    bridge.from_tables({name: embpack.quantize(weight) for name, weight in weights.items()}, configs)
    assert [config.data_type for config in configs] == [DataType.FP32] * 3


def test_torchrec_rewrites_the_callers_bad_indices(rng):
    """What the module's docstring warns of."""
    quantized = bridge.quantize(make_bags({"item": rng.standard_normal((20, 16), np.float32)}, (PoolingType.SUM,)))
    values = torch.tensor([25])
    pooled = quantized(KeyedJaggedTensor(keys=["i"], values=values, lengths=torch.tensor([1]))).values()
    assert values.tolist() == [0]
    np.testing.assert_array_equal(pooled.numpy()[0], bridge.to_tables(quantized)["item"][0])


def test_torch_export_takes_a_quantized_collection(rng):
    class Model(torch.nn.Module):
        def __init__(self, collection):
            super().__init__()
            self.collection = collection

        def forward(self, values, lengths):
            return self.collection(KeyedJaggedTensor(keys=["i"], values=values, lengths=lengths)).values()

    ebc = make_bags({"item": rng.standard_normal((20, 16), np.float32)}, (PoolingType.SUM,))
    model = Model(bridge.quantize(ebc)).eval()
    inputs = torch.tensor([1, 2, 3]), torch.tensor([2, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, of TorchRec's use of it
        exported = torch.export.export(model, inputs, strict=False).module()
        assert torch.equal(exported(*inputs), model(*inputs))


# Errors


def small(rng, **options):
    weight = rng.standard_normal((20, options.pop("dim", 16)), np.float32)
    return embpack.quantize(weight, **{"param_dtype": "float16", **options})


def small_config(**changes):
    fields = {"name": "item", "num_embeddings": 20, "embedding_dim": 16, "feature_names": ["i"]}
    return EmbeddingBagConfig(**{**fields, **changes})


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (
            {"method": "kmeans"},
            {},
            "table 'item' has rows of the codebook layout, but TorchRec reads uniform ones only",
        ),
        (
            {"bits": 8, "param_dtype": None},
            {},
            "table 'item' has float32 parameters, but TorchRec reads float16 ones at 8",
        ),
        ({"dim": 15}, {"embedding_dim": 15}, "table 'item' has embedding_dim 15, but TorchRec takes multiples of 2"),
        ({}, {"num_embeddings": 21}, "table 'item' is 20 x 16, but its config says 21 x 16; they must agree"),
        ({}, {"num_embeddings_post_pruning": 19}, "table 'item' is 20 x 16, but its config says 19 x 16"),
        ({"dim": 12}, {}, "table 'item' is 20 x 12, but its config says 20 x 16"),
        ({}, {"name": "items"}, "a config names table 'items', but the tables are item; add it"),
        ({}, {"use_virtual_table": True}, "table 'item' is virtual"),
    ],
)
def test_tables_and_configs_that_do_not_agree_are_refused(rng, options, changes, message):
    with pytest.raises(ValueError, match=message):
        bridge.from_tables({"item": small(rng, **options)}, [small_config(**changes)])


def test_a_table_without_a_config_is_refused(rng):
    with pytest.raises(ValueError, match="table 'tag' has no config; the configs are of item: add one"):
        bridge.from_tables({"item": small(rng), "tag": small(rng)}, [small_config()])


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ([], "the configs are none; give an EmbeddingBagConfig for each table, or an EmbeddingConfig for each"),
        ([small_config(), EmbeddingConfig(20, 16, "tag")], "the configs are EmbeddingBagConfig, EmbeddingConfig"),
        ([{"name": "item"}], "the configs are dict"),
    ],
)
def test_configs_of_no_kind_are_refused(rng, configs, message):
    with pytest.raises(TypeError, match=message):
        bridge.from_tables({"item": small(rng)}, configs)


def test_what_is_no_packed_table_is_refused(rng):
    with pytest.raises(TypeError, match="table 'item' is ndarray, not PackedTable; pack it first"):
        bridge.from_tables({"item": rng.standard_normal((20, 16), np.float32)}, [small_config()])


def test_an_option_that_torchrec_lacks_is_refused(rng):
    with pytest.raises(TypeError, match="need_indices"):
        bridge.from_tables({"item": small(rng)}, [small_config()], need_indices=True)


@pytest.mark.parametrize("method", ["kmeans", "kmeans-lloyd", "kmeans-cls"])
def test_methods_of_other_layouts_are_refused(rng, method):
    ebc = make_bags({"item": rng.standard_normal((20, 16), np.float32)}, (PoolingType.SUM,))
    with pytest.raises(ValueError, match=f"method '{method}' makes rows of the .* layout.*choose 'greedy'"):
        bridge.quantize(ebc, method)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), r"table 'item': weight\[3, 5\] is nan"),
        (1e6, r"table 'item': weight\[3\] .* overflows float16.*but TorchRec has float16 parameters only: rescale"),
    ],
)
def test_weights_that_cannot_be_packed_name_the_table(rng, value, message):
    weight = rng.standard_normal((20, 16), np.float32)
    weight[3, 5] = value
    weight[3, 6] = -value
    with pytest.raises(ValueError, match=message):
        bridge.quantize(make_bags({"item": weight}, (PoolingType.SUM,)))


def test_a_table_of_another_type_is_named(rng):
    ebc = make_bags({"item": rng.standard_normal((20, 16), np.float32)}, (PoolingType.SUM,)).double()
    with pytest.raises(TypeError, match=r"^table 'item': weight is float64, .*; convert it with weight\.float\(\)$"):
        bridge.quantize(ebc)


def test_a_table_that_packing_makes_no_smaller_is_left_alone(rng):
    """By quantize_; embpack.torchrec packs all, for TorchRec's collection has nothing else."""
    weights = {name: rng.standard_normal((20, dim), np.float32) for name, dim in (("user", 64), ("tag", 8))}
    ebc = make_bags(weights, (PoolingType.SUM,) * 2)
    model = torch.nn.ModuleDict({"ebc": ebc})
    report = quantize_(model, "kmeans")
    assert report.left_alone == (("ebc.embedding_bags.tag", "packed rows would be no smaller: 640 -> 720 bytes"),)
    bags = model["ebc"].embedding_bags
    assert isinstance(model["ebc"], PackedEmbeddingBagCollection) and isinstance(bags["user"], PackedEmbeddingBag)
    assert torch.equal(bags["tag"].weight, torch.from_numpy(weights["tag"]))


def test_an_odd_embedding_dim_is_refused(rng):
    ebc = make_bags({"item": rng.standard_normal((20, 15), np.float32)}, (PoolingType.SUM,))
    with pytest.raises(ValueError, match="table 'item' has embedding_dim 15, but TorchRec takes multiples of 2 at 4"):
        bridge.quantize(ebc)


def test_a_collection_on_the_meta_device_is_refused():
    ebc = EmbeddingBagCollection([small_config()], device=torch.device("meta"))
    with pytest.raises(ValueError, match="table 'item': weight is on the meta device and has no values; load them"):
        bridge.quantize(ebc)


def test_what_is_no_collection_is_refused(rng):
    ebc = make_bags({"item": rng.standard_normal((20, 16), np.float32)}, (PoolingType.SUM,))
    quantized = bridge.quantize(ebc)
    with pytest.raises(
        TypeError, match=r"collection is an EmbeddingBag; quantize takes a torchrec\.EmbeddingBagCollection"
    ):
        bridge.quantize(torch.nn.EmbeddingBag(3, 4))
    with pytest.raises(TypeError, match="collection is an EmbeddingBagCollection; quantize takes"):
        bridge.quantize(quantized)
    with pytest.raises(TypeError, match=r"to_tables reads .* of torchrec\.quant, which quantize makes"):
        bridge.to_tables(ebc)


def test_a_quantized_collection_of_floats_is_not_read():
    collection = quant.EmbeddingBagCollection([small_config(data_type=DataType.FP16)], False, CPU)
    with pytest.raises(ValueError, match=r"\('item'\) is fp16, not packed"):
        bridge.to_tables(collection)


@pytest.mark.parametrize("package", ["torch", "torchrec", "fbgemm_gpu"])
def test_a_missing_package_names_the_extra(package):
    """In a process of its own: FBGEMM's operators register once."""
    code = f"import sys; sys.modules[{package!r}] = None\nimport embpack.torchrec"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    package = "TorchRec (pip install --no-deps torchrec==1.9.2) and what it runs on"
    error = embpack.MissingExtraError("embpack.torchrec", package, "torchrec")
    assert done.stderr.splitlines()[-1] == f"embpack.errors.MissingExtraError: {error}"


@pytest.mark.parametrize("pack", [bridge.quantize, PackedEmbeddingBagCollection.from_float])
def test_a_table_of_which_rows_are_lost_is_named(rng, pack):
    weight = rng.standard_normal((40, 16), np.float32) * np.float32(1e-8)
    config = EmbeddingBagConfig(name="tiny", num_embeddings=40, embedding_dim=16, feature_names=["f"])
    collection = EmbeddingBagCollection(tables=[config])
    collection.embedding_bags["tiny"].weight.data = torch.from_numpy(weight)
    with pytest.warns(UserWarning, match="table 'tiny': 40 of its rows come back no better than zeros"):
        pack(collection)
