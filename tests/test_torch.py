"""embpack.torch: operators and modules against PyTorch's own over the same values."""

import copy
import dataclasses
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils.data import DataLoader, Dataset

import embpack
from embpack import _native
from embpack.formats.mapped import is_mapped
from embpack.torch import PackedEmbedding, PackedEmbeddingBag, PackedEmbeddingBagCollection, quantize_

ROWS, DIM = 40, 20
METHODS = ("asym", "kmeans-lloyd", "kmeans-cls:K=3")


def make_table(method: str = "asym", dim: int = DIM, **options: object) -> embpack.PackedTable:
    weight = np.random.default_rng(0).standard_normal((ROWS, dim), dtype=np.float32)
    return embpack.quantize(weight, method, **options)


def make_bags(dtype: torch.dtype = torch.int64) -> tuple[torch.Tensor, torch.Tensor]:
    indices = torch.from_numpy(np.random.default_rng(1).integers(0, ROWS, 30)).to(dtype)
    return indices, torch.tensor([0, 0, 1, 20, 30], dtype=dtype)  # empty, one, many, and an empty one at the end


def arguments_of(module: PackedEmbedding | PackedEmbeddingBag, *lookup: object) -> tuple[object, ...]:
    shared = () if module.clusters is None else (module.clusters, module.codebooks)
    return (module.packed, str(module.row_format), *lookup, *shared)


# Float32 sums of up to 30 rows of values below 4, in another order.
def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=30 * 30 * 4 * 2**-24)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("padding_idx", [None, 3, -1])
@pytest.mark.parametrize("include_last_offset", [False, True])
def test_bags_are_those_of_the_float_module(method, mode, dtype, padding_idx, include_last_offset):
    options = {"mode": mode, "padding_idx": padding_idx, "include_last_offset": include_last_offset}
    packed = PackedEmbeddingBag.from_table(make_table(method), **options)
    wanted = packed.to_float()
    assert (wanted.mode, wanted.padding_idx, wanted.include_last_offset) == (
        mode,
        packed.padding_idx,
        include_last_offset,
    )
    indices, offsets = make_bags(dtype)
    assert_close(packed(indices, offsets), wanted(indices, offsets))
    table = make_table(method).embedding_bag(
        indices, offsets, mode, include_last_offset=include_last_offset, padding_idx=padding_idx
    )
    np.testing.assert_array_equal(packed(indices, offsets).numpy(), table)
    square = indices.reshape(5, 6)
    assert_close(packed(square), wanted(square))
    scattered = torch.stack([indices, indices], 1)[:, 0]
    assert torch.equal(packed(scattered, offsets), packed(indices, offsets))
    assert torch.equal(packed(square.T), packed(square.T.contiguous()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,), (2, 0, 3)])
