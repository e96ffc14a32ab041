"""Rotated tables in PyTorch: modules against their float modules."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import embpack
from embpack.rotation import matrix
from embpack.torch import (
    PackedEmbedding,
    PackedEmbeddingBag,
    PackedEmbeddingBagCollection,
    load_checkpoint,
    quantize_,
)

ROWS, DIM = 40, 20
METHODS = ("asym", "kmeans-lloyd", "kmeans-cls:K=3")
MODES = ("sum", "mean", "max")


def make_table(method="asym", seed=0, dim=DIM, **options):
    weight = np.random.default_rng(seed).laplace(size=(ROWS, dim)).astype(np.float32)
    return embpack.quantize(weight, method, rotate="hadamard", **options)


def make_bags():
    indices = torch.from_numpy(np.random.default_rng(1).integers(0, ROWS, 30))
    return indices, torch.tensor([0, 0, 1, 20, 30])  # empty, one, many, and an empty one at the end


# Float32 sums of up to 30 rows, in another order and in another basis.
def assert_close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rotate_back", [True, False])
def test_bags_are_those_of_the_float_module(method, mode, padding_idx, rotate_back):
    table = make_table(method)
    packed = PackedEmbeddingBag.from_table(table, mode=mode, padding_idx=padding_idx, rotate_back=rotate_back)
    indices, offsets = make_bags()
    assert_close(packed(indices, offsets), packed.to_float()(indices, offsets))
    wanted = table.embedding_bag(indices, offsets, mode, padding_idx=padding_idx, rotate_back=rotate_back)
    assert torch.equal(packed(indices, offsets), torch.from_numpy(wanted))
    assert packed.table.rotation == "hadamard"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_values_of_other_types_are_rounded_after_rotating_back(mode, dtype):
    bag, rows = PackedEmbeddingBag.from_table(make_table(), mode=mode), PackedEmbedding.from_table(make_table())
    square = make_bags()[0].reshape(5, 6)
    wanted = bag(square), rows(square)
    assert torch.equal(bag.to(dtype)(square), wanted[0].to(dtype))
    assert torch.equal(rows.to(dtype)(square), wanted[1].to(dtype))


def test_embeddings_are_those_of_the_float_module():
    for rotate_back in (True, False):
        packed = PackedEmbedding.from_table(make_table(), rotate_back=rotate_back)
        indices = make_bags()[0].reshape(2, 3, 5)
        assert torch.equal(packed(indices), packed.to_float()(indices))


def test_rotate_back_may_be_set():
    packed = PackedEmbeddingBag.from_table(make_table(), mode="sum")
    indices, offsets = make_bags()
    wanted = packed(indices, offsets)
    packed.rotate_back = False
    assert "rotation='hadamard', rotate_back=False" in repr(packed)
    layer = nn.Linear(DIM, 3)
    folded = copy.deepcopy(layer)
    folded.weight.data = layer.weight @ torch.from_numpy(matrix(DIM))
    assert_close(folded(packed(indices, offsets)), layer(wanted))
    packed.rotate_back = True
    assert torch.equal(packed(indices, offsets), wanted)


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("rotate_back", [True, False])
def test_weights_get_their_gradients(square, rotate_back):
    packed = PackedEmbeddingBag.from_table(make_table(), mode="sum", padding_idx=3, rotate_back=rotate_back)
    indices, offsets = make_bags()
    if square:
        indices, offsets = indices.reshape(5, 6), None
    weights = torch.rand(indices.shape, requires_grad=True)
    gradients = []
    for module in (packed, packed.to_float()):
        pooled = module(indices, offsets, weights)
        (gradient,) = torch.autograd.grad((pooled**2).sum(), weights)
        gradients.append((pooled.detach(), gradient))
    assert_close(gradients[0][0], gradients[1][0])
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_operators_pass_opcheck(method):
    module = PackedEmbeddingBag.from_table(make_table(method))
    indices, offsets = make_bags()
    operators, table = torch.ops.embpack, (module.packed, str(module.row_format))
    shared = () if module.clusters is None else (module.clusters, module.codebooks)
    torch.library.opcheck(operators.embedding.default, (*table, indices, *shared), {"dtype": torch.bfloat16})
    for mode in MODES:
        torch.library.opcheck(operators.embedding_bag.default, (*table, indices, offsets, mode, *shared))
    weights = torch.rand(30, requires_grad=True)
    torch.library.opcheck(operators.embedding_bag.weighted, (*table, indices, offsets, weights, *shared))


class Model(nn.Module):
    def __init__(self, rotate_back=True):
        super().__init__()
        self.bag = PackedEmbeddingBag.from_table(make_table(), mode="sum", rotate_back=rotate_back)
        self.rows = PackedEmbedding.from_table(make_table(), rotate_back=rotate_back)

    def forward(self, indices, offsets, weights):
        return self.bag(indices, offsets) + self.bag(indices, offsets, weights) + self.rows(indices).sum(0)


@pytest.mark.parametrize("rotate_back", [True, False])
def test_modules_are_compiled_and_exported(rotate_back):
    model, arguments = Model(rotate_back), (*make_bags(), torch.rand(30, requires_grad=True))
    wanted = model(*arguments)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), wanted)
    gradients = [torch.autograd.grad(pooled.square().sum(), arguments[2]) for pooled in (compiled(*arguments), wanted)]
    torch.testing.assert_close(*gradients)
    program = torch.export.export(model, arguments)
    torch.testing.assert_close(program.module()(*arguments), wanted)


def test_state_dict_goes_into_a_module_made_with_the_rotation():
    packed = PackedEmbeddingBag.from_table(make_table(), mode="sum")
    made = PackedEmbeddingBag(ROWS, DIM, mode="sum", rotation="hadamard")
    made.load_state_dict(packed.state_dict())
    square = make_bags()[0].reshape(5, 6)
    for module in (made, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(module(square), packed(square))
    with pytest.raises(ValueError, match="rotation is 'fourier'"):
        PackedEmbedding(ROWS, DIM, rotation="fourier")


def test_quantize_and_load_checkpoint_keep_the_rotation(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.EmbeddingBag(50, DIM), nn.Linear(DIM, 3)).eval()

    model, path = make(), tmp_path / "model-4bit.safetensors"
    np.savez(tmp_path / "model.npz", **{name: value.numpy() for name, value in model.state_dict().items()})
    embpack.quantize_file(tmp_path / "model.npz", path, include=["0.weight"], rotate="hadamard")
    with torch.device("meta"):
        loaded = make()
    load_checkpoint(loaded, path)
    quantize_(model, rotate="hadamard")
    square = torch.arange(30).reshape(5, 6)
    assert model[0].table.rotation == loaded[0].table.rotation == "hadamard"
    assert torch.equal(model(square), loaded(square))


@pytest.mark.parametrize("mode", MODES)
def test_collections_pool_what_their_modules_do(mode):
    tables = {"user": make_table(), "item": make_table("kmeans-cls:K=3", 1, 13)}
    bags = {name: PackedEmbeddingBag.from_table(table, mode=mode) for name, table in tables.items()}
    bags["plain"] = PackedEmbeddingBag.from_table(tables["user"].as_packed, mode=mode)
    collection = PackedEmbeddingBagCollection(bags)
    square = torch.from_numpy(np.random.default_rng(2).integers(0, ROWS, (3 * 4, 5)))

    def pool_apart():
        return torch.cat([bag(own) for bag, own in zip(bags.values(), square.split(4), strict=True)], dim=1)

    assert torch.equal(collection(square), pool_apart())
    before = collection(square)
    bags["user"].rotate_back = False
    assert torch.equal(collection(square), pool_apart())
    assert not torch.equal(collection(square), before)


def test_weights_of_collections_get_their_gradients():
    bags = {name: PackedEmbeddingBag.from_table(make_table(seed=seed), mode="sum") for seed, name in enumerate("ab")}
    collection = PackedEmbeddingBagCollection(bags)
    square = torch.from_numpy(np.random.default_rng(2).integers(0, ROWS, (2 * 4, 5)))
    weights = torch.rand(square.shape, requires_grad=True)
    pooled = collection(square, None, weights)
    floats = [bag.to_float() for bag in bags.values()]
    parts = zip(floats, square.split(4), weights.split(4), strict=True)
    wanted = torch.cat([module(indices, None, own) for module, indices, own in parts], dim=1)
    assert_close(pooled, wanted)
    gradients = [torch.autograd.grad(values.square().sum(), weights)[0] for values in (pooled, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)


def test_formats_that_there_are_not_are_refused():
    module = PackedEmbedding.from_table(make_table())
    for text in ("uniform:20:4:float16:fourier", "uniform:20:4:float16:", "uniform:20:4:float16:hadamard:"):
        with pytest.raises(ValueError, match=r"rotation|row format"):
            torch.ops.embpack.embedding(module.packed, text, torch.tensor([0]))
