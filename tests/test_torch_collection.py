"""PackedEmbeddingBagCollection: against float modules, TorchRec's collection, and the same tables one by one."""

import copy
import inspect
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils.data import DataLoader

import embpack
from embpack.torch import PackedEmbedding, PackedEmbeddingBag, PackedEmbeddingBagCollection, load_checkpoint, quantize_
from embpack.torch.collection_ops import TableUse, describe_tables, read_tables

ROWS, BATCH = 40, 3
# Of each table: method, embedding_dim, options. All layouts, bits and parameter types.
TABLES = {
    "user": ("greedy", 20, {}),
    "item": ("kmeans-lloyd", 7, {"param_dtype": "float32"}),
    "shop": ("kmeans-cls:K=3", 32, {}),
    "city": ("asym", 5, {"bits": 8, "param_dtype": "float32"}),
    "kind": ("kmeans-cls:K=2", 9, {"bits": 2}),
}
# "seen" is read by two tables, "shop" by none of its name.
FEATURES = {"user": ["who"], "item": ["bought", "seen"], "shop": ["seen"], "city": ["where"], "kind": ["sort"]}
KEYS = ("who", "bought", "seen", "where", "sort")


def make_bags(modes="sum", **options) -> dict[str, PackedEmbeddingBag]:
    rng, bags = np.random.default_rng(0), {}
    for i, (name, (method, dim, how)) in enumerate(TABLES.items()):
        table = embpack.quantize(rng.standard_normal((ROWS, dim), dtype=np.float32), method, **how)
        mode = modes if isinstance(modes, str) else modes[i % len(modes)]
        bags[name] = PackedEmbeddingBag.from_table(table, mode=mode, **options)
    return bags


def make_input(dtype=torch.int64) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices, and offsets with the last: bags of 0 to 4 rows, an empty one first and last."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 5, len(KEYS) * BATCH)
    lengths[[0, -1]] = 0
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return torch.from_numpy(rng.integers(0, ROWS, offsets[-1])).to(dtype), torch.from_numpy(offsets).to(dtype)


def pool_one_by_one(bags, indices, offsets, weights=None) -> torch.Tensor:
    """What the collection must find, from single modules with include_last_offset."""
    pooled = []
    for name, features in FEATURES.items():
        for feature in features:
            first = KEYS.index(feature) * BATCH
            own = offsets[first : first + BATCH + 1]
            of_bags = slice(int(own[0]), int(own[-1]))
            some = () if weights is None else (weights[of_bags],)
            pooled.append(bags[name](indices[of_bags], own - own[0], *some))
    return torch.cat(pooled, dim=1)


@pytest.mark.parametrize("modes", ["sum", "mean", "max", ("sum", "mean", "max")])
@pytest.mark.parametrize("padding_idx", [None, 3, -1])
@pytest.mark.parametrize("dtypes", [(torch.int64, torch.int64), (torch.int32, torch.int32), (torch.int64, torch.int32)])
def test_bags_are_those_of_the_modules(modes, padding_idx, dtypes):
    bags = make_bags(modes, padding_idx=padding_idx, include_last_offset=True)
    indices, offsets = make_input()
    wanted = pool_one_by_one(bags, indices, offsets)
    indices, offsets = indices.to(dtypes[0]), offsets.to(dtypes[1])
    with_last = PackedEmbeddingBagCollection(bags, FEATURES, include_last_offset=True)
    assert torch.equal(with_last(indices, offsets), wanted)
    assert torch.equal(PackedEmbeddingBagCollection(bags, FEATURES)(indices, offsets[:-1]), wanted)
    twice = torch.stack([indices, indices], 1)[:, 0]
    assert torch.equal(with_last(twice, offsets), wanted)


def test_bags_are_those_of_float_modules():
    bags = make_bags(("sum", "mean", "max"), padding_idx=3, include_last_offset=True)
    floats = {name: bag.to_float() for name, bag in bags.items()}
    found = PackedEmbeddingBagCollection(bags, FEATURES, include_last_offset=True)(*make_input())
    # Sums of up to four rows of values below 4, in another order.
    torch.testing.assert_close(found, pool_one_by_one(floats, *make_input()), rtol=0, atol=4 * 4 * 4 * 2**-24)


def test_rows_of_2d_indices_are_bags():
    collection = PackedEmbeddingBagCollection(make_bags(("mean", "max")), FEATURES)
    square = torch.randint(0, ROWS, (len(KEYS) * BATCH, 4), generator=torch.Generator().manual_seed(0))
    offsets = torch.arange(0, square.numel(), 4)
    assert torch.equal(collection(square), collection(square.reshape(-1), offsets))
    assert torch.equal(collection(square.T.contiguous().T), collection(square))
    assert torch.equal(collection(square[:, :0]), torch.zeros(BATCH, sum(collection.embedding_dims)))


def test_it_finds_what_a_group_of_tables_finds():
    bags = make_bags()
    collection = PackedEmbeddingBagCollection(bags)
    group = embpack.TableGroup([bag.table for bag in bags.values()])
    indices, offsets = make_input()
    np.testing.assert_array_equal(collection(indices, offsets[:-1]).numpy(), group.embedding_bag(indices, offsets))


def test_names_and_widths():
    collection = PackedEmbeddingBagCollection(make_bags(), FEATURES)
    assert collection.features == KEYS
    assert collection.embedding_names == ["who", "bought", "seen@item", "seen@shop", "where", "sort"]
    assert collection.embedding_dims == [20, 7, 7, 32, 5, 9]
    assert repr(collection).splitlines()[0] == "PackedEmbeddingBagCollection("
    assert "user: who; item: bought, seen; shop: seen; city: where; kind: sort" in repr(collection)
    assert PackedEmbeddingBagCollection(make_bags()).features == tuple(TABLES)


def test_tables_share_their_memory():
    bags = make_bags()
    tables = PackedEmbeddingBagCollection(bags).tables
    assert list(tables) == list(TABLES)
    for name, table in tables.items():
        assert table.packed.ctypes.data == bags[name].packed.data_ptr()