def test_embeddings_are_those_of_the_float_module(method, shape):
    packed = PackedEmbedding.from_table(make_table(method), padding_idx=-1)
    indices = torch.randint(0, ROWS, shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(packed(indices), packed.to_float()(indices))
    assert torch.equal(packed(indices.int()), packed(indices))
    assert packed.to_float().padding_idx == packed.padding_idx == ROWS - 1


def test_from_float_packs_what_quantize_packs():
    bag = nn.EmbeddingBag(ROWS, DIM, mode="sum", padding_idx=2)
    packed = PackedEmbeddingBag.from_float(bag, "greedy", bits=8)
    np.testing.assert_array_equal(packed.table.packed, embpack.quantize(bag.weight.detach(), "greedy", bits=8).packed)
    assert (packed.mode, packed.padding_idx, packed.table.bits) == ("sum", 2, 8)
    embedding = nn.Embedding(ROWS, DIM).to(torch.bfloat16)
    np.testing.assert_array_equal(
        PackedEmbedding.from_float(embedding).table.packed, embpack.quantize(embedding.weight.detach()).packed
    )


@pytest.mark.parametrize("module", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}])
def test_what_a_packed_module_cannot_do_is_refused(module, options):
    packed = PackedEmbedding if module is nn.Embedding else PackedEmbeddingBag
    with pytest.raises(ValueError, match=f"the module has {next(iter(options))}="):
        packed.from_float(module(4, 4, **options))


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 5])
def test_weights_get_their_gradients(square, padding_idx):
    packed = PackedEmbeddingBag.from_table(make_table(), mode="sum", padding_idx=padding_idx)
    indices, offsets = make_bags()
    arguments = (indices.reshape(5, 6), None) if square else (indices, offsets)
    gradients = []
    for module in (packed, packed.to_float()):
        weights = torch.linspace(-1, 1, 30).reshape(arguments[0].shape).requires_grad_()
        (module(*arguments, weights) ** 2).sum().backward()
        gradients.append(weights.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in packed.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_operators_pass_opcheck(method):
    module = PackedEmbeddingBag.from_table(make_table(method))
    indices, offsets = make_bags()
    operators = torch.ops.embpack
    torch.library.opcheck(operators.embedding.default, arguments_of(module, indices))
    torch.library.opcheck(operators.embedding.default, arguments_of(module, indices), {"dtype": torch.bfloat16})
    for mode in ("sum", "mean", "max"):
        torch.library.opcheck(
            operators.embedding_bag.default, arguments_of(module, indices, offsets, mode), {"padding_idx": 1}
        )
    torch.library.opcheck(
        operators.embedding_bag.default, arguments_of(module, indices, offsets, "sum"), {"include_last_offset": True}
    )
    weights = torch.rand(30, requires_grad=True)
    torch.library.opcheck(operators.embedding_bag.weighted, arguments_of(module, indices, offsets, weights))
    square = arguments_of(module, indices.reshape(5, 6), None, torch.rand(5, 6, requires_grad=True))
    torch.library.opcheck(operators.embedding_bag.weighted, square)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_of_other_types_are_rounded(dtype):
    module = PackedEmbeddingBag.from_table(make_table(), mode="sum")
    indices, offsets = make_bags()
    found = torch.ops.embpack.embedding_bag(*arguments_of(module, indices, offsets, "sum"), dtype=dtype)
    assert torch.equal(found, module(indices, offsets).to(dtype))
    rows = torch.ops.embpack.embedding(*arguments_of(module, indices), dtype=dtype)
    assert torch.equal(rows, torch.from_numpy(module.table[indices]).to(dtype))


@pytest.mark.parametrize("method", METHODS)
def test_modules_are_saved_and_loaded(tmp_path, method):
    table = make_table(method)
    bag = PackedEmbeddingBag.from_table(table)
    codebooks = 0 if table.codebooks is None else len(table.codebooks)
    options = {"layout": table.layout, "num_codebooks": codebooks}
    indices, offsets = make_bags()
    wanted = bag(indices, offsets)
    assert all(buffer.dtype == torch.uint8 for buffer in bag.state_dict().values())

    empty = PackedEmbeddingBag(ROWS, DIM, **options)
    torch.save(bag.state_dict(), tmp_path / "bag.pt")
    empty.load_state_dict(torch.load(tmp_path / "bag.pt", weights_only=True))
    assert torch.equal(empty(indices, offsets), wanted)

    other = PackedEmbeddingBag(ROWS, DIM, **options)
    save_model(bag, tmp_path / "bag.safetensors")
    load_model(other, tmp_path / "bag.safetensors")
    assert torch.equal(other(indices, offsets), wanted)

    for again in (copy.deepcopy(bag), pickle.loads(pickle.dumps(bag)), copy.deepcopy(bag).half().float()):
        assert torch.equal(again(indices, offsets), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_modules_return_values_of_the_type_that_their_weights_had(method, dtype):
    indices, offsets = make_bags()
    if dtype == torch.float64:
        embedding = PackedEmbedding.from_table(make_table(method)).double()
        bag = PackedEmbeddingBag.from_table(make_table(method), mode="sum").double()
    else:
        embedding = PackedEmbedding.from_float(nn.Embedding(ROWS, DIM, dtype=dtype), method)
        bag = PackedEmbeddingBag.from_float(nn.EmbeddingBag(ROWS, DIM, mode="sum", dtype=dtype), method)
    for module, arguments in ((embedding, (indices,)), (bag, (indices, offsets)), (bag, (indices.reshape(5, 6),))):
        found = module(*arguments)
        assert found.dtype == module.dtype == module.to_float().weight.dtype == dtype
        single = copy.deepcopy(module).float()
        assert single(*arguments).dtype == torch.float32 and torch.equal(single(*arguments).to(dtype), found)
        assert f"{dtype}" in repr(module) and "torch" not in repr(single)
        again = type(module).from_table(module.table)
        assert again.dtype == (torch.float32 if dtype == torch.float64 else dtype)
    gradients = []
    for weights in (torch.linspace(-1, 1, 30, dtype=dtype), torch.linspace(-1, 1, 30, dtype=dtype).float()):
        weights.requires_grad_()
        found = bag(indices, offsets, weights)
        assert found.dtype == dtype
        assert torch.equal(found, copy.deepcopy(bag).float()(indices, offsets, weights.float()).to(dtype))
        (found.double() ** 2).sum().backward()
        assert weights.grad.dtype == weights.dtype
        gradients.append(weights.grad.double())
    torch.testing.assert_close(*gradients, rtol=2**-7, atol=1e-3)


def test_modules_take_the_type_they_are_made_with():
    assert PackedEmbedding(3, 4, dtype=torch.bfloat16)(ONE).dtype == torch.bfloat16
    assert PackedEmbeddingBag(3, 4, dtype=torch.float16)(ONE, ONE).dtype == torch.float16
    for dtype in (torch.int8, "float16"):
        with pytest.raises(ValueError, match=f"dtype is {dtype}; choose torch.float32, float16, bfloat16 or float64"):
            PackedEmbedding(3, 4, dtype=dtype)
    torch.set_default_dtype(torch.float64)
    try:
        assert PackedEmbedding(3, 4)(ONE).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_compiled_modules_return_what_eager_ones_do_whatever_the_default_type(default):
    embedding = PackedEmbedding.from_table(make_table())
    bag = PackedEmbeddingBag.from_table(make_table(), mode="sum")
    collection = PackedEmbeddingBagCollection({"a": bag})
    square, weights = make_bags()[0].reshape(5, 6), torch.rand(5, 6, requires_grad=True)

    def look_up() -> list[torch.Tensor]:
        return [embedding(square) + 1, bag(square, None, weights) + 1, collection(square, None, weights) + 1]

    torch.set_default_dtype(default)
    try:
        wanted, found = look_up(), torch.compile(look_up, fullgraph=True, backend="aot_eager")()
        gradients = [torch.autograd.grad((pooled**2).sum(), weights)[0] for pooled in wanted[1:]]
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
    torch.testing.assert_close(*gradients)


class Weighted(nn.Module):
    def __init__(self, bag: nn.Module, rows: nn.Module) -> None:
        super().__init__()
        self.bag, self.rows = bag, rows

    def forward(self, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.bag(indices, None, weights) + self.rows(indices).sum(1) + self.bag(indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_are_traced_by_fx_as_their_float_twins(dtype):
    bag = PackedEmbeddingBag.from_table(make_table(), mode="sum").to(dtype)
    model = Weighted(bag, PackedEmbedding.from_table(make_table("kmeans")).to(dtype))
    square = make_bags()[0].reshape(5, 6)
    weights = torch.linspace(-1, 1, 30, dtype=dtype).reshape(5, 6)
    traced, floats = (
        torch.fx.symbolic_trace(each) for each in (model, Weighted(bag.to_float(), model.rows.to_float()))
    )
    assert [(node.op, node.target) for node in traced.graph.nodes] == [
        (node.op, node.target) for node in floats.graph.nodes
    ]
    assert torch.equal(traced(square, weights), model(square, weights))
    assert traced.state_dict().keys() == model.state_dict().keys()  # with what they say of their rows
    traced.get_submodule("rows").half()  # what is changed later counts, as in the float model
    assert traced.get_submodule("rows")(square).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_modules_by_themselves_are_traced_by_fx(dtype):
    indices, offsets = make_bags()
    rows = PackedEmbedding.from_table(make_table("kmeans")).to(dtype)
    assert torch.equal(torch.fx.symbolic_trace(rows)(indices), rows(indices))
    for bag in (PackedEmbeddingBag.from_table(make_table(), mode=mode).to(dtype) for mode in ("sum", "max")):
        traced = torch.fx.symbolic_trace(bag, concrete_args={"per_sample_weights": None})
        assert torch.equal(traced(indices, offsets), bag(indices, offsets))
        with pytest.raises(ValueError, match="by itself only without weights: concrete_args="):
            torch.fx.symbolic_trace(bag)


def make_jagged(values: torch.Tensor, lengths: tuple[int, ...] = (3, 0, 1, 6)) -> torch.Tensor:
    return torch.nested.nested_tensor(list(values[: sum(lengths)].split(lengths)), layout=torch.jagged)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_indices_have_nested_rows(layout):
    packed = PackedEmbedding.from_table(make_table())
    values = make_bags()[0]
    several = [values[:10].split((3, 1, 6))]
    if layout == torch.jagged:  # PyTorch takes no others there
        several.append(values[:12].reshape(6, 2).split((1, 5)))
    for parts in several:
        indices = torch.nested.nested_tensor(list(parts), layout=layout)
        found, wanted = packed(indices), packed.to_float()(indices)
        assert found.is_nested and found.layout == layout
        for one, other in zip(found.unbind(), wanted.unbind(), strict=True):
            assert torch.equal(one, other)
        if layout == torch.jagged:
            assert (found + wanted).shape == wanted.shape  # PyTorch knows that they have the same lengths
            compiled = torch.compile(lambda nested: packed(nested) + 1, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(indices).values(), (found + 1).values())


def test_rows_of_nested_indices_are_bags():
    values = make_bags()[0]
    indices = make_jagged(values)
    weights = torch.linspace(-1, 1, 10)
    nested = torch.nested.nested_tensor_from_jagged(weights, indices.offsets())
    for mode in ("sum", "mean", "max"):
        packed = PackedEmbeddingBag.from_table(make_table(), mode=mode)
        assert_close(packed(indices), packed.to_float()(indices))
        assert torch.equal(packed(indices), packed(values[:10], torch.tensor([0, 3, 3, 4])))
    assert_close(BAG(indices, None, nested), BAG.to_float()(indices, None, nested))
    compiled = torch.compile(lambda nested: BAG(nested) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(indices), BAG(indices) + 1)
    gapped = torch.nested.narrow(
        values[:10].reshape(2, 5), 1, torch.tensor([0, 1]), ONE.new_tensor([2, 3]), torch.jagged
    )
    assert torch.equal(BAG(gapped.contiguous()), BAG(values[[0, 1, 6, 7, 8]], torch.tensor([0, 2])))
    embedding = PackedEmbedding.from_table(make_table())
    for module, argument in (
        (BAG, gapped),
        (embedding, gapped),
        (embedding, make_jagged(values[:20].reshape(10, 2)).mT),
    ):
        with pytest.raises(
            ValueError, match=r"transposed or has gaps; lookups take contiguous ones: tensor\.contiguous"
        ):
            module(argument)
    with pytest.raises(ValueError, match="input is a nested tensor of 3 dimensions; bags take 2"):
        BAG(make_jagged(values[:20].reshape(10, 2)))
    with pytest.raises(ValueError, match="offsets are for 1-D indices; each row of a nested tensor is a bag by itself"):
        BAG(indices, ONE)
    for wrong in (weights, torch.nested.nested_tensor_from_jagged(weights, torch.tensor([0, 1, 2, 3, 10]))):
        with pytest.raises(ValueError, match="per_sample_weights must be nested as input is, with the same offsets"):
            BAG(indices, None, wrong)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_bags_of_nested_indices_are_jagged():
    with pytest.raises(TypeError, match=r"of layout torch\.strided; bags take layout torch\.jagged"):
        BAG(torch.nested.nested_tensor([ONE, ONE], layout=torch.strided))


@pytest.mark.parametrize("module", [PackedEmbedding, PackedEmbeddingBag])
def test_padding_idx_is_any_integer(module):
    for three in (3, np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor([3])):
        found = module(10, 4, padding_idx=three).padding_idx
        assert found == 3 and type(found) is int
    assert module(10, 4, padding_idx=np.int8(-1)).padding_idx == 9
    for wrong in (3.0, torch.tensor(3.0), "3"):
        with pytest.raises(TypeError, match=r"padding_idx is .*3.*; it must be an integer, the number of a row"):
            module(10, 4, padding_idx=wrong)


@pytest.mark.parametrize("module", [PackedEmbedding, PackedEmbeddingBag])
def test_padding_idx_that_is_set_later_is_read_alike(module):
    made = module(10, 4)
    made.padding_idx = torch.tensor(-1)
    assert (type(made.padding_idx), made.padding_idx) == (int, 9)
    with pytest.raises(ValueError, match="padding_idx is 10, but the table has 10 rows"):
        made.padding_idx = 10
    assert made.padding_idx == 9


class LowRank(nn.Module):
    """What LoRA does in PEFT's peft.tuners.lora.layer.Embedding: it reads the options of the embedding beneath."""

    def __init__(self, base_layer: nn.Module, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_embedding_A = nn.Parameter(torch.randn(rank, base_layer.num_embeddings))
        self.lora_embedding_B = nn.Parameter(torch.randn(base_layer.embedding_dim, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base = self.base_layer
        after_A = nn.functional.embedding(
            x,
            self.lora_embedding_A.T,
            padding_idx=base.padding_idx,
            max_norm=base.max_norm,
            norm_type=base.norm_type,
            scale_grad_by_freq=base.scale_grad_by_freq,
            sparse=base.sparse,
        )
        return base(x) + after_A @ self.lora_embedding_B.T


def test_low_rank_adapters_train_over_packed_rows():
    torch.manual_seed(0)
    model = nn.Sequential(LowRank(nn.Embedding(ROWS, DIM, padding_idx=0)))
    quantize_(model)
    assert isinstance(model[0].base_layer, PackedEmbedding)
    floats = copy.deepcopy(model)
    floats[0].base_layer = model[0].base_layer.to_float()
    indices = make_bags()[0].reshape(5, 6)
    assert torch.equal(model(indices), floats(indices))
    for each in (model, floats):
        each(indices).square().sum().backward()
    assert model[0].lora_embedding_A.grad.abs().sum() > 0
    for ours, theirs in zip(model.parameters(), list(floats.parameters())[:2], strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize(("packed", "floats"), [(PackedEmbedding, nn.Embedding), (PackedEmbeddingBag, nn.EmbeddingBag)])
def test_modules_have_the_attributes_of_their_float_twins(packed, floats):
    ours, theirs = packed(3, 4), floats(3, 4)
    plain = [name for name in vars(theirs) if not name.startswith("_")]
    assert {"max_norm", "norm_type", "scale_grad_by_freq", "sparse", "padding_idx"} <= set(plain)
    assert {name: getattr(ours, name) for name in plain} == {name: getattr(theirs, name) for name in plain}


def test_a_model_of_another_type_runs_packed_compiled_and_exported():
    model = nn.Sequential(nn.EmbeddingBag(ROWS, DIM), nn.Linear(DIM, 3)).to(torch.bfloat16).eval()
    indices = make_bags()[0].reshape(5, 6)
    model[0] = PackedEmbeddingBag.from_float(model[0])
    wanted = model(indices)
    assert wanted.dtype == torch.bfloat16
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(indices), wanted)
    assert torch.equal(torch.export.export(model, (indices,)).module()(indices), wanted)


@pytest.mark.parametrize("method", METHODS)
def test_modules_are_compiled_and_exported(tmp_path, method):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = PackedEmbeddingBag.from_table(make_table(method), mode="sum")
            self.rows = PackedEmbedding.from_table(make_table(method))

        def forward(self, indices: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return self.bag(indices, offsets) + self.bag(indices, offsets, weights) + self.rows(indices).sum(0)

    model = Model()
    arguments = (*make_bags(), torch.rand(30))
    wanted = model(*arguments)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), wanted)
    length, batch = torch.export.Dim("length", max=1000), torch.export.Dim("batch", max=1000)
    program = torch.export.export(model, arguments, dynamic_shapes=({0: length}, {0: batch}, {0: length}))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(loaded(*arguments), wanted)
    shorter = (arguments[0][:25], torch.tensor([0, 3, 7]), arguments[2][:25])
    torch.testing.assert_close(loaded(*shorter), model(*shorter))


class _Sums(Dataset):
    def __init__(self, module: PackedEmbeddingBag) -> None:
        self.module = module

    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.module(torch.arange(number, number + 20).reshape(1, -1))[0]


def test_modules_work_in_workers_of_a_data_loader():
    module = PackedEmbeddingBag.from_table(make_table(), mode="sum")
    found = torch.cat(list(DataLoader(_Sums(module), batch_size=4, num_workers=2)))
    assert torch.equal(found, torch.stack([_Sums(module)[number] for number in range(8)]))


def test_a_module_shares_the_memory_of_its_table():
    table = make_table()
    module = PackedEmbedding.from_table(table)
    assert module.packed.data_ptr() == table.packed.ctypes.data
    assert np.shares_memory(module.table.packed, table.packed)


def test_a_mapped_table_stays_mapped(tmp_path):
    table = make_table("kmeans-cls:K=3")
    embpack.save(tmp_path / "tables.safetensors", {"rows": table})
    mapped = embpack.load(tmp_path / "tables.safetensors")["rows"]
    module = PackedEmbedding.from_table(mapped)
    assert module.packed.data_ptr() == mapped.packed.ctypes.data
    assert torch.equal(module(torch.arange(ROWS)), torch.from_numpy(table.dequantize()))
    # What is written there is this process's own: neither another's nor the file's, nor the end of the process.
    module.packed.zero_()
    module.codebooks.fill_(1)
    assert not module(torch.arange(ROWS)).isnan().any() and not mapped.packed.flags.writeable
    again = embpack.load(tmp_path / "tables.safetensors", verify=True)["rows"]
    np.testing.assert_array_equal(again.packed, table.packed)


def test_a_mapped_table_is_taken_without_a_warning_and_kept(tmp_path):
    """In a process of its own: PyTorch warns of read-only arrays only once."""
    embpack.save(tmp_path / "tables.safetensors", {"rows": make_table()})
    code = (
        "import gc, os, sys, warnings, torch, embpack; from embpack.torch import PackedEmbedding; "
        "warnings.simplefilter('error'); "
        "module = PackedEmbedding.from_table(embpack.load(sys.argv[1])['rows']); "
        "os.remove(sys.argv[1]); gc.collect(); "
        f"print(module(torch.arange({ROWS})).sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "tables.safetensors"], capture_output=True, text=True, timeout=120
    )
    wanted = PackedEmbedding.from_table(make_table())(torch.arange(ROWS)).sum().item()
    assert done.stdout == f"{wanted}\n", done.stderr


def test_memory_that_cannot_be_written_to_is_copied(tmp_path):
    """To write to a file that is mapped for reading alone would end the process."""
    embpack.save(tmp_path / "tables.safetensors", {"rows": make_table()})
    raw = np.memmap(tmp_path / "tables.safetensors", mode="r")
    shape = make_table().packed.shape
    packed = raw[len(raw) - shape[0] * shape[1] :].reshape(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = PackedEmbedding.from_table(dataclasses.replace(make_table(), packed=packed))
    before = packed.copy()
    module.packed.zero_()
    assert np.array_equal(packed, before)


def test_it_is_known_whose_memory_may_be_written_to(tmp_path):
    table = make_table()
    table.packed.flags.writeable = False
    embpack.save(tmp_path / "tables.safetensors", {"rows": table})
    mapped = embpack.load(tmp_path / "tables.safetensors")["rows"]
    assert is_mapped(mapped.packed) and is_mapped(mapped.packed[3:].reshape(-1).view(np.uint8))
    assert not is_mapped(table.packed) and not is_mapped(np.memmap(tmp_path / "tables.safetensors", mode="r"))


def test_modules_say_what_they_are():
    bag = PackedEmbeddingBag.from_table(make_table(), mode="sum", padding_idx=1, include_last_offset=True)
    assert repr(bag) == (
        "PackedEmbeddingBag(40, 20, uniform, 4 bits, float16 parameters, mode='sum', include_last_offset=True, "
        "padding_idx=1)"
    )
    assert repr(PackedEmbedding(3, 4, bits=2)) == "PackedEmbedding(3, 4, uniform, 2 bits, float16 parameters)"


BAG = PackedEmbeddingBag.from_table(make_table(), mode="sum")
ONE = torch.tensor([0])


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (IndexError, r"indices\[1\] is 40, but the table has 40 rows \(valid: 0 to 39\)", (torch.tensor([0, 40]), ONE)),
        (IndexError, r"indices\[0\] is -1", (torch.tensor([[-1]]), None)),
        (ValueError, r"offsets\[0\] is 1; the first bag must start at 0", (torch.arange(3), torch.tensor([1]))),
        (ValueError, r"offsets\[2\] is 1, less than offsets\[1\], 2", (torch.arange(3), torch.tensor([0, 2, 1]))),
        (ValueError, r"there are 3 indices; no offset may be larger", (torch.arange(3), torch.tensor([0, 4]))),
        (ValueError, "1-D indices need offsets", (torch.arange(3), None)),
        (ValueError, "offsets are for 1-D indices", (torch.zeros((2, 2), dtype=torch.int64), ONE)),
        (ValueError, "indices have 3 dimensions", (torch.zeros((1, 2, 3), dtype=torch.int64), None)),
        (ValueError, "offsets have 2 dimensions", (torch.arange(3), torch.zeros((1, 1), dtype=torch.int64))),
        (TypeError, r"indices are torch.float32; they must be torch.int32 or torch.int64", (torch.ones(1, 2), None)),
        (TypeError, "offsets are torch.int16; they must be torch.int32 or", (torch.arange(3), ONE.short())),
        (TypeError, "input is a list; it must be a tensor", ([1, 2], ONE)),
        (TypeError, "offsets is a ndarray; it must be a tensor", (torch.arange(3), ONE.numpy())),
        (TypeError, "per_sample_weights is a list; it must be a tensor", (torch.arange(3), ONE, [1.0, 2.0, 3.0])),
        (TypeError, "input is a NoneType; it must be a tensor", (None,)),
        (TypeError, "per_sample_weights are torch.float64", (torch.arange(1), ONE, torch.ones(1).double())),
        (ValueError, r"per_sample_weights have shape \[2\], indices \[1\]", (torch.arange(1), ONE, torch.ones(2))),
    ],
)
def test_wrong_arguments_are_named(error, message, arguments):
    with pytest.raises(error, match=message):
        BAG(*arguments)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("mode", ["sum", "mean", "max", "weighted"])
def test_every_index_must_be_in_a_bag(mode, dtype):
    """PyTorch's answers differ (tests/test_peers.py)."""
    weights = () if mode != "weighted" else (torch.ones(4, requires_grad=True),)
    mode = "sum" if mode == "weighted" else mode
    plain = PackedEmbeddingBag.from_table(make_table(), mode=mode)
    with_last = PackedEmbeddingBag.from_table(make_table(), mode=mode, include_last_offset=True)
    padded = PackedEmbeddingBag.from_table(make_table(), mode=mode, include_last_offset=True, padding_idx=1)
    indices, ends = torch.arange(4, dtype=dtype), torch.tensor([0, 3, 3], dtype=dtype)
    for module in (with_last, padded, with_last.half()):
        with pytest.raises(ValueError, match=r"offsets\[2\], where the last bag ends, is 3, but there are 4 indices"):
            module(indices, ends, *weights)
    with pytest.raises(ValueError, match=r"offsets\[0\], where the last bag ends, is 0, but there are 4 indices"):
        with_last(indices, ends[:1], *weights)
    with pytest.raises(ValueError, match="offsets are empty, but there are 4 indices; each must be in a bag"):
        plain(indices, ends[:0], *weights)
    with pytest.raises(ValueError, match=r"offsets\[0\] is 3; the first bag must start at 0"):
        plain(indices, ends[1:], *weights)
    assert torch.equal(plain(indices, ends, *weights)[2], plain(indices[3:], ends[:1], *(w[3:] for w in weights))[0])
    assert with_last(indices[:0], ends[:1], *(w[:0] for w in weights)).shape == (0, DIM)
    assert plain(indices[:0], ends[:0], *(w[:0] for w in weights)).shape == (0, DIM)


def test_compiled_modules_ask_for_every_index_too():
    module = PackedEmbeddingBag.from_table(make_table(), mode="sum", include_last_offset=True)
    with pytest.raises(ValueError, match=r"offsets\[2\], where the last bag ends, is 3, but there are 4 indices"):
        torch.compile(module, fullgraph=True, backend="eager")(torch.arange(4), torch.tensor([0, 3, 3]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_finite_weights_have_finite_values(dtype):
    """With 15 steps of 8736 the highest level lies at 65536; two rows have a sum of twice that."""
    table = embpack.quantize(np.float16([[-65504, 65504, 0, 100, -100, 5, 6, 7]] * 16), "asym")
    assert table.dtype == "float16"
    highest = {torch.float16: [65504, 65504]}.get(dtype, [65536, 131072])
    one, bag = PackedEmbedding.from_table(table).to(dtype), PackedEmbeddingBag.from_table(table, mode="sum").to(dtype)
    found = [one(torch.tensor([3]))[0, 1], bag(torch.tensor([[3]]))[0, 1], bag(torch.tensor([[3, 3]]))[0, 1]]
    assert torch.stack(found).tolist() == [highest[0], *highest]
    weighted = bag(torch.tensor([[3]]), None, torch.tensor([[2.0]]))
    assert weighted[0, 1].item() == highest[1]
    for weight in (one.to_float().weight, bag.to_float().weight):
        assert weight.dtype == dtype and weight[:, 1].tolist() == [highest[0]] * 16
        assert torch.equal(weight, one(torch.arange(16)))


def test_other_mistakes_are_named():
    with pytest.raises(ValueError, match="per_sample_weights go with mode 'sum' only, not 'mean'"):
        PackedEmbeddingBag.from_table(make_table())(torch.arange(1), ONE, torch.ones(1))
    with pytest.raises(ValueError, match="padding_idx is 40, but the table has 40 rows"):
        PackedEmbeddingBag.from_table(make_table(), padding_idx=40)
    with pytest.raises(ValueError, match="mode is 'median'; choose one of sum, mean, max"):
        PackedEmbeddingBag(3, 4, mode="median")
    with pytest.raises(ValueError, match="mode is 'median'; choose one of sum, mean, max"):
        torch.ops.embpack.embedding_bag(*arguments_of(BAG, torch.arange(1), ONE, "median"))
    with pytest.raises(ValueError, match=r"dtype is torch\.int8; choose torch\.float32"):
        torch.ops.embpack.embedding_bag(*arguments_of(BAG, ONE, ONE, "sum"), dtype=torch.int8)
    with pytest.raises(TypeError, match="input is a list; it must be a tensor"):
        PackedEmbedding(3, 4)([1, 2])
    with pytest.raises(TypeError, match=r"from_float takes an nn\.Embedding, not an EmbeddingBag"):
        PackedEmbedding.from_float(nn.EmbeddingBag(3, 4))
    with pytest.raises(TypeError, match=r"PackedEmbeddingBag\.from_table takes an embpack\.PackedTable, not a Tensor"):
        PackedEmbeddingBag.from_table(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="packed has 14 bytes a row, but embedding_dim 21 at 4 bits"):
        torch.ops.embpack.embedding(BAG.packed, "uniform:21:4:float16", ONE)
    for text in ("", "uniform", "uniform:20:4", "uniform:20:4:", "uniform:20:9:float16", "uniform:x:4:float16", ":::"):
        with pytest.raises(ValueError, match=r"row format is|bits is 9"):
            torch.ops.embpack.embedding_bag(BAG.packed, text, ONE, ONE, "sum")
    with pytest.raises(ValueError, match="offsets are empty; with include_last_offset"):
        empty = torch.empty(0, dtype=torch.int64)
        torch.ops.embpack.embedding_bag(*arguments_of(BAG, ONE, empty, "sum"), include_last_offset=True)


def test_what_lies_beside_the_rows_must_be_the_layouts():
    module = PackedEmbedding.from_table(make_table("kmeans-cls:K=3"))
    look_up, row_format = torch.ops.embpack.embedding, str(module.row_format)
    assert torch.equal(look_up(module.packed, row_format, ONE, module.clusters, module.codebooks), module(ONE))
    with pytest.raises(ValueError, match=r"codebooks are uint8 of shape \[3, 31\]; .*float16 \[num_codebooks, 16\]"):
        look_up(module.packed, row_format, ONE, module.clusters, module.codebooks[:, 1:].contiguous())
    with pytest.raises(ValueError, match=r"clusters are uint8 of shape \[40, 3\]; they must be uint8 or uint16 \[40\]"):
        look_up(module.packed, row_format, ONE, module.clusters.repeat(1, 3), module.codebooks)
    with pytest.raises(ValueError, match="the clustered layout needs clusters and codebooks"):
        look_up(module.packed, row_format, ONE, None, module.codebooks)
    with pytest.raises(
        ValueError, match="clusters and codebooks are given, which the uniform layout lacks; leave them out"
    ):
        look_up(BAG.packed, str(BAG.row_format), ONE, module.clusters, module.codebooks)


def test_damaged_clusters_are_named():
    module = PackedEmbedding.from_table(make_table("kmeans-cls:K=3"))
    module.clusters[7] = 200
    with pytest.raises(embpack.FormatError, match="row 7 is of cluster 200, but the table has 3 codebooks"):
        module(torch.tensor([1, 7]))


def test_no_bags_and_no_rows():
    empty = torch.empty(0, dtype=torch.int64)
    assert BAG(empty, empty).shape == (0, DIM)
    assert torch.equal(BAG(empty, torch.tensor([0, 0])), torch.zeros(2, DIM))
    nothing = PackedEmbeddingBag(0, DIM)
    assert torch.equal(nothing(empty, ONE), torch.zeros(1, DIM))
    with pytest.raises(IndexError, match=r"indices\[0\] is 0, but the table has 0 rows"):
        nothing(ONE, ONE)


# What PyTorch has itself


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_rows_go_to_pytorchs_operators_and_back(bits):
    """The bytes are the same, both ways, and nothing is copied."""
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((ROWS, DIM), dtype=np.float32))
    prepack = getattr(torch.ops.quantized, f"embedding_bag_{'byte' if bits == 8 else f'{bits}bit'}_prepack")
    theirs = prepack(weight)
    table = embpack.PackedTable.from_packed(theirs.numpy(), DIM, bits=bits)
    assert np.shares_memory(table.packed, theirs.numpy())
    ours = PackedEmbeddingBag.from_table(embpack.quantize(weight, "asym", bits=bits), mode="sum")
    assert torch.equal(ours.packed, theirs)
    indices, offsets = make_bags()
    name = f"embedding_bag_{'byte' if bits == 8 else f'{bits}bit'}_rowwise_offsets"
    pooled = getattr(torch.ops.quantized, name)(ours.packed, indices, offsets)
    # Theirs rounds scale times weight and adds biases by themselves: three roundings a row of sums below 30 * 4.
    torch.testing.assert_close(pooled, ours(indices, offsets), rtol=0, atol=3 * 30 * 30 * 4 * 2**-24)


def test_models_compile_by_inductor():
    packed = PackedEmbeddingBag.from_table(make_table("kmeans-cls:K=3"), mode="mean", padding_idx=1)
    model = nn.Sequential(packed, nn.Linear(DIM, 3), nn.ReLU())
    square = make_bags()[0].reshape(5, 6)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(square), model(square))
    embedding = PackedEmbedding.from_table(make_table())
    doubled = torch.compile(lambda indices: 2 * embedding(indices), fullgraph=True, dynamic=True)
    for count in (3, 30):
        assert torch.equal(doubled(torch.arange(count)), 2 * embedding(torch.arange(count)))


def test_compiled_ahead_of_time_operators_are_loaded(tmp_path):
    model = nn.Sequential(PackedEmbeddingBag.from_table(make_table(), mode="mean"), nn.Linear(DIM, 3)).eval()
    square = make_bags()[0].reshape(5, 6)
    with torch.no_grad():
        program = torch.export.export(model, (square,))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch, by PyTorch
            path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
            loaded = torch._inductor.aoti_load_package(path)
        torch.testing.assert_close(loaded(square), model(square))


@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64])
def test_indices_and_offsets_may_be_of_two_types(offsets_dtype):
    indices, offsets = make_bags()
    weights = torch.rand(30, requires_grad=True)
    wanted = BAG(indices, offsets, weights)
    indices = indices.int() if offsets_dtype == torch.int64 else indices
    found = BAG(indices, offsets.to(offsets_dtype), weights)
    assert torch.equal(found, wanted)
    assert torch.equal(BAG(indices[::2], offsets[:1].to(offsets_dtype)), BAG(indices[::2].long(), offsets[:1].long()))
    by_one, by_two = (torch.autograd.grad(out.sum(), weights)[0] for out in (wanted, found))
    assert torch.equal(by_one, by_two)


@pytest.mark.parametrize("transform", [torch.func.jacfwd, lambda f: lambda w: torch.func.jvp(f, (w,), (w,))])
def test_derivatives_in_forward_mode_are_refused(transform):
    indices, offsets = make_bags()
    with pytest.raises(NotImplementedError, match=r"forward-mode derivatives .* use backward\(\)"):
        transform(lambda weights: BAG(indices, offsets, weights))(torch.rand(30))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        BAG(indices, offsets, torch.autograd.forward_ad.make_dual(torch.rand(30), torch.ones(30)))


@pytest.mark.parametrize("module", [PackedEmbedding(3, 4), PackedEmbeddingBag(3, 4)])
def test_a_table_takes_no_gradients(module):
    assert not list(module.parameters())
    with pytest.raises(RuntimeError, match="only Tensors of floating point"):
        module.packed.requires_grad_()


def test_indices_on_another_device_are_refused():
    embedding = PackedEmbedding.from_table(make_table())
    for module in (embedding, BAG):
        with pytest.raises(ValueError, match="the table is on cpu, indices on meta; both must be on the CPU"):
            module(torch.zeros((2, 2), dtype=torch.int64, device="meta"))
    for name, arguments in (
        ("offsets", (ONE.to("meta"),)),
        ("per_sample_weights", (ONE, torch.ones(1, device="meta"))),
    ):
        with pytest.raises(ValueError, match=f"the table is on cpu, {name} on meta; both must be on the CPU"):
            BAG(ONE, *arguments)
    on_meta = copy.deepcopy(embedding).to("meta")
    assert on_meta(torch.zeros(3, dtype=torch.int64, device="meta")).shape == (3, DIM)
    with pytest.raises(ValueError, match="the table is on meta, indices on cpu"):
        on_meta(torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("options", [{}, {"padding_idx": -1}, {"dtype": torch.float64}])
@pytest.mark.parametrize("index", [3, 50])
def test_operators_keep_nothing_of_what_they_were_given(options, index):
    """What kernels answer themselves, what they leave to Python, and what is refused."""
    table = embpack.quantize(np.random.default_rng(0).standard_normal((50, 16)).astype(np.float32))
    given = [PackedEmbeddingBag.from_table(table).packed, torch.full((4,), index), torch.tensor([0, 2])]
    owners = [tensor._use_count() for tensor in given]
    packed, indices, offsets = given
    try:
        found = torch.ops.embpack.embedding_bag(packed, str(table.row_format), indices, offsets, "sum", **options)
        assert found._use_count() == torch.zeros(1)._use_count()
    except IndexError:
        assert index == 50
    assert [tensor._use_count() for tensor in given] == owners


def test_an_output_that_memory_cannot_hold_is_pytorch_s_error():
    dim = 1 << 20
    table = embpack.PackedTable(np.zeros((1, dim // 2 + 4), np.uint8), embpack.layouts.RowFormat(dim))
    packed, row_format = torch.from_numpy(table.packed), str(table.row_format)
    with pytest.raises(RuntimeError, match="allocate"):
        torch.ops.embpack.embedding(packed, row_format, torch.zeros(1 << 24, dtype=torch.int64))


def test_a_pytorch_without_the_stable_abi_is_told_what_it_lacks():
    with pytest.raises(ImportError, match=r"needs PyTorch 2\.13.*aoti_torch_library_init_impl"):
        _native.register_operators(_native.__file__, print, print, print, print)
    module = PackedEmbedding.from_table(make_table())
    assert module(torch.arange(3)).shape == (3, DIM)  # by the functions that were found before
