"""embpack.torch.PackedLinear and the operators beneath it, against nn.Linear over the same values."""

import copy
import mmap
import pickle
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.nn import functional

import embpack
from embpack.formats import mapped
from embpack.torch import PackedEmbedding, PackedEmbeddingBag, PackedLinear, load_checkpoint, quantize_

ROWS, DIM = 70, 24
TABLES = {
    "uniform": {"method": "asym"},
    "2 bits": {"method": "asym", "bits": 2},
    "8 bits": {"method": "asym", "bits": 8},
    "float32": {"method": "asym", "param_dtype": "float32"},
    "codebook": {"method": "kmeans-lloyd"},
    "clustered": {"method": "kmeans-cls:K=3"},
    "trellis": {"method": "trellis", "bits": 3.5},
    "rotated": {"method": "asym", "rotate": "hadamard"},
}
# Vectors and rows have values below 6, products below 36. Float32 sums of DIM of them, in another order; and what 16
# bits round, rows and sums, which are below 64.
ERRORS = {
    torch.float64: DIM * DIM * 36 * 2**-24,
    torch.float32: DIM * DIM * 36 * 2**-24,
    torch.float16: DIM * 36 * 2**-11 + 64 * 2**-11,
    torch.bfloat16: DIM * 36 * 2**-8 + 64 * 2**-8,
}


@cache
def make_table(kind: str) -> embpack.PackedTable:
    weight = np.random.default_rng(0).standard_normal((ROWS, DIM), dtype=np.float32)
    return embpack.quantize(weight, **TABLES[kind])


def make_layer(kind: str = "uniform", *, bias: bool = True) -> PackedLinear:
    return PackedLinear.from_table(make_table(kind), torch.linspace(-1, 1, ROWS) if bias else None)