# Weights and gradients


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("include_last_offset", [False, True])
def test_weights_and_their_gradients_are_those_of_float_modules(padding_idx, include_last_offset):
    bags = make_bags(padding_idx=padding_idx, include_last_offset=True)
    floats = {name: bag.to_float() for name, bag in bags.items()}
    collection = PackedEmbeddingBagCollection(bags, FEATURES, include_last_offset=include_last_offset)
    indices, offsets = make_input()
    given = offsets if include_last_offset else offsets[:-1]
    found_weights, float_weights = (torch.linspace(-1, 1, len(indices)).requires_grad_() for _ in range(2))
    found = collection(indices, given, found_weights)
    wanted = pool_one_by_one(floats, indices, offsets, float_weights)
    torch.testing.assert_close(found, wanted, rtol=0, atol=4 * 4 * 4 * 2**-24)
    for pooled in (found, wanted):
        (pooled**2).sum().backward()
    torch.testing.assert_close(found_weights.grad, float_weights.grad, rtol=1e-4, atol=1e-4)
    assert not list(collection.parameters())


def test_weights_of_2d_indices():
    collection = PackedEmbeddingBagCollection(make_bags(), FEATURES, include_last_offset=True)
    weights = torch.ones(len(KEYS) * 2, requires_grad=True)
    indices = torch.arange(len(weights))
    collection(indices, torch.arange(0, 2 * len(KEYS) + 1, 2), weights).sum().backward()
    assert (weights.grad != 0).all()
    square = torch.rand((len(KEYS), 2), requires_grad=True)
    collection(indices.reshape(-1, 2), None, square).sum().backward()
    torch.testing.assert_close(square.grad.reshape(-1), weights.grad)


# Tables that stay float


def make_mixed_bags(modes="sum", **options) -> dict[str, PackedEmbeddingBag | nn.EmbeddingBag]:
    """Three tables packed and two of floats, of which "item" is read twice."""
    bags = make_bags(modes, **options)
    return bags | {name: bags[name].to_float().requires_grad_(requires_grad=False) for name in ("item", "city")}


@pytest.mark.parametrize("modes", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("dtypes", [(torch.int64, torch.int64), (torch.int32, torch.int32), (torch.int64, torch.int32)])
def test_float_tables_are_pooled_to_the_bit(modes, padding_idx, dtypes):
    bags = make_mixed_bags(modes, padding_idx=padding_idx, include_last_offset=True)
    indices, offsets = make_input()
    wanted = pool_one_by_one(bags, indices, offsets)
    indices, offsets = indices.to(dtypes[0]), offsets.to(dtypes[1])
    with_last = PackedEmbeddingBagCollection(bags, FEATURES, include_last_offset=True)
    assert torch.equal(with_last(indices, offsets), wanted)
    without = {name: copy.deepcopy(bag) for name, bag in bags.items()}
    without["item"].include_last_offset = False
    assert torch.equal(PackedEmbeddingBagCollection(without, FEATURES)(indices, offsets[:-1]), wanted)
    square = indices[: len(KEYS) * 2].reshape(-1, 2)
    starts = torch.arange(0, square.numel(), 2)
    collection = PackedEmbeddingBagCollection(bags, FEATURES)
    assert torch.equal(collection(square), collection(square.reshape(-1), starts))
    assert collection(indices[:0], offsets[:0]).shape == collection(square[:0]).shape == (0, 80)
    assert list(collection.tables) == ["user", "shop", "kind"] and collection.device.type == "cpu"


def test_gradients_reach_float_tables_and_weights():
    bags = make_mixed_bags(include_last_offset=True)
    indices, offsets = make_input()
    for bag in (bags["item"], bags["city"]):
        bag.requires_grad_()
    collection = PackedEmbeddingBagCollection(bags, FEATURES, include_last_offset=True)
    assert len(list(collection.parameters())) == 2
    gradients = []
    for pool in (collection, lambda *bags_of: pool_one_by_one(bags, *bags_of)):
        weights = torch.linspace(-1, 1, len(indices)).requires_grad_()
        found = pool(indices, offsets, weights)
        (found**2).sum().backward()
        gradients.append([found.detach(), weights.grad, *(bags[name].weight.grad for name in ("item", "city"))])
        for name in ("item", "city"):
            bags[name].weight.grad = None
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        assert torch.equal(collection(indices, offsets, weights), gradients[0][0])


def test_hooks_of_float_tables_are_called():
    bags, calls = make_mixed_bags(), []
    bags["item"].register_forward_hook(lambda module, arguments, found: calls.append(found) or 2 * found)
    collection = PackedEmbeddingBagCollection(bags, FEATURES)
    indices, offsets = make_short_input()
    found = dict(
        zip(collection.embedding_names, collection(indices, offsets).split([20, 7, 7, 32, 5, 9], 1), strict=True)
    )
    assert torch.equal(found["bought"], 2 * calls[0]) and torch.equal(found["seen@item"], 2 * calls[1])


def test_float_tables_of_other_types_are_returned_as_float32():
    bags = make_mixed_bags()
    bags["item"].bfloat16()
    collection = PackedEmbeddingBagCollection(bags, FEATURES)
    weights = torch.linspace(-1, 1, len(make_input()[0]))
    exact = PackedEmbeddingBagCollection(make_mixed_bags(), FEATURES)(*make_short_input(), weights)
    found = collection(*make_short_input(), weights)
    assert found.dtype == torch.float32 and 0 < (found - exact).abs().max() < 30 * 2**-7


@pytest.mark.parametrize(("backend", "requires_grad"), [("inductor", False), ("aot_eager", True)])
def test_with_float_tables_it_compiles_in_one_graph_and_exports(backend, requires_grad):
    bags = make_mixed_bags(include_last_offset=True)
    bags["item"].requires_grad_(requires_grad)
    collection = PackedEmbeddingBagCollection(bags, FEATURES, include_last_offset=True)
    indices, offsets = make_input()
    wanted = collection(indices, offsets)
    compiled = torch.compile(collection, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(indices, offsets), wanted)
    shorter = (indices[: offsets[-6]], offsets[:-5])  # another number of bags
    torch.testing.assert_close(compiled(*shorter), collection(*shorter))
    if backend == "aot_eager":
        exported = torch.export.export(collection, (indices, offsets))
        torch.testing.assert_close(exported.module()(indices, offsets), wanted)


def test_float_tables_survive_being_saved_and_copied(tmp_path):
    collection = PackedEmbeddingBagCollection(make_mixed_bags(), FEATURES)
    wanted = collection(*make_short_input())
    for again in (copy.deepcopy(collection), pickle.loads(pickle.dumps(collection))):
        assert torch.equal(again(*make_short_input()), wanted)
    save_model(collection, tmp_path / "collection.safetensors")
    other = PackedEmbeddingBagCollection(make_mixed_bags(), FEATURES)
    other.embedding_bags["item"].weight.zero_()
    load_model(other, tmp_path / "collection.safetensors")
    assert torch.equal(other(*make_short_input()), wanted)


def test_a_float_table_that_is_packed_later_counts():
    bags = make_mixed_bags()
    collection = PackedEmbeddingBagCollection(bags, FEATURES)
    collection(*make_short_input())
    collection.embedding_bags["item"] = make_bags()["item"]
    collection.embedding_bags["city"] = make_bags()["city"]
    assert torch.equal(collection(*make_short_input()), COLLECTION(*make_short_input()))


def test_mistakes_with_float_tables_are_named():
    collection = PackedEmbeddingBagCollection(make_mixed_bags(("sum", "mean")), FEATURES)
    with pytest.raises(ValueError, match="weights go with mode 'sum' only, and table 'item' has mode 'mean'"):
        collection(torch.arange(5), STARTS, torch.ones(5))
    with pytest.raises(ValueError, match=r"offsets\[2\] is 0, less than offsets\[1\], 1"):
        collection(torch.arange(5), torch.tensor([0, 1, 0, 1, 2]))
    with pytest.raises(RuntimeError, match=r"takes value 40 which is not in the valid range \[0, 40\)"):
        collection(torch.tensor([0, 40, 1, 2, 3]), STARTS)
    with pytest.raises(ValueError, match="tables are not described as describe_tables does it"):
        read_tables("[-1]")


# What PyTorch does with modules


def arguments_of(collection: PackedEmbeddingBagCollection) -> tuple[object, ...]:
    return (*collection._tensors(), collection._described, collection._feature_of, len(collection.features))


def test_operators_pass_opcheck():
    operators, (indices, offsets) = torch.ops.embpack, make_input()
    arguments = arguments_of(PackedEmbeddingBagCollection(make_bags(("mean", "max"), padding_idx=1), FEATURES))
    check = torch.library.opcheck
    check(operators.embedding_bag_collection.default, (*arguments, indices, offsets), {"include_last_offset": True})
    check(operators.embedding_bag_collection.default, (*arguments, indices, offsets[:-1]), {"dtype": torch.bfloat16})
    square = torch.zeros((2 * len(KEYS), 2), dtype=torch.int64)
    check(operators.embedding_bag_collection.default, (*arguments, square, None))
    sums = arguments_of(PackedEmbeddingBagCollection(make_bags(), FEATURES))
    weights = torch.rand(len(indices), requires_grad=True)
    check(operators.embedding_bag_collection.weighted, (*sums, indices, offsets[:-1], weights))
    check(operators.embedding_bag_collection.weighted, (*sums, square, None, torch.rand(square.shape).requires_grad_()))
    gradient = torch.rand(BATCH, 80)
    check(operators.embedding_bag_collection_by_weights.default, (*sums, indices, offsets[:-1], gradient))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_compiles_in_one_graph(backend):
    collection = PackedEmbeddingBagCollection(make_bags(), FEATURES)
    model = nn.Sequential(collection, nn.Linear(80, 2))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    square = torch.arange(4 * len(KEYS)).reshape(-1, 2)
    torch.testing.assert_close(compiled(square), model(square))
    indices, offsets = make_input()
    weights = torch.rand(len(indices), requires_grad=True)
    pool = torch.compile(lambda *bags: collection(*bags), fullgraph=True, backend=backend)
    pool(indices, offsets[:-1], weights).sum().backward()
    (wanted,) = torch.autograd.grad(collection(indices, offsets[:-1], weights).sum(), weights)
    torch.testing.assert_close(weights.grad, wanted)


def test_it_exports_and_comes_back(tmp_path):
    collection, arguments = PackedEmbeddingBagCollection(make_bags(), FEATURES, include_last_offset=True), make_input()
    length, bags = torch.export.Dim("length", min=2), torch.export.Dim("bags", min=1, max=1000)
    shapes = {"features": {0: length}, "offsets": {0: len(KEYS) * bags + 1}}
    program = torch.export.export(collection, arguments, dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "collection.pt2")
    loaded = torch.export.load(tmp_path / "collection.pt2").module()
    assert torch.equal(loaded(*arguments), collection(*arguments))
    other = (torch.arange(2 * len(KEYS)), torch.arange(2 * len(KEYS) + 1))
    assert torch.equal(loaded(*other), collection(*other))


@pytest.mark.parametrize("way", ["state_dict", "weights_only", "safetensors", "deepcopy", "pickle"])
def test_it_survives_being_saved_and_copied(tmp_path, way):
    collection, empty = PackedEmbeddingBagCollection(make_bags(), FEATURES), {}
    for name, (method, dim, how) in TABLES.items():
        clusters = {"kmeans-cls:K=3": 3, "kmeans-cls:K=2": 2}.get(method, 0)
        layout = "clustered" if clusters else "codebook" if method == "kmeans-lloyd" else "uniform"
        empty[name] = PackedEmbeddingBag(ROWS, dim, mode="sum", layout=layout, num_codebooks=clusters, **how)
    other = PackedEmbeddingBagCollection(empty, FEATURES)
    if way == "state_dict":
        other.load_state_dict(collection.state_dict())
    elif way == "weights_only":
        torch.save(collection.state_dict(), tmp_path / "c.pt")
        other.load_state_dict(torch.load(tmp_path / "c.pt", weights_only=True))
    elif way == "safetensors":
        save_model(collection, tmp_path / "c.safetensors")
        load_model(other, tmp_path / "c.safetensors")
    else:
        other = copy.deepcopy(collection) if way == "deepcopy" else pickle.loads(pickle.dumps(collection))
    indices, offsets = make_input()
    assert torch.equal(other(indices, offsets[:-1]), collection(indices, offsets[:-1]))
    assert {tensor.dtype for tensor in other.state_dict().values()} == {torch.uint8}
    assert "embedding_bags.shop.codebooks" in other.state_dict()


class Pooled(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.collection = PackedEmbeddingBagCollection(make_bags(), FEATURES)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.collection(torch.full((len(KEYS), 1), number))[0]


def test_data_loader_workers_look_up():
    found = torch.cat(list(DataLoader(Pooled(), batch_size=2, num_workers=2)))
    assert torch.equal(found, torch.stack([Pooled()[number] for number in range(4)]))


# TorchRec


def make_features(keys=KEYS, *, weighted=False):
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    indices, offsets = make_input()
    weights = torch.linspace(-1, 1, len(indices)) if weighted else None
    features = KeyedJaggedTensor(list(KEYS), indices, weights, offsets=offsets)
    return features if keys == KEYS else features.permute([KEYS.index(key) for key in keys])


@pytest.mark.parametrize("modes", ["sum", "mean", ("sum", "mean")])
def test_keyed_features_are_pooled_as_torchrec_does(modes):
    pytest.importorskip("torchrec")
    collection = PackedEmbeddingBagCollection(make_bags(modes), FEATURES)
    floats = collection.to_float()
    found, wanted = collection(make_features()), floats(make_features())
    assert found.keys() == wanted.keys() and found.length_per_key() == wanted.length_per_key()
    torch.testing.assert_close(found.values(), wanted.values(), rtol=0, atol=4 * 4 * 4 * 2**-24)
    assert torch.equal(
        found["seen@shop"], collection(make_features(("sort", "seen", "who", "where", "bought")))["seen@shop"]
    )
    plain = PackedEmbeddingBagCollection(make_bags(modes), FEATURES, include_last_offset=True)(*make_input())
    assert torch.equal(found.values(), plain)


def test_of_a_key_that_is_there_twice_the_last_counts():
    """As TorchRec has it."""
    jagged = pytest.importorskip("torchrec.sparse.jagged_tensor")
    bag = PackedEmbeddingBag.from_table(embpack.quantize(np.eye(20, dtype=np.float32), "asym"), mode="sum")
    collection = PackedEmbeddingBagCollection({"a": bag, "b": bag})
    features = jagged.KeyedJaggedTensor(["a", "b", "a"], torch.arange(6), lengths=torch.ones(6, dtype=torch.int64))
    found, wanted = collection(features), collection.to_float()(features)
    torch.testing.assert_close(found.values(), wanted.values(), rtol=0, atol=0)


def test_lengths_that_end_before_the_values_are_refused():
    jagged = pytest.importorskip("torchrec.sparse.jagged_tensor")
    collection = PackedEmbeddingBagCollection({"a": PackedEmbeddingBag(20, 4)})
    for lengths, error in (
        ([1, 2], "bag ends, is 3, but there are 4 indices"),
        ([2, 3], r"\[2\] is 5, but there are 4"),
    ):
        features = jagged.KeyedJaggedTensor(["a"], torch.arange(4), lengths=torch.tensor(lengths))
        with pytest.raises(ValueError, match=error):
            collection(features)


def test_every_index_must_be_in_a_bag():
    with_last = PackedEmbeddingBagCollection(make_bags(), FEATURES, include_last_offset=True)
    offsets = torch.tensor([0] * len(KEYS) + [3])
    for weights in (None, torch.ones(4)):
        with pytest.raises(ValueError, match=r"offsets\[5\], where the last bag ends, is 3, but there are 4 indices"):
            with_last(torch.arange(4), offsets, weights)
        with pytest.raises(ValueError, match="offsets are empty, but there are 4 indices"):
            COLLECTION(torch.arange(4), offsets[:0], weights)
    assert with_last(torch.arange(3), offsets).shape == COLLECTION(torch.arange(4), offsets[:-1]).shape == (1, 80)


def test_what_is_changed_later_counts():
    collection = PackedEmbeddingBagCollection(make_bags(include_last_offset=True), FEATURES, include_last_offset=True)
    collection(*make_input())
    for change in ({"mode": "mean"}, {"padding_idx": 3}, {"mode": "max"}):
        for name, value in change.items():
            setattr(collection.embedding_bags["item"], name, value)
        wanted = pool_one_by_one(collection.embedding_bags, *make_input())
        assert torch.equal(collection(*make_input()), wanted)
    collection.embedding_bags["item"].padding_idx = -1
    assert collection.embedding_bags["item"].padding_idx == ROWS - 1
    assert torch.equal(collection(*make_input()), pool_one_by_one(collection.embedding_bags, *make_input()))
    collection.embedding_bags["item"] = make_bags(include_last_offset=True)["city"]
    assert torch.equal(collection(*make_input()), pool_one_by_one(collection.embedding_bags, *make_input()))
    assert collection.embedding_dims[1:3] == [5, 5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_returns_float32_as_torchrec_does(dtype):
    pytest.importorskip("torchrec")
    collection = PackedEmbeddingBagCollection(make_bags(), FEATURES, is_weighted=True)
    weights = make_features(weighted=True).weights()
    wanted = collection(make_features(weighted=True)).values()
    collection.to(dtype)
    features = make_features(weighted=True)
    features._weights = weights.to(dtype).requires_grad_()
    found = collection(features).values()
    assert found.dtype == torch.float32 and (found - wanted).abs().max() < 30 * 2**-7
    found.sum().backward()
    assert features._weights.grad.dtype == dtype
    assert collection.to_float().embedding_bags["user"].weight.dtype == torch.float32


def test_derivatives_in_forward_mode_are_refused():
    indices, offsets = make_input()
    collection = PackedEmbeddingBagCollection(make_bags(), FEATURES, include_last_offset=True)
    with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
        torch.func.jacfwd(lambda weights: collection(indices, offsets, weights))(torch.ones(len(indices)))


def test_keys_that_nobody_reads_are_left_alone():
    pytest.importorskip("torchrec")
    bags = make_bags()
    some = {"shop": bags["shop"], "kind": bags["kind"]}
    collection = PackedEmbeddingBagCollection(some, {name: FEATURES[name] for name in some})
    whole = PackedEmbeddingBagCollection(bags, FEATURES)(make_features())
    found = collection(make_features())
    assert torch.equal(found["seen"], whole["seen@shop"]) and torch.equal(found["sort"], whole["sort"])


def test_weights_of_keyed_features_and_their_gradients():
    pytest.importorskip("torchrec")
    collection = PackedEmbeddingBagCollection(make_bags(), FEATURES, is_weighted=True)
    floats, gradients = collection.to_float(), []
    assert floats.is_weighted()
    for module in (collection, floats):
        features = make_features(weighted=True)
        features.weights().requires_grad_()
        (module(features).values() ** 2).sum().backward()
        gradients.append(features.weights().grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    unweighted = PackedEmbeddingBagCollection(make_bags(), FEATURES)
    assert torch.equal(unweighted(make_features(weighted=True)).values(), unweighted(make_features()).values())


class PooledFeatures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.collection = PackedEmbeddingBagCollection(make_bags(), FEATURES)

    def forward(self, features) -> torch.Tensor:
        return 2 * self.collection(features).values()


def test_models_of_keyed_features_compile_and_export():
    pytest.importorskip("torchrec")
    model, features = PooledFeatures(), make_features()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(features), model(features))
    exported = torch.export.export(model, (make_features(),)).module()
    assert torch.equal(exported(features), model(features))


def test_models_of_keyed_features_are_traced_by_fx():
    pytest.importorskip("torchrec")
    model, features = PooledFeatures(), make_features()
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(features), model(features))
    assert "collection" in [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert traced.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match="PackedEmbeddingBagCollection as a part of a model only; put it into one"):
        torch.fx.symbolic_trace(model.collection)


def test_models_of_plain_features_are_traced_by_fx():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.collection = PackedEmbeddingBagCollection(make_bags(), FEATURES)

        def forward(self, indices, offsets, weights):
            return self.collection(indices, offsets, weights) + self.collection(
                indices, per_sample_weights=None, offsets=offsets
            )

    model, (indices, offsets) = Model(), make_input()
    arguments = (indices, offsets[:-1], torch.linspace(-1, 1, len(indices)))
    assert torch.equal(torch.fx.symbolic_trace(model)(*arguments), model(*arguments))


def test_it_has_all_that_torchrecs_collection_has():
    torchrec = pytest.importorskip("torchrec")
    packed = PackedEmbeddingBagCollection(make_bags(), FEATURES)
    floats = packed.to_float()
    names = {name for name in dir(floats) if not name.startswith("_")} - set(dir(nn.Module()))
    assert {"device", "embedding_bag_configs", "embedding_bags", "is_weighted"} < names
    assert names - set(dir(packed)) == {"reset_parameters"}  # a packed table is not trained
    for name in names & set(dir(packed)):
        assert callable(getattr(packed, name)) == callable(getattr(floats, name)), name
    parameters = [list(inspect.signature(module.forward).parameters) for module in (packed, floats)]
    assert parameters[0][: len(parameters[1])] == parameters[1] == ["features"]
    assert packed.is_weighted() is floats.is_weighted() is False and packed.device == floats.device
    assert PackedEmbeddingBagCollection(make_bags(), FEATURES, is_weighted=True).is_weighted()
    for ours, theirs in zip(packed.embedding_bag_configs(), floats.embedding_bag_configs(), strict=True):
        assert isinstance(ours, torchrec.EmbeddingBagConfig)
        assert vars(ours) | {"init_fn": None} == vars(theirs) | {"init_fn": None}
    assert copy.deepcopy(packed).half().embedding_bag_configs()[0].data_type.value == "FP16"
    again = PackedEmbeddingBagCollection.like(packed, packed.embedding_bags)
    assert torch.equal(again(features=make_features()).values(), floats(features=make_features()).values())
    with pytest.raises(ValueError, match="table 'user' has padding_idx 2, which TorchRec lacks"):
        PackedEmbeddingBagCollection(make_bags(padding_idx=2), FEATURES).embedding_bag_configs()


def test_collections_that_were_pickled_before_load():
    collection = PackedEmbeddingBagCollection(make_bags(), FEATURES, is_weighted=True)
    state = copy.deepcopy(collection.__dict__)
    state["is_weighted"] = state.pop("_is_weighted")
    older = PackedEmbeddingBagCollection.__new__(PackedEmbeddingBagCollection)
    older.__setstate__(state)
    assert older.is_weighted() and torch.equal(older(*make_short_input()), collection(*make_short_input()))


def make_short_input() -> tuple[torch.Tensor, torch.Tensor]:
    indices, offsets = make_input()
    return indices, offsets[:-1]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("strides", [(2, 2, 2, 2, 2), (2, 1, 3, 2, 1)])
def test_samples_that_share_bags_are_pooled_as_torchrec_does(strides, weighted):
    """Inverse indices say which bag of a key each sample has; keys may then have different numbers of bags."""
    jagged = pytest.importorskip("torchrec.sparse.jagged_tensor")
    rng = np.random.default_rng(3)
    lengths = torch.from_numpy(rng.integers(0, 4, sum(strides)))
    indices = torch.from_numpy(rng.integers(0, ROWS, int(lengths.sum())))
    keys = [*reversed(KEYS)]
    inverse = torch.stack([torch.from_numpy(rng.integers(0, stride, 4)) for stride in reversed(strides)])

    def make(weights):
        return jagged.KeyedJaggedTensor(
            list(KEYS),
            indices,
            weights,
            lengths=lengths,
            inverse_indices=(keys, inverse),
            **({} if len(set(strides)) == 1 else {"stride_per_key_per_rank": [[stride] for stride in strides]}),
        )

    collection = PackedEmbeddingBagCollection(make_bags(), FEATURES, is_weighted=weighted)
    gradients = []
    for module in (collection, collection.to_float()):
        weights = torch.linspace(-1, 1, len(indices)).requires_grad_(weighted) if weighted else None
        found = module(make(weights))
        gradients.append((found.values().detach(), None))
        if weighted:
            found.values().square().sum().backward()
            gradients[-1] = (found.values().detach(), weights.grad)
    (ours, our_gradient), (theirs, their_gradient) = gradients
    assert ours.shape == (4, 80) and found.keys() == collection.embedding_names
    torch.testing.assert_close(ours, theirs, rtol=0, atol=4 * 4 * 4 * 2**-24)
    if weighted:
        torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-4)


def test_rows_of_nested_indices_are_bags():
    collection = PackedEmbeddingBagCollection(make_bags(), FEATURES)
    indices, offsets = make_input()
    weights = torch.linspace(-1, 1, len(indices))
    nested, of_nested = (torch.nested.nested_tensor_from_jagged(values, offsets) for values in (indices, weights))
    assert torch.equal(collection(nested), collection(indices, offsets[:-1]))
    assert torch.equal(collection(nested, None, of_nested), collection(indices, offsets[:-1], weights))


def make_torchrec_model(**options) -> nn.Module:
    torchrec = pytest.importorskip("torchrec")
    configs = {"num_embeddings": ROWS, "embedding_dim": 8}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ebc = torchrec.EmbeddingBagCollection(
                tables=[
                    torchrec.EmbeddingBagConfig(
                        name="user", feature_names=["who", "seen"], pooling=torchrec.PoolingType.MEAN, **configs
                    ),
                    torchrec.EmbeddingBagConfig(name="item", feature_names=["seen"], **configs | options),
                ]
            )
            self.ec = torchrec.EmbeddingCollection(
                tables=[torchrec.EmbeddingConfig(name="shop", feature_names=["bought"], **configs)]
            )
            self.over = nn.Linear(16 + options.get("embedding_dim", 8), 1)

        def forward(self, features) -> torch.Tensor:
            sequence = self.ec(features)["bought"].values().sum()
            return self.over(self.ebc(features).values()) + sequence

    return Model().eval()


def test_quantize_swaps_torchrecs_collections():
    model = make_torchrec_model()
    before, floats = model(make_features()), copy.deepcopy(model)
    report = quantize_(model, bits=8)
    assert [table.name for table in report.tables] == [
        "ebc.embedding_bags.user",
        "ebc.embedding_bags.item",
        "ec.embeddings.shop",
    ]
    assert isinstance(model.ebc, PackedEmbeddingBagCollection) and not model.ebc.training
    assert isinstance(model.ec.embeddings["shop"], PackedEmbedding)
    assert model.ebc.embedding_names == ["who", "seen@user", "seen@item"]
    # The model over the levels that were stored.
    for name, module in (
        ("ebc.embedding_bags.user", model.ebc.embedding_bags["user"]),
        ("ec.embeddings.shop", model.ec.embeddings["shop"]),
    ):
        floats.get_submodule(name).weight.data.copy_(module.to_float().weight)
    floats.ebc.embedding_bags["item"].weight.data.copy_(model.ebc.embedding_bags["item"].to_float().weight)
    torch.testing.assert_close(model(make_features()), floats(make_features()))
    torch.testing.assert_close(model(make_features()), before, rtol=0, atol=0.05)


def test_tables_that_a_filter_leaves_alone_are_held_as_they_are():
    model = make_torchrec_model()
    floats, features = copy.deepcopy(model), make_features()
    wanted = quantize_(copy.deepcopy(model)).tables
    report = quantize_(model, filter=lambda module, name: not name.endswith("item"))
    assert isinstance(model.ebc, PackedEmbeddingBagCollection)
    assert isinstance(model.ebc.embedding_bags["user"], PackedEmbeddingBag)
    assert model.ebc.embedding_bags["item"].weight is model.get_parameter("ebc.embedding_bags.item.weight")
    assert report.tables[0].loss == wanted[0].loss and report.left_alone == (
        ("ebc.embedding_bags.item", "the filter says no"),
    )
    assert report.became == (
        ("ebc", "PackedEmbeddingBagCollection, 1 packed table, 1 of float32 (1,280 bytes)"),
        ("ec", "EmbeddingCollection, 1 packed table"),
    )
    assert "\nebc: PackedEmbeddingBagCollection, 1 packed table, 1 of float32 (1,280 bytes)\n" in str(report)
    found, before = model.ebc(features), floats.ebc(features)
    assert found.keys() == before.keys() == ["who", "seen@user", "seen@item"]
    assert torch.equal(found["seen@item"], before["seen@item"]) and not torch.equal(found["who"], before["who"])
    assert model(features).shape == (BATCH, 1)


@pytest.mark.parametrize("options", [{"num_embeddings": 15}, {"embedding_dim": 1}])
def test_small_tables_and_those_that_would_grow_are_held_as_they_are(tmp_path, options):
    trained = make_torchrec_model(**options)
    features = make_small_features()
    before = trained.ebc(features)
    save_model(trained, tmp_path / "float.safetensors")
    embpack.quantize_file(
        tmp_path / "float.safetensors", tmp_path / "packed.safetensors", exclude=["ebc.*item*"], include=["e*c.*"]
    )
    model = load_checkpoint(make_torchrec_model(**options), tmp_path / "packed.safetensors")
    report = quantize_(trained)
    assert [name for name, _ in report.left_alone] == ["ebc.embedding_bags.item"]
    for packed in (trained, model):
        assert isinstance(packed.ebc, PackedEmbeddingBagCollection) and not packed.ebc.training
        assert torch.equal(packed.ebc(features)["seen@item"], before["seen@item"])
        assert torch.equal(packed.ebc(features).values(), trained.ebc(features).values())
    assert set(model.state_dict()) == set(trained.state_dict()) and "ebc.embedding_bags.item.weight" in set(
        make_torchrec_model(**options).state_dict()
    )
    assert not any(name.endswith("item.weight") for name in model._ddp_params_and_buffers_to_ignore)
    again = quantize_packed_like(trained, options)
    again.load_state_dict(trained.state_dict())
    assert torch.equal(again.ebc(features).values(), trained.ebc(features).values())


def quantize_packed_like(model: nn.Module, options) -> nn.Module:
    """Another model, packed in the same way, with other values."""
    other = make_torchrec_model(**options)
    quantize_(other)
    assert not torch.equal(other.ebc.embedding_bags["item"].weight, model.ebc.embedding_bags["item"].weight)
    return other


def test_a_collection_with_no_packed_table_stays_torchrecs():
    model = make_torchrec_model()
    report = quantize_(model, filter=lambda module, name: "ebc" not in name)
    assert type(model.ebc).__name__ == "EmbeddingBagCollection"
    assert report.became == (("ec", "EmbeddingCollection, 1 packed table"),)


def test_a_collection_with_a_table_of_another_kind_stays_torchrecs():
    model = make_torchrec_model()
    model.ebc.embedding_bags["item"] = EmbeddingSums()
    report = quantize_(model)
    assert report.became[0] == ("ebc", "EmbeddingBagCollection, 1 packed table, 1 of float32 (1,280 bytes)")
    assert model(make_features()).shape == (BATCH, 1)


class EmbeddingSums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(ROWS, 8))
        self.config = None

    def forward(self, input, offsets, per_sample_weights=None) -> torch.Tensor:
        return nn.functional.embedding_bag(input, self.weight, offsets, mode="sum", include_last_offset=True)


def make_small_features():
    """Features with indices below 15."""
    jagged = pytest.importorskip("torchrec.sparse.jagged_tensor")
    indices, offsets = make_input()
    return jagged.KeyedJaggedTensor(list(KEYS), indices % 15, offsets=offsets)


def test_checkpoints_open_in_torchrecs_collections(tmp_path):
    trained = make_torchrec_model()
    save_model(trained, tmp_path / "float.safetensors")
    embpack.quantize_file(tmp_path / "float.safetensors", tmp_path / "packed.safetensors", include=["ec.*"])
    model = load_checkpoint(make_torchrec_model(), tmp_path / "packed.safetensors")
    assert isinstance(model.ebc, PackedEmbeddingBagCollection)
    quantize_(trained)
    features = make_features()
    assert torch.equal(model.ebc(features).values(), trained.ebc(features).values())
    assert torch.equal(model.ec(features)["bought"].values(), trained.ec(features)["bought"].values())
    assert torch.equal(model.over.weight, trained.over.weight)


def test_from_float_packs_what_quantize_packs():
    model = make_torchrec_model()
    packed = PackedEmbeddingBagCollection.from_float(model.ebc, "asym", bits=2)
    weight = model.ebc.embedding_bags["item"].weight.detach()
    np.testing.assert_array_equal(packed.tables["item"].packed, embpack.quantize(weight, "asym", bits=2).packed)
    assert packed.feature_names == {"user": ("who", "seen"), "item": ("seen",)}
    with pytest.raises(ValueError, match=r"the model is itself an embedding \(EmbeddingBagCollection\)"):
        quantize_(model.ebc)


