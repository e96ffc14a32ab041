import subprocess
import sys

import numpy as np
import pytest
from hard_rows import hard_rows

import embpack
from embpack.errors import MissingExtraError
from embpack.layouts import PARAM_BYTES

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from embpack.onnx import OPSET, export_model, files  # noqa: E402
from embpack.torch import PackedEmbedding, PackedEmbeddingBag, PackedEmbeddingBagCollection, quantize_  # noqa: E402

# PyTorch's exporter says so where two dimensions have one name, to say that they are equal.
pytestmark = pytest.mark.filterwarnings("ignore:# The axis name")

METHODS = {"uniform": "greedy", "codebook": "kmeans-lloyd", "clustered": "kmeans-cls:K=4"}
MODES = ("sum", "mean", "max")
FORMATS = [(layout, bits, dtype) for layout in METHODS for bits in (2, 4, 8) for dtype in PARAM_BYTES]
PADDING = 3
ROWS, DIM = 40, 13


def hard_table(layout, bits, param_dtype, embedding_dim=DIM):
    weight = np.stack(list(hard_rows(embedding_dim, bits, param_dtype).values()))
    return embpack.quantize(weight, METHODS[layout], bits=bits, param_dtype=param_dtype)


def normal_table(seed=0, rows=ROWS, embedding_dim=DIM, **options):
    return embpack.quantize(
        np.random.default_rng(seed).standard_normal((rows, embedding_dim), dtype=np.float32), **options
    )


def export(model, args, path, **options):
    """Exports a model, looks at the file, and opens it as most users do."""
    export_model(model.eval(), args, path, **options)
    onnx.checker.check_model(path, full_check=True)
    assert_standard(onnx.load(path, load_external_data=False))
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def assert_standard(model):
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]
    assert not model.functions
    assert {node.domain for node in iter_nodes(model.graph)} == {""}


def iter_nodes(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from iter_nodes(attribute.g)


def run(session, *inputs):
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, (np.asarray(value) for value in inputs), strict=True)))


def run_torch(model, *inputs):
    with torch.no_grad():
        outputs = model(*inputs)
    return [value.numpy() for value in (outputs if isinstance(outputs, list | tuple) else [outputs])]


def assert_same_bits(ours, theirs):
    assert ours.dtype == theirs.dtype == np.float32
    assert ours.shape == theirs.shape
    assert (ours.view(np.uint32) == theirs.view(np.uint32)).all()


def assert_same(ours, theirs, mode):
    """To the bit; but of 0 and -0 either is the largest."""
    if mode == "max":
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs, strict=True)
    else:
        assert_same_bits(ours, theirs)


class All(nn.Module):
    """Many modules on the same inputs."""

    def __init__(self, modules):
        super().__init__()
        self.each = nn.ModuleList(modules)

    def forward(self, *inputs):
        return [module(*inputs) for module in self.each]


def dynamic(*inputs):
    """Every dimension of every input."""
    return (tuple(dict.fromkeys(range(value.dim()), torch.export.Dim.DYNAMIC) for value in inputs),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("formats")


@pytest.fixture(scope="module")
def embeddings(folder):
    model = All([PackedEmbedding.from_table(hard_table(*row_format)) for row_format in FORMATS])
    args = (torch.zeros((2, 3), dtype=torch.int64),)
    return model, export(model, args, folder / "embeddings.onnx", dynamic_shapes=dynamic(*args))


@pytest.mark.parametrize("shape", [(4, 5), (1, 1), (7, 0), (0, 2)])
def test_embeddings_of_every_format(embeddings, shape):
    model, session = embeddings
    indices = torch.arange(np.prod(shape)).reshape(shape)
    for ours, theirs in zip(run(session, indices), run_torch(model, indices), strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_modules_of_other_types_return_theirs(tmp_path, dtype):
    """Bits of bfloat16, which NumPy lacks, are read as those of float32."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = PackedEmbedding.from_table(hard_table(*FORMATS[0])).to(dtype)
            self.bag = PackedEmbeddingBag.from_table(hard_table(*FORMATS[0]), mode="sum").to(dtype)

        def forward(self, indices, weights):
            found = self.rows(indices), self.bag(indices), self.bag(indices, None, weights.to(dtype))
            assert all(values.dtype == dtype for values in found)
            return [values.float() for values in found]

    model, args = Model(), (torch.arange(6).reshape(2, 3), torch.ones(2, 3))
    session = export(model, args, tmp_path / "model.onnx")
    for ours, theirs in zip(run(session, *args), run_torch(model, *args), strict=True):
        assert_same_bits(ours, theirs)


@pytest.fixture(scope="module", params=MODES)
def bags(folder, request):
    tables = [hard_table(*row_format) for row_format in FORMATS]
    model = All([PackedEmbeddingBag.from_table(table, mode=request.param) for table in tables])
    args = (torch.arange(10), torch.tensor([0, 2, 7]))
    path = folder / f"{request.param}.onnx"
    return request.param, model, export(model, args, path, dynamic_shapes=dynamic(*args))


@pytest.mark.parametrize("offsets", [[0], [0, 0, 5, 5, 16, 17, 17], []])
def test_bags_of_every_format(bags, offsets):
    mode, model, session = bags
    inputs = torch.arange(17 if offsets else 0), torch.tensor(offsets, dtype=torch.int64)
    for ours, theirs in zip(run(session, *inputs), run_torch(model, *inputs), strict=True):
        assert_same(ours, theirs, mode)


INDICES = [5, 3, 3, 0, 9, 9, 3, 39, 3, 3, 1, 2, 3, 8]
# Bags: none, of padding alone, with padding, without.
OFFSETS = [0, 0, 2, 5, 5, 8, 10, 14, 14]
FORMS = {
    "offsets": [
        (INDICES, OFFSETS),
        (INDICES[:1], [0]),
        ([], [0, 0, 0]),
        ([3, 3, 3], [0, 1]),
    ],
    "offsets that end the last bag": [
        (INDICES, OFFSETS),
        (INDICES[:7], [0, 4, 4, 7]),
        ([], [0]),
        ([], [0, 0]),
    ],
    "rows": [
        (np.reshape(INDICES, (7, 2)).tolist(),),
        (np.reshape(INDICES, (2, 7)).tolist(),),
        (np.reshape(INDICES, (1, 14)).tolist(),),
        ([[3], [4]],),
        ([[], [], []],),
    ],
}


@pytest.fixture(scope="module", params=FORMS)
def form(request):
    return request.param


@pytest.fixture(scope="module", params=["int64", "int32"])
def index_dtype(request):
    return getattr(torch, request.param)


def make_inputs(values, dtype):
    return tuple(torch.tensor(value, dtype=dtype) for value in values)


def example(form, dtype):
    args = ([[1, 2, 3], [4, 5, 6]],) if form == "rows" else ([1, 2, 3, 4, 5], [0, 2, 3])
    return make_inputs(args, dtype)


OPTIONS = [(mode, padding_idx) for mode in MODES for padding_idx in (None, PADDING, -ROWS)]


@pytest.fixture(scope="module")
def every_option(tmp_path_factory, form, index_dtype):
    last = form != "offsets"  # which means nothing to rows
    model = All(
        [
            PackedEmbeddingBag.from_table(normal_table(), mode=mode, padding_idx=padding_idx, include_last_offset=last)
            for mode, padding_idx in OPTIONS
        ]
    )
    args = example(form, index_dtype)
    path = tmp_path_factory.mktemp("options") / "model.onnx"
    return model, export(model, args, path, dynamic_shapes=dynamic(*args))


def test_every_option(every_option, form, index_dtype):
    model, session = every_option
    for values in FORMS[form]:
        inputs = make_inputs(values, index_dtype)
        outputs = zip(OPTIONS, run(session, *inputs), run_torch(model, *inputs), strict=True)
        for (mode, _), ours, theirs in outputs:
            assert_same(ours, theirs, mode)


def test_negative_indices_of_the_padding_row_are_padding(every_option, form, index_dtype):
    _, session = every_option
    inputs = make_inputs(FORMS[form][0], index_dtype)
    for ours, theirs in zip(run(session, inputs[0] - ROWS, *inputs[1:]), run(session, *inputs), strict=True):
        np.testing.assert_array_equal(ours, theirs)


class Weighted(nn.Module):
    """Weights come last, with or without offsets; bags without padding, and with."""

    def __init__(self, **options):
        super().__init__()
        self.plain = PackedEmbeddingBag.from_table(normal_table(), mode="sum", **options)
        self.padded = PackedEmbeddingBag.from_table(normal_table(), mode="sum", padding_idx=PADDING, **options)

    def forward(self, *inputs):
        *bags, weights = inputs
        return [module(*bags, per_sample_weights=weights) for module in (self.plain, self.padded)]


def test_weighted_bags(tmp_path, rng, form):
    last = form != "offsets"  # which means nothing to rows
    model = Weighted(include_last_offset=last)
    bags = example(form, torch.int64)
    args = (*bags, torch.ones(bags[0].shape))
    session = export(model, args, tmp_path / "model.onnx", dynamic_shapes=dynamic(*args))
    absolute = Weighted(include_last_offset=last)
    for values in FORMS[form]:
        bags = make_inputs(values, torch.int64)
        weights = torch.from_numpy(rng.standard_normal(bags[0].shape, dtype=np.float32))
        ours, theirs = run(session, *bags, weights), run_torch(model, *bags, weights)
        for padding_idx, one, other in zip((None, PADDING), ours, theirs, strict=True):
            exact, magnitude = sum_exactly(absolute.plain.table, bags, weights, last, padding_idx)
            # A product is rounded once, and each of n - 1 additions: n roundings of each term (Higham 2002, 3.1).
            bound = 1.01 * max(1, bags[0].numel()) * 2.0**-24 * magnitude
            assert one.dtype == other.dtype == np.float32
            assert one.shape == other.shape == exact.shape
            assert (np.abs(one - exact) <= bound).all()
            assert (np.abs(other - exact) <= bound).all()


def sum_exactly(table, bags, weights, last, padding_idx):
    """Sums in float64, and of absolute values."""
    indices, *offsets = (value.numpy() for value in bags)
    starts = offsets[0] if offsets else np.arange(len(indices)) * indices.shape[1]
    ends = starts[1:] if offsets and last else [*starts[1:], indices.size]
    products = table.dequantize().astype(np.float64)[indices.ravel()] * weights.numpy().reshape(-1, 1)
    if padding_idx is not None:
        products[indices.ravel() == padding_idx] = 0
    bounds = list(zip(starts, ends, strict=False))
    sums = [np.array([rows[a:b].sum(axis=0) for a, b in bounds]) for rows in (products, np.abs(products))]
    return [values.reshape(len(bounds), DIM) for values in sums]


class Recommender(nn.Module):
    def __init__(self):
        super().__init__()
        self.user = nn.Embedding(1500, 16)
        self.items = nn.EmbeddingBag(2500, 24, mode="mean", padding_idx=PADDING)
        self.country = nn.Embedding(20, 8)
        self.hidden = nn.Linear(48, 32)
        self.score = nn.Linear(32, 1)

    def forward(self, user, items, offsets, country):
        features = torch.cat([self.user(user), self.items(items, offsets), self.country(country)], dim=1)
        hidden = self.hidden(features)
        return self.score(torch.relu(hidden)).squeeze(1), hidden, features


@pytest.fixture(scope="module", params=METHODS.values())
def recommender(tmp_path_factory, request):
    torch.manual_seed(0)
    model = Recommender()
    quantize_(model, request.param)
    args = (torch.tensor([1, 2]), torch.tensor([3, 4, 5]), torch.tensor([0, 1]), torch.tensor([7, 8]))
    path = tmp_path_factory.mktemp("recommender") / "model.onnx"
    names = ["user", "items", "offsets", "country"]
    shapes = {name: {0: size} for name, size in zip(names, ("batch", "length", "batch", "batch"), strict=True)}
    options = {"input_names": names, "output_names": ["score", "hidden", "features"], "dynamic_shapes": shapes}
    return model, export(model, args, path, **options), path


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_a_recommenders_values(rng, recommender, batch):
    model, session, _ = recommender
    offsets = np.sort(rng.integers(0, 200, batch))
    offsets[0] = 0
    inputs = (rng.integers(0, rows, n) for rows, n in ((1500, batch), (2500, 200), (20, batch)))
    user, items, country = (torch.from_numpy(value) for value in inputs)
    inputs = (user, items, torch.from_numpy(offsets), country)
    score, hidden, features = run(session, *inputs)
    assert_same_bits(features, run_torch(model, *inputs)[2])
    assert_linear(hidden, features, model.hidden)
    assert_linear(score[:, None], np.maximum(hidden, 0), model.score)


def test_names_of_inputs_and_outputs(recommender):
    _, session, _ = recommender
    assert [(value.name, value.shape) for value in session.get_inputs()] == [
        ("user", ["batch"]),
        ("items", ["length"]),
        ("offsets", ["batch"]),
        ("country", ["batch"]),
    ]
    assert [value.name for value in session.get_outputs()] == ["score", "hidden", "features"]


def test_tables_stay_packed(recommender):
    model, _, path = recommender
    others = sum(value.numel() * 4 for value in model.parameters())
    packed = sum(module.table.nbytes for module in (model.user, model.items))
    # Nodes with the lines of source they come from, as torch.onnx.export writes them.
    assert packed + others < path.stat().st_size < packed + others + 40_000


def assert_linear(ours, inputs, layer):
    """Holds a layer's output against float64: d + 1 terms, at most d + 1 roundings of each (Higham 2002, 3.1)."""
    inputs, weight, bias = (
        value.astype(np.float64) for value in (inputs, layer.weight.detach().numpy(), layer.bias.detach().numpy())
    )
    bound = 1.01 * (inputs.shape[1] + 1) * 2.0**-24 * (np.abs(inputs) @ np.abs(weight).T + np.abs(bias))
    assert (np.abs(ours - (inputs @ weight.T + bias)) <= bound).all()


class Twice(nn.Module):
    """One table three times: by one module twice, and by another with the same memory."""

    def __init__(self, layout):
        super().__init__()
        table = normal_table(rows=3000, method=METHODS[layout])
        self.one = PackedEmbedding.from_table(table)
        self.other = PackedEmbeddingBag.from_table(table)

    def forward(self, users, friends):
        return self.one(users), self.one(friends), self.other(users)


@pytest.mark.parametrize("layout", METHODS)
def test_one_table_of_several_lookups_is_there_once(tmp_path, rng, layout):
    model = Twice(layout)
    args = torch.from_numpy(rng.integers(0, 3000, (2, 4, 5)))
    session = export(model, tuple(args), tmp_path / "model.onnx")
    for ours, theirs in zip(run(session, *args), run_torch(model, *args), strict=True):
        assert_same_bits(ours, theirs)
    initializers = onnx.load(tmp_path / "model.onnx").graph.initializer
    large = sorted(value.name.rpartition(".")[2] for value in initializers if len(value.raw_data) > 64)
    expected = {
        "uniform": ["codes", "params"],
        "codebook": ["codebooks", "codes"],
        "clustered": ["clusters", "codebooks", "codes"],
    }
    assert large == expected[layout]


class AsTypes(nn.Module):
    """The operators' dtype."""

    def __init__(self, dtype, table):
        super().__init__()
        self.one = PackedEmbedding.from_table(table)
        self.dtype = dtype

    def forward(self, indices):
        table, operators = (self.one.packed, str(self.one.row_format)), torch.ops.embpack
        found = [operators.embedding(*table, indices, dtype=self.dtype)]
        for mode in MODES:
            found.append(operators.embedding_bag(*table, indices, None, mode, dtype=self.dtype))
        return [value.float() for value in found] + found[:1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("largest", [1, 65504, 1.6e38])
def test_values_of_half_the_bits(tmp_path, dtype, largest):
    """Those that the type cannot hold, too: finite ones become its largest."""
    weight = np.random.default_rng(0).standard_normal((50, DIM), dtype=np.float32)
    weight *= np.float32(largest / np.abs(weight).max())
    table = embpack.quantize(weight, "asym", param_dtype="float32")
    model, indices = AsTypes(dtype, table), torch.arange(12).reshape(3, 4)
    session = export(model, (indices,), tmp_path / "model.onnx")
    assert session.get_outputs()[-1].type == f"tensor({str(dtype).removeprefix('torch.')})"
    names = [value.name for value in session.get_outputs()][:-1]
    ours = session.run(names, {session.get_inputs()[0].name: indices.numpy()})
    with torch.no_grad():
        theirs = [value.numpy() for value in model(indices)[:-1]]
    for one, other in zip(ours, theirs, strict=True):
        assert_same_bits(one, other)


def test_values_of_a_type_that_there_is_not(tmp_path):
    with pytest.raises(ValueError, match="dtype is 'DOUBLE'; choose one of float32, float16, bfloat16"):
        export_model(
            AsTypes(torch.float64, normal_table()).eval(), (torch.ones((2, 3), dtype=int),), tmp_path / "model.onnx"
        )


class Inner(nn.Module):
    """Lookups of constants, and in a branch."""

    def __init__(self):
        super().__init__()
        self.position = PackedEmbedding.from_table(normal_table(1))
        self.word = PackedEmbedding.from_table(normal_table(2))

    def forward(self, words):
        words = torch.cond((words > 0).all(), self.word, self.position, (words,))
        return words, self.position(torch.arange(words.shape[1]))


def test_branches_and_constant_indices(tmp_path):
    model = Inner()
    session = export(model, (torch.ones((2, 5), dtype=torch.int64),), tmp_path / "model.onnx")
    for words in (torch.arange(10).reshape(2, 5), torch.arange(1, 11).reshape(2, 5)):
        for ours, theirs in zip(run(session, words), run_torch(model, words), strict=True):
            assert_same_bits(ours, theirs)


class Small(nn.Module):
    """As little as goes; the layer's weights are not small for a file."""

    def __init__(self):
        super().__init__()
        self.words = PackedEmbedding.from_table(normal_table())
        self.layer = nn.Linear(DIM, 64)

    def forward(self, indices, scale=None):
        values = self.words(indices)
        return values if scale is None else (values, self.layer(values * scale))


INDEX = torch.tensor([1, 5, 39])


def test_keyword_inputs(tmp_path):
    model, scale = Small(), torch.tensor(1.0)
    session = export(model, (INDEX,), tmp_path / "model.onnx", kwargs={"scale": scale})
    values, linear = session.run(None, {"indices": INDEX.numpy(), "scale": scale.numpy()})
    assert_same_bits(values, model.words.table[INDEX.numpy()])
    assert_linear(linear, values, model.layer)


def test_an_exported_program(tmp_path):
    model = Small()
    program = torch.export.export(model, (INDEX,))
    export_model(program, (INDEX,), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert_same_bits(run(session, INDEX)[0], model.words.table[INDEX.numpy()])


@pytest.mark.parametrize("chunk_bytes", [64, 1 << 24])
def test_large_weights_lie_beside_the_model(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(files, "EXTERNAL_BYTES", 1000)
    monkeypatch.setattr(files, "_CHUNK_BYTES", chunk_bytes)
    model, scale = Small(), torch.tensor(1.0)
    session = export(model, (INDEX, scale), tmp_path / "model.onnx")
    values, linear = run(session, INDEX, scale)
    assert_same_bits(values, model.words.table[INDEX.numpy()])
    assert_linear(linear, values, model.layer)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    loaded = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    outside = {value.name for value in loaded.graph.initializer if value.external_data}
    assert outside == {"words.packed.codes", "words.packed.params", "layer.weight"}


def test_a_table_mapped_from_a_file(tmp_path):
    embpack.save(tmp_path / "table.safetensors", {"a": normal_table()})
    model = PackedEmbedding.from_table(embpack.load(tmp_path / "table.safetensors")["a"])
    session = export(model, (INDEX,), tmp_path / "model.onnx")
    assert_same_bits(run(session, INDEX)[0], normal_table()[INDEX.numpy()])


class Unexportable(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = PackedEmbedding.from_table(normal_table())

    def forward(self, indices):
        return self.words(indices) if indices.sum().item() > 3 else indices


def fail(*arguments):
    raise OSError("no more")


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_model_that_cannot_be_exported_leaves_no_file(tmp_path, old):
    if old is not None:
        (tmp_path / "model.onnx").write_bytes(old)
    with pytest.raises(torch.onnx.errors.OnnxExporterError):
        export_model(Unexportable().eval(), (INDEX,), tmp_path / "model.onnx")
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [old] * (old is not None)


@pytest.mark.parametrize("external_bytes", [0, 1 << 30])
def test_a_failure_to_write_leaves_no_file(tmp_path, monkeypatch, external_bytes):
    monkeypatch.setattr(files, "EXTERNAL_BYTES", external_bytes)
    monkeypatch.setattr(onnx.ModelProto, "SerializeToString", fail)
    with pytest.raises(OSError, match="no more"):
        export_model(Small().eval(), (INDEX,), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_packed_embeddings(tmp_path):
    with pytest.raises(ValueError, match=r"looks nothing up in packed embeddings; pack them first, embpack.torch.quan"):
        export_model(nn.Embedding(4, 3).eval(), (torch.tensor([1]),), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


class Computed(nn.Module):
    def forward(self, packed, indices):
        return torch.ops.embpack.embedding(packed, f"uniform:{DIM}:4:float16", indices)


def test_a_table_that_is_an_input(tmp_path):
    packed = torch.from_numpy(normal_table().packed)
    with pytest.raises(ValueError, match="tensor packed is an input of the model or computed in it; make it a buffer"):
        export_model(Computed().eval(), (packed, INDEX), tmp_path / "model.onnx")


def test_another_suffix(tmp_path):
    with pytest.raises(ValueError, match=r"model.pt: the name of an ONNX model ends in .onnx"):
        export_model(Small().eval(), (INDEX,), tmp_path / "model.pt")


def test_a_table(tmp_path):
    with pytest.raises(TypeError, match=r"model is a PackedTable; embpack.onnx.export writes a table"):
        export_model(normal_table(), (INDEX,), tmp_path / "model.onnx")


def test_what_is_no_model(tmp_path):
    with pytest.raises(TypeError, match=r"model is dict; it must be a torch.nn.Module or an ExportedProgram"):
        export_model({}, (INDEX,), tmp_path / "model.onnx")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; create it first"):
        export_model(Small().eval(), (INDEX,), tmp_path / "none" / "model.onnx")


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("torch", r"embpack.onnx.export_model needs PyTorch: pip install '.*torch.*'"),
        ("onnxscript", r"embpack.onnx.export_model needs ONNX Script: pip install '.*onnx.*'"),
    ],
)
def test_missing_extra(tmp_path, monkeypatch, package, message):
    model = Small().eval()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=message):
        export_model(model, (INDEX,), tmp_path / "model.onnx")


def test_pytorch_is_for_models_alone():
    check = "import sys, embpack.onnx; sys.exit(bool({'torch', 'onnxscript'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_a_model_in_training_mode_gets_pytorchs_warning(tmp_path):
    with pytest.warns(UserWarning, match=r"Calling model.eval\(\) before export is recommended"):
        export_model(Small(), (INDEX,), tmp_path / "model.onnx")


# Collections

FEATURES = {"user": ["who", "seen"], "item": ["seen"], "shop": ["bought"]}


def make_collection(modes=("sum", "mean", "max"), **options):
    tables = [normal_table(0), normal_table(1, method="kmeans-cls:K=4"), normal_table(2, bits=8, embedding_dim=5)]
    bags = [PackedEmbeddingBag.from_table(table, mode=mode) for table, mode in zip(tables, modes, strict=True)]
    bags[1] = PackedEmbeddingBag.from_table(tables[1], mode=modes[1], padding_idx=PADDING)
    return PackedEmbeddingBagCollection(dict(zip(FEATURES, bags, strict=True)), FEATURES, **options)


@pytest.mark.parametrize(("dtype", "include_last_offset"), [(torch.int64, False), (torch.int32, True)])
def test_collections(tmp_path, dtype, include_last_offset):
    collection = make_collection(include_last_offset=include_last_offset)
    bags = 3 * torch.export.Dim("batch", min=1, max=100)
    bags = bags + 1 if include_last_offset else bags
    shapes = {"features": {0: torch.export.Dim.DYNAMIC}, "offsets": {0: bags}}
    example = torch.arange(12, dtype=dtype), torch.arange(0, 12 + include_last_offset, 2, dtype=dtype)
    session = export(collection, example[:2], tmp_path / "c.onnx", dynamic_shapes=shapes)
    for lengths in ([2] * 6, [0, 1, 5, 0, 0, 2, 3, 3, 0], [1, 1, 1]):
        edges = torch.tensor([0, *np.cumsum(lengths)], dtype=dtype)
        indices = torch.arange(int(edges[-1]), dtype=dtype)
        inputs = indices, edges if include_last_offset else edges[:-1]
        (ours,), (theirs,) = run(session, *inputs), run_torch(collection, *inputs)
        np.testing.assert_array_equal(ours, theirs, strict=True)


def test_collections_of_2d_indices_and_weights(tmp_path):
    square = torch.arange(12).reshape(6, 2)
    collection = make_collection()
    shapes = {"features": {0: 3 * torch.export.Dim("batch", min=1, max=100), 1: torch.export.Dim.DYNAMIC}}
    session = export(collection, (square,), tmp_path / "square.onnx", dynamic_shapes=shapes)
    for indices in (square, torch.arange(27).reshape(9, 3), torch.arange(3).reshape(3, 1)):
        np.testing.assert_array_equal(run(session, indices)[0], run_torch(collection, indices)[0], strict=True)
    sums, weights = make_collection(("sum",) * 3), torch.linspace(-1, 1, 12).reshape(6, 2)
    session = export(sums, (square, None, weights), tmp_path / "weights.onnx")
    # Bags of two rows of values below 4: products are rounded before they are added, which ours do not do.
    assert_near = np.testing.assert_allclose
    assert_near(run(session, square, weights)[0], run_torch(sums, square, None, weights)[0], rtol=0, atol=8 * 2**-23)