def vectors(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture
def small_tiles(monkeypatch):
    """Of 16 rows, for two threads; the table takes five of them."""
    monkeypatch.setattr("embpack.torch.linear_ops._TILE_BYTES", 16 * DIM * 4 // 2)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)


@pytest.mark.parametrize(("dtype", "has_bfloat16"), [*((dtype, False) for dtype in ERRORS), (torch.bfloat16, True)])
@pytest.mark.parametrize("kind", TABLES)
def test_values_are_those_of_the_float_layer(kind, dtype, has_bfloat16, small_tiles, monkeypatch):
    monkeypatch.setattr("embpack.torch.linear_ops._has_bfloat16", lambda: has_bfloat16)
    for layer in (make_layer(kind), make_layer(kind, bias=False)):
        wanted = layer.to_float().double()
        for shape in ((), (3,), (65,), (2, 20), (2, 0, 3)):
            input = vectors(*shape, dtype=dtype)
            found = layer(input)
            assert found.dtype == dtype and found.shape == (*shape, ROWS) and found.is_contiguous()
            torch.testing.assert_close(found.double(), wanted(input.double()), rtol=0, atol=ERRORS[dtype])


def test_the_system_reads_ahead_of_large_layers(tmp_path, monkeypatch):
    """All of their rows are read each time; a page at a time the first product would take 20 times as long."""
    embpack.save(tmp_path / "head.safetensors", {"head": make_table("uniform")})
    advices = []
    monkeypatch.setattr(mapped, "_LARGE_BYTES", 0)
    monkeypatch.setattr(mapped, "_advise", lambda array, advice: advices.append((array.nbytes, advice)))
    table = embpack.load(tmp_path / "head.safetensors")["head"]
    PackedEmbedding.from_table(table)
    assert advices == [(table.nbytes, mmap.MADV_RANDOM)]
    PackedLinear.from_table(table)
    assert advices[1:] == [(table.nbytes, mmap.MADV_NORMAL)]


def test_inputs_may_lie_in_memory_as_they_like():
    layer = make_layer()
    for count in (3, 40):
        input = vectors(count)
        wanted = layer(input)
        assert torch.equal(layer(input.T.contiguous().T), wanted)
        assert torch.equal(layer(torch.stack([input, input], 1)[:, 1]), wanted)
    jagged = torch.nested.nested_tensor([vectors(2), vectors(3)], layout=torch.jagged)
    assert torch.equal(layer(jagged).values(), layer(torch.cat([vectors(2), vectors(3)])))


@pytest.mark.parametrize("kind", ["uniform", "trellis", "clustered"])
def test_gradients_are_derivatives(kind):
    """float64 has only sums in float64, of the same rows: gradcheck sees no other rounding."""
    layer = make_layer(kind, bias=False)
    input = vectors(2, dtype=torch.float64).requires_grad_()
    bias = torch.zeros(ROWS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer.multiply, (input, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(layer.multiply, (input, bias), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["uniform", "rotated"])
def test_backward_reaches_the_input_and_the_bias(kind, dtype):
    packed = make_layer(kind)
    gradients = []
    for layer in (packed, copy.deepcopy(packed).to_float()):
        layer.to(dtype)
        input = vectors(2, 9, dtype=dtype).requires_grad_()
        layer(input).float().pow(2).sum().backward()
        gradients.append((input.grad, layer.bias.grad))
    for found, wanted in zip(*gradients, strict=True):
        assert found.dtype == dtype
        # Each is a sum of up to ROWS products of two numbers, both of which 8 or 24 bits have rounded before.
        torch.testing.assert_close(
            found,
            wanted,
            rtol=4e-2 if dtype == torch.bfloat16 else 1e-5,
            atol=wanted.abs().max().item() * (2**-7 if dtype == torch.bfloat16 else 1e-6),
        )


def test_only_what_wants_gradients_gets_them():
    layer = make_layer()
    layer.bias.requires_grad_(requires_grad=False)
    assert not layer(vectors(2)).requires_grad
    input = vectors(2).requires_grad_()
    layer(input).sum().backward()
    assert layer.bias.grad is None and input.grad is not None
    frozen = make_layer()
    frozen(vectors(2)).sum().backward()
    assert torch.equal(frozen.bias.grad, torch.full((ROWS,), 2.0))


@pytest.mark.parametrize(("kind", "count"), [("uniform", 2), ("trellis", 20), ("clustered", 2)])
def test_operators_keep_pytorchs_contract(kind, count):
    layer = make_layer(kind)
    shared = (layer.clusters, layer.codebooks)
    for input in (vectors(count).requires_grad_(), vectors(2, count)):
        arguments = (layer.packed, str(layer.row_format), input, layer.bias, *shared)
        torch.library.opcheck(torch.ops.embpack.linear.default, arguments)
    gradient = torch.randn(count, ROWS, requires_grad=True)
    arguments = (layer.packed, str(layer.row_format), gradient, *shared)
    torch.library.opcheck(torch.ops.embpack.linear_by_input.default, arguments)


class Tied(nn.Module):
    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ROWS, DIM)
        self.body = nn.Linear(DIM, DIM)
        self.head = nn.Linear(DIM, ROWS, bias=bias)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.body(self.embedding(tokens))
        return self.head(hidden.to(self.head.weight.dtype))


def make_tied(*, bias: bool = False, **options: object) -> Tied:
    torch.manual_seed(0)
    model = Tied(bias=bias).eval()
    quantize_(model, tied="share", **options)
    return model


TOKENS = torch.arange(12).reshape(3, 4)


def test_models_compile_and_export_whole():
    model = make_tied(bias=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(TOKENS), model(TOKENS))
    compiled(TOKENS).sum().backward()
    wanted = copy.deepcopy(model)
    wanted.zero_grad()
    wanted(TOKENS).sum().backward()
    torch.testing.assert_close(model.body.weight.grad, wanted.body.weight.grad)
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(model, (TOKENS,), dynamic_shapes=({0: batch},))
        assert "embpack.linear.default" in str(program.graph)
        more = torch.arange(20).reshape(5, 4)
        torch.testing.assert_close(program.module()(more), model(more))


def test_a_traced_model_has_the_layer_itself():
    model = nn.Sequential(make_layer())
    traced = torch.fx.symbolic_trace(model)
    assert isinstance(traced.get_submodule("0"), PackedLinear)
    assert torch.equal(traced(vectors(3)), model(vectors(3)))


@pytest.mark.parametrize("kind", TABLES)
def test_a_state_dict_fills_an_empty_layer(kind):
    layer = make_layer(kind)
    table, row_format = layer.table, layer.row_format
    empty = PackedLinear(
        DIM,
        ROWS,
        bits=row_format.bits,
        param_dtype=row_format.param_dtype,
        layout=row_format.layout,
        rotation=row_format.rotation,
        num_codebooks=0 if table.codebooks is None else len(table.codebooks),
    )
    assert torch.equal(empty.packed, torch.zeros_like(layer.packed)) and not empty.bias.any()
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(vectors(3)), layer(vectors(3)))
    assert repr(empty) == repr(layer) and "in_features=24, out_features=70, bias=True" in repr(layer)
    for twin in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert torch.equal(twin(vectors(3)), layer(vectors(3)))
    other = PackedLinear(DIM, ROWS, layout="codebook")
    with pytest.raises(RuntimeError, match=r"the rows are .* but the module reads"):
        other.load_state_dict(make_layer("uniform").state_dict())


def test_from_float_packs_what_quantize_packs():
    linear = nn.Linear(DIM, ROWS)
    packed = PackedLinear.from_float(linear, "greedy", bits=8)
    np.testing.assert_array_equal(packed.table.packed, embpack.quantize(linear.weight, "greedy", bits=8).packed)
    assert packed.bias is linear.bias
    assert PackedLinear.from_float(nn.Linear(DIM, ROWS, bias=False)).bias is None
    back = packed.to_float()
    assert type(back) is nn.Linear and torch.equal(back.weight, packed.weight) and back.bias is linear.bias


def test_what_is_wrong_is_said():
    layer = make_layer()
    with pytest.raises(TypeError, match=r"PackedLinear\.from_float takes an nn\.Linear, not an Embedding"):
        PackedLinear.from_float(nn.Embedding(3, 4))
    with pytest.raises(TypeError, match=r"takes an embpack\.PackedTable, not a Tensor"):
        PackedLinear.from_table(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"bias has shape \[3\]; the table's rows need \[70\]"):
        PackedLinear.from_table(make_table("uniform"), torch.zeros(3))
    with pytest.raises(TypeError, match="input is a list; it must be a tensor"):
        layer([1.0] * DIM)
    with pytest.raises(NotImplementedError, match=r"forward-mode derivatives .* of embpack::linear; use backward"):
        torch.func.jvp(layer, (vectors(2),), (vectors(2),))
    multiply = torch.ops.embpack.linear
    for input, bias, error, message in (
        (torch.zeros(2, DIM, dtype=torch.int64), None, TypeError, "input is torch.int64; it must be torch.float32"),
        (torch.zeros(2, 3), None, ValueError, r"input has shape \[2, 3\]; the table needs 24 values in its last axis"),
        (torch.tensor(1.0), None, ValueError, r"input has shape \[\]"),
        (vectors(2), torch.zeros(3), ValueError, r"bias is torch.float32 of shape \[3\]; .* shape \[70\]"),
    ):
        with pytest.raises(error, match=message):
            multiply(layer.packed, str(layer.row_format), input, bias)
        with pytest.raises(error, match=message), torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            multiply(layer.packed, str(layer.row_format), input, bias)
    with pytest.raises(ValueError, match=r"gradient has shape \[2, 24\]; the table needs 70"):
        torch.ops.embpack.linear_by_input(layer.packed, str(layer.row_format), vectors(2))


def test_damaged_clusters_are_named():
    layer = copy.deepcopy(make_layer("clustered"))
    layer.clusters[5] = 200
    for count in (1, 20):
        with pytest.raises(embpack.FormatError, match="row 5 is of cluster 200, but the table has 3 codebooks"):
            layer(vectors(count))


# weight: what a float module has


PACKED = {
    "linear": make_layer,
    "embedding": lambda: PackedEmbedding.from_table(make_table("uniform")),
    "bag": lambda: PackedEmbeddingBag.from_table(make_table("uniform")),
}


@pytest.mark.parametrize("module", PACKED)
def test_a_weight_can_be_read_as_a_float_modules(module):
    packed = PACKED[module]()
    rows = torch.from_numpy(make_table("uniform").dequantize())
    weight = packed.weight
    assert isinstance(weight, torch.Tensor) and "PackedWeight" in repr(weight)
    assert (weight.shape, weight.dtype, weight.device.type) == ((ROWS, DIM), torch.float32, "cpu")
    assert not weight.requires_grad and len(weight) == ROWS and weight.is_contiguous()
    assert torch.equal(weight, rows) and torch.equal(weight[3], rows[3]) and torch.equal(weight.data.T, rows.T)
    assert torch.equal(weight.detach().clone(), rows) and torch.equal(torch.cat([weight, weight])[ROWS:], rows)
    assert weight.tolist() == rows.tolist() and torch.equal(copy.deepcopy(weight), rows)
    np.testing.assert_array_equal(np.asarray(weight), rows.numpy())
    np.testing.assert_array_equal(weight.numpy(), rows.numpy())
    assert torch.equal(functional.embedding(torch.tensor([1, 2]), weight), rows[1:3])
    for made in (weight[3], weight.T, weight + 1, weight.to(torch.float16)):
        assert type(made) is torch.Tensor
    assert packed.bfloat16().weight.dtype == torch.bfloat16
    assert "weight" not in dict(packed.named_parameters()) and "weight" not in packed.state_dict()


@pytest.mark.parametrize("module", PACKED)
def test_functional_linear_multiplies_by_packed_rows(module, monkeypatch):
    packed, bias = PACKED[module](), torch.ones(ROWS)
    wanted = functional.linear(vectors(20), packed.weight.clone(), bias)
    monkeypatch.setattr(type(packed), "unpack", lambda self: pytest.fail("all rows are unpacked"))
    for found in (
        functional.linear(vectors(20), packed.weight, bias),
        functional.linear(input=vectors(20), weight=packed.weight, bias=bias),
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=ERRORS[torch.float32])
    assert packed.weight.shape == (ROWS, DIM)


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.zero_(),
        lambda weight: weight.data.normal_(),
        lambda weight: weight.__setitem__(3, 0.0),
        lambda weight: weight.data.__setitem__(slice(3), 0.0),
        lambda weight: weight.copy_(torch.zeros(ROWS, DIM)),
        lambda weight: nn.init.normal_(weight),
        lambda weight: torch.add(torch.zeros(ROWS, DIM), 1, out=weight),
    ],
)
def test_a_weight_is_not_written_to(write):
    layer = make_layer()
    before = layer.packed.clone()
    with pytest.raises(TypeError, match=r"the weight of a PackedLinear is packed rows, .*: write to the float weight"):
        write(layer.weight)
    with pytest.raises(TypeError, match="which cannot be written to"):
        layer.weight = nn.Parameter(torch.zeros(ROWS, DIM))
    assert torch.equal(layer.packed, before)