def test_torchrec_is_not_asked_for():
    code = (
        "import sys, torch, embpack.torch as e\n"
        "c = e.PackedEmbeddingBagCollection({'a': e.PackedEmbeddingBag(3, 4, mode='sum')})\n"
        "c(torch.zeros((2, 1), dtype=torch.int64)), e.quantize_(torch.nn.Sequential(torch.nn.Embedding(20, 4)))\n"
        "assert 'torchrec' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Mistakes

COLLECTION = PackedEmbeddingBagCollection(make_bags(), FEATURES)
STARTS = torch.arange(len(KEYS))
ONE = torch.tensor([0])


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (
            IndexError,
            r"feature 2, table 1: indices\[2\] is 40, but the table has 40 rows",
            (torch.tensor([0, 1, 40, 2, 3]), STARTS),
        ),
        (ValueError, "1-D indices need offsets", (torch.arange(5),)),
        (
            ValueError,
            "offsets are for 1-D indices; each row of 2-D indices is a bag by itself",
            (torch.zeros((5, 1), dtype=torch.int64), STARTS),
        ),
        (ValueError, "there are 4 bags; 5 features take a multiple of 5", (torch.arange(5), STARTS[:4])),
        (ValueError, "there are 3 bags; 5 features take a multiple of 5", (torch.zeros((3, 1), dtype=torch.int64),)),
        (ValueError, r"offsets\[0\] is 1; the first bag must start at 0", (torch.arange(9), STARTS + 1)),
        (ValueError, r"offsets\[2\] is 0, less than offsets\[1\], 1", (torch.arange(5), torch.tensor([0, 1, 0, 1, 2]))),
        (ValueError, "there are 3 indices; no offset may be larger", (torch.arange(3), STARTS)),
        (TypeError, "indices are torch.float32; they must be", (torch.ones(5), STARTS)),
        (TypeError, "offsets are torch.int16; they must be", (torch.arange(5), STARTS.short())),
        (TypeError, "per_sample_weights are torch.float64", (torch.arange(5), STARTS, torch.ones(5).double())),
        (ValueError, r"per_sample_weights have shape \[4\], indices \[5\]", (torch.arange(5), STARTS, torch.ones(4))),
    ],
)
def test_wrong_arguments_are_named(error, message, arguments):
    with pytest.raises(error, match=message):
        COLLECTION(*arguments)


def test_offsets_that_are_empty_lack_the_last():
    collection = PackedEmbeddingBagCollection(make_bags(), FEATURES, include_last_offset=True)
    with pytest.raises(ValueError, match="offsets are empty; with include_last_offset"):
        collection(torch.arange(5), STARTS[:0])
    assert collection(STARTS[:0], torch.tensor([0])).shape == (0, 80)
    assert COLLECTION(STARTS[:0], STARTS[:0]).shape == (0, 80)


def test_an_empty_table_has_no_rows():
    collection = PackedEmbeddingBagCollection({"none": PackedEmbeddingBag(0, 4, mode="sum")})
    assert torch.equal(collection(STARTS[:0], torch.tensor([0])), torch.zeros(1, 4))
    with pytest.raises(IndexError, match=r"feature 0, table 0: indices\[0\] is 0, but the table has 0 rows"):
        collection(torch.tensor([[0]]))


def test_damaged_clusters_are_named():
    collection = PackedEmbeddingBagCollection(make_bags(), FEATURES)
    collection.embedding_bags["shop"].clusters[7] = 200
    with pytest.raises(embpack.FormatError, match="feature 2, table 2: row 7 is of cluster 200"):
        collection(torch.full((len(KEYS), 1), 7))


def test_weights_go_with_sums_only():
    collection = PackedEmbeddingBagCollection(make_bags(("sum", "mean")), FEATURES)
    with pytest.raises(ValueError, match="weights go with mode 'sum' only, and table 'item' has mode 'mean'"):
        collection(torch.arange(5), STARTS, torch.ones(5))


def test_what_torchrec_lacks_is_named():
    pytest.importorskip("torchrec")
    with pytest.raises(ValueError, match="table 'user' has mode 'max', which TorchRec lacks"):
        PackedEmbeddingBagCollection(make_bags("max"), FEATURES).to_float()
    with pytest.raises(ValueError, match="table 'user' has padding_idx 2, which TorchRec lacks"):
        PackedEmbeddingBagCollection(make_bags(padding_idx=2), FEATURES).to_float()


def test_features_that_do_not_go_together_are_named():
    from_torchrec = pytest.importorskip("torchrec.sparse.jagged_tensor")
    with pytest.raises(ValueError, match="the features lack seen, sort; they are who, where, bought"):
        COLLECTION(make_features(("who", "where", "bought")))
    with pytest.raises(ValueError, match="a KeyedJaggedTensor has offsets and weights of its own"):
        COLLECTION(make_features(), STARTS)
    uneven = from_torchrec.KeyedJaggedTensor(
        list(KEYS),
        torch.arange(6),
        lengths=torch.ones(6, dtype=torch.int64),
        stride_per_key_per_rank=[[2], [1], [1], [1], [1]],
    )
    with pytest.raises(ValueError, match="features have different numbers of bags"):
        COLLECTION(uneven)


def test_input_and_tables_of_other_types_are_named():
    with pytest.raises(TypeError, match="features is a list; it must be a tensor"):
        COLLECTION([1, 2, 3])
    with pytest.raises(TypeError, match=r"table 'a' is an Embedding; it must be a PackedEmbeddingBag, or an nn.Embed"):
        PackedEmbeddingBagCollection({"a": nn.Embedding(3, 4)})
    with pytest.raises(ValueError, match=r"no table is packed \(a\)"):
        PackedEmbeddingBagCollection({"a": nn.EmbeddingBag(3, 4)})
    with pytest.raises(TypeError, match=r"feature_names\['user'\] is 'who'; it must be a list of names: \['who'\]"):
        PackedEmbeddingBagCollection(make_bags(), FEATURES | {"user": "who"})
    with pytest.raises(TypeError, match="offsets is a list; it must be a tensor"):
        COLLECTION(torch.arange(3), [0, 1, 2, 3, 4])
    with pytest.raises(ValueError, match="weights go with mode 'sum' only, and table 'user' has mode 'mean'"):
        PackedEmbeddingBagCollection(make_bags("mean"), FEATURES, is_weighted=True)
    pytest.importorskip("torchrec")
    with pytest.raises(ValueError, match="the collection is weighted, and the features have no weights"):
        PackedEmbeddingBagCollection(make_bags(), FEATURES, is_weighted=True)(make_features())


def test_tables_and_features_must_go_together():
    with pytest.raises(ValueError, match="the tables are none, but feature_names are of none"):
        PackedEmbeddingBagCollection({})
    with pytest.raises(ValueError, match="the tables are user, item, shop, city, kind, but feature_names are of user"):
        PackedEmbeddingBagCollection(make_bags(), {"user": ["who"]})


def test_wrong_arguments_of_the_operator_are_named():
    pool = torch.ops.embpack.embedding_bag_collection
    packed, clusters, codebooks, text, feature_of, num_features = arguments_of(COLLECTION)
    bags = (torch.arange(5), STARTS)
    with pytest.raises(ValueError, match="tables are not described as describe_tables does it"):
        pool(packed, clusters, codebooks, "[[1, 2]]", feature_of, num_features, *bags)
    with pytest.raises(ValueError, match="tables are not described as describe_tables does it: mode must be"):
        pool(packed, [], [], describe_tables([TableUse("uniform:4:4:float16", "median", -1, 1)]), [0], 1, *bags)
    with pytest.raises(
        ValueError, match="there are 4 packed, 2 clusters, 2 codebooks, 6 feature_of; tables describe 5, 2"
    ):
        pool(packed[1:], clusters, codebooks, text, feature_of, num_features, *bags)
    with pytest.raises(ValueError, match="there are 5 packed, 1 clusters"):
        pool(packed, clusters[1:], codebooks, text, feature_of, num_features, *bags)
    with pytest.raises(ValueError, match="a lookup is of feature 4, but there are 4"):
        pool(packed, clusters, codebooks, text, feature_of, 4, *bags)
    with pytest.raises(ValueError, match=r"packed has \d+ bytes a row"):
        pool(packed[::-1], clusters, codebooks, text, feature_of, num_features, *bags)
    with pytest.raises(ValueError, match=r"dtype is torch\.int8; choose torch\.float32, float16, bfloat16 or float64"):
        pool(packed, clusters, codebooks, text, feature_of, num_features, *bags, dtype=torch.int8)
    means = describe_tables([TableUse("uniform:4:4:float16", "mean", -1, 1)])
    with pytest.raises(ValueError, match="per_sample_weights go with mode 'sum' only, and table 0 has mode 'mean'"):
        pool.weighted([torch.zeros((3, 6), dtype=torch.uint8)], [], [], means, [0], 1, ONE, ONE, torch.ones(1))
    found = pool(packed, clusters, codebooks, text, feature_of, num_features, *bags, dtype=torch.float64)
    assert torch.equal(found, COLLECTION(*bags).double())
    assert len(read_tables(text).table_of) == len(feature_of)