def test_a_weight_is_copied_into_others():
    layer, other = make_layer(), torch.empty(ROWS, DIM)
    other[:] = layer.weight
    assert torch.equal(other, layer.weight)
    assert torch.equal(torch.empty(ROWS, DIM).copy_(layer.weight), layer.weight)


# tied="share"


def memory_of(model: nn.Module) -> int:
    """Bytes of the storages of a model's tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


@pytest.mark.parametrize("options", [{}, {"method": "trellis", "bits": 3}, {"method": "kmeans-cls:K=3"}])
def test_an_output_layer_shares_the_packed_rows(options):
    torch.manual_seed(0)
    model = Tied(bias=True).eval()
    bias = model.head.bias
    report = quantize_(model, tied="share", **options)
    assert isinstance(model.embedding, PackedEmbedding) and isinstance(model.head, PackedLinear)
    assert model.head.bias is bias and not model.head.training
    table = model.embedding.table
    for name in ("packed", "clusters", "codebooks"):
        assert getattr(model.head, name) is getattr(model.embedding, name)
    body = (DIM * DIM + DIM + ROWS) * 4
    assert report.bytes_before == ROWS * DIM * 4 + body
    # Beside the one table, each of the two modules has the name of its row format.
    assert report.bytes_after == memory_of(model) == table.nbytes + body + 2 * 64
    assert [(each.name, each.bytes_after) for each in report.tables] == [("embedding", table.nbytes), ("head", 0)]
    assert report.untied == () and "larger" not in str(report)
    wanted = copy.deepcopy(model)
    wanted.embedding, wanted.head = model.embedding.to_float(), model.head.to_float()
    torch.testing.assert_close(model(TOKENS), wanted(TOKENS), rtol=0, atol=ERRORS[torch.float32])


def test_shared_rows_stay_one_tensor(tmp_path):
    model = make_tied()
    assert memory_of(copy.deepcopy(model)) == memory_of(pickle.loads(pickle.dumps(model))) == memory_of(model)
    model.half().float().to("cpu")
    assert model.head.packed is model.embedding.packed
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert state["head.packed"].data_ptr() == state["embedding.packed"].data_ptr()
    save_model(model, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size < memory_of(model) + 1000
    torch.manual_seed(1)
    other = Tied().eval()
    quantize_(other, tied="share")
    load_model(other, tmp_path / "model.safetensors")
    assert torch.equal(other(TOKENS), model(TOKENS)) and other.head.packed is other.embedding.packed
    other.load_state_dict(state)
    assert torch.equal(other(TOKENS), model(TOKENS))


@pytest.mark.parametrize("save", [save_model, lambda model, path: save_model(model.bfloat16(), path)])
@pytest.mark.parametrize("options", [{}, {"method": "trellis"}, {"method": "kmeans-cls:K=3", "rotate": "hadamard"}])
def test_load_checkpoint_opens_what_a_packed_model_was_saved_as(tmp_path, save, options):
    model = make_tied(bias=True, **options)
    save(model, tmp_path / "model.safetensors")
    with torch.device("meta"):
        opened = Tied(bias=True).eval()
    load_checkpoint(opened, tmp_path / "model.safetensors", tied="share")
    assert isinstance(opened.head, PackedLinear) and opened.head.packed is opened.embedding.packed
    assert opened.embedding.dtype == model.embedding.dtype
    assert torch.equal(opened(TOKENS), model(TOKENS))
    with torch.device("meta"):
        refused = Tied(bias=True)
    with pytest.raises(ValueError, match=r"is also embedding\.weight, which is packed: pass tied='share'"):
        load_checkpoint(refused, tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["embedding.weight", "head.weight"])
def test_load_checkpoint_shares_a_table_that_embpack_packed(tmp_path, name):
    """A file may have the weight under either name."""
    torch.manual_seed(0)
    trained = Tied(bias=True)
    state = {key: value for key, value in trained.state_dict().items() if key in (name, "head.bias") or "body" in key}
    torch.save(state, tmp_path / "float.pt")
    embpack.quantize_file(tmp_path / "float.pt", tmp_path / "packed.safetensors", include=[name])
    with torch.device("meta"):
        model = Tied(bias=True).eval()
    load_checkpoint(model, tmp_path / "packed.safetensors", tied="share")
    assert model.head.packed is model.embedding.packed
    assert torch.equal(model.head.bias, trained.head.bias)
    assert torch.equal(model(TOKENS), make_tied(bias=True)(TOKENS))
    lacking = {key: value for key, value in state.items() if key != "head.bias"}
    torch.save(lacking, tmp_path / "lacking.pt")
    embpack.quantize_file(tmp_path / "lacking.pt", tmp_path / "lacking.safetensors", include=[name])
    with torch.device("meta"):
        model = Tied(bias=True)
    with pytest.raises(ValueError, match=r"it lacks head\.bias$"):
        load_checkpoint(model, tmp_path / "lacking.safetensors", tied="share")


def test_a_damaged_state_is_named(tmp_path):
    model = make_tied()
    state = dict(model.state_dict())
    del state["head.packed"], state["head.row_format_ascii"]
    for name, value, message in (
        ("embedding.packed", state["embedding.packed"][:, :-1], r"packed has 15 bytes a row, but"),
        ("embedding.row_format_ascii", torch.zeros(64, dtype=torch.uint8), r"row format is ''; it has layout"),
        ("embedding.packed", torch.zeros(3), r"packed is float32 of shape \[3\]"),
    ):
        save_file({**state, name: value.contiguous()}, tmp_path / "damaged.safetensors")
        with pytest.raises(embpack.FormatError, match=rf"damaged\.safetensors: embedding: {message}"):
            load_checkpoint(Tied(), tmp_path / "damaged.safetensors", tied="share")


class Scaled(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: setattr(model, "head", Scaled(DIM, ROWS)),
            "of a Scaled, and only nn.Linear can have packed rows",
        ),
        (
            lambda model: setattr(model.head, "scale", 2.0),
            "of a Linear with scale, which a packed module would not have",
        ),
        (lambda model: model.head.register_forward_hook(print), "of a Linear with hooks"),
    ],
)
def test_a_layer_that_cannot_share_is_named(tmp_path, change, message):
    model = Tied()
    change(model)
    model.head.weight = model.embedding.weight
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=rf"^embedding\.weight is also head\.weight, {message}.*: pass tied='untie'"):
        quantize_(model, tied="share")
    assert dict(model.named_modules()) == before
    torch.save(Tied().state_dict(), tmp_path / "float.pt")
    save_model(make_tied(), tmp_path / "packed.safetensors")
    with pytest.raises(ValueError, match=rf"^embedding\.weight is also head\.weight, {message}"):
        load_checkpoint(model, tmp_path / "packed.safetensors", tied="share")
    assert dict(model.named_modules()) == before


def test_a_weight_of_the_model_itself_cannot_be_shared(tmp_path):
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(ROWS, DIM)
            self.output = self.embedding.weight

    model, message = Functional(), r"^embedding\.weight is also output, of a Functional, and only nn\.Linear can"
    with pytest.raises(ValueError, match=message):
        quantize_(model, tied="share")
    save_model(model, tmp_path / "float.safetensors")
    [name] = load_file(tmp_path / "float.safetensors")
    embpack.quantize_file(tmp_path / "float.safetensors", tmp_path / "packed.safetensors", include=[name])
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model, tmp_path / "packed.safetensors", tied="share")


def test_without_tied_weights_share_changes_nothing():
    model = nn.ModuleDict({"embedding": nn.Embedding(ROWS, DIM), "head": nn.Linear(DIM, ROWS)})
    report = quantize_(model, tied="share")
    assert type(model["head"]) is nn.Linear and [table.name for table in report.tables] == ["embedding"]


# Half of the float table fits beside the packed one.
LITTLE_MEMORY = """
import resource, torch, embpack, numpy as np
from embpack.torch import PackedLinear

embpack.set_num_threads(1)
torch.set_num_threads(1)
rows, dim = 150_000, 256  # 154 MB of float32
packed = np.random.default_rng(0).integers(0, 256, (rows, 132), np.uint8)
packed[:, 128:] = np.float16([0.01, -0.1]).view(np.uint8)
layer = PackedLinear.from_table(embpack.PackedTable.from_packed(packed, embedding_dim=dim))


def run():
    for count, dtype in ((1, torch.float32), (16, torch.float32), (16, torch.bfloat16)):
        input = torch.ones(count, dim, dtype=dtype, requires_grad=True)
        layer(input).sum().backward()


run()  # so that the buffers of BLAS are there
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 75_000_000,) * 2)
run()
try:
    layer.to_float()
    print("the limit holds nothing back")
except (MemoryError, RuntimeError):
    print("done")
"""


def test_no_float_table_is_made():
    done = subprocess.run([sys.executable, "-c", LITTLE_MEMORY], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr
