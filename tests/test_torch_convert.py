"""embpack.torch.quantize_: models packed in place."""

import inspect

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

import embpack
from embpack.torch import PackedEmbedding, PackedEmbeddingBag, PackedEmbeddingBagCollection, quantize_


class Recommender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user = nn.EmbeddingBag(100, 16, mode="sum", padding_idx=0)
        self.towers = nn.ModuleList([nn.Embedding(50, 8), nn.Embedding(60, 8)])
        self.kind = nn.Embedding(3, 8)
        self.top = nn.Linear(8, 1)

    def forward(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        return self.user(users).sum(1) + self.top(self.towers[0](items) + self.kind(items % 3)).squeeze(-1)


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.head = nn.Linear(16, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens))


def test_embeddings_are_packed_and_the_rest_is_left_alone():
    model = Recommender().eval()
    users, items = torch.randint(1, 100, (5, 4)), torch.randint(0, 50, (5,))
    before = model(users, items)
    weights = {name: module.weight.detach().clone() for name, module in (("user", model.user), ("top", model.top))}
    report = quantize_(model, "greedy")
    assert isinstance(model.user, PackedEmbeddingBag)
    assert isinstance(model.towers[1], PackedEmbedding)
    assert (model.user.mode, model.user.padding_idx, model.user.training) == ("sum", 0, False)
    np.testing.assert_array_equal(model.user.table.packed, embpack.quantize(weights["user"], "greedy").packed)
    assert torch.equal(model.top.weight, weights["top"])
    assert isinstance(model.kind, nn.Embedding)
    assert [table.name for table in report.tables] == ["user", "towers.0", "towers.1"]
    assert report.left_alone == (("kind", "only 3 rows"),)
    assert torch.nn.functional.cosine_similarity(model(users, items), before, dim=0) > 0.95


def test_the_report_prints_as_a_table():
    report = quantize_(Recommender(), "asym", filter=lambda module, name: name in ("user", "kind"), bits=8)
    lines = str(report).splitlines()
    assert lines[0].split() == ["module", "rows", "dim", "before", "after", "ratio", "l2", "loss"]
    assert lines[1].split()[:6] == ["user", "100", "16", "6,400", "2,400", "37.50%"]
    assert lines[2].split()[0] == "kind"
    assert lines[3:5] == ["user: PackedEmbeddingBag", "kind: PackedEmbedding"]
    assert lines[5] == "tables: 6,496 -> 2,448 bytes (37.68%)"
    # Beside them 3,520 bytes of the towers, 36 of the layer, and a row format for each packed table.
    assert lines[6] == "whole model: 10,052 -> 6,132 bytes (61.00%)"
    assert lines[7:] == ["left alone: towers.0, the filter says no", "left alone: towers.1, the filter says no"]


def test_modules_of_a_kind_are_counted_together():
    report = quantize_(Recommender(), "asym")
    assert report.became == (("user", "PackedEmbeddingBag"), *((f"towers.{i}", "PackedEmbedding") for i in range(2)))
    assert str(report).splitlines()[4:6] == ["user: PackedEmbeddingBag", "2 modules: PackedEmbedding"]


def test_a_tied_weight_is_refused_and_the_model_stays_as_it_is():
    model = LanguageModel()
    with pytest.raises(ValueError, match=r"embed\.weight is also head\.weight, which stays float: pass tied='share'"):
        quantize_(model)
    assert isinstance(model.embed, nn.Embedding)
    assert model.head.weight is model.embed.weight


def test_a_tied_weight_can_be_untied():
    model = LanguageModel()
    weight = model.head.weight
    report = quantize_(model, tied="untie")
    assert isinstance(model.embed, PackedEmbedding)
    assert model.head.weight is weight
    # The floats are left in memory: nothing is saved.
    assert (report.bytes_before, report.bytes_after) == (64 * 16 * 4, 64 * 16 * 4 + 64 * (8 + 4) + 64)
    assert str(report).splitlines()[2:] == [
        "embed: PackedEmbedding",
        "tables: 4,096 -> 768 bytes (18.75%)",
        "whole model: 4,096 -> 4,928 bytes (120.31%), larger than before",
        "untied: head.weight stays float beside the packed rows; tied='share' has output layers use those",
    ]
    assert model(torch.tensor([1, 2])).shape == (2, 64)


def test_shared_weights_and_modules_are_packed_once():
    model = nn.Module()
    model.first, model.second = nn.Embedding(20, 4), nn.Embedding(20, 4)
    model.second.weight = model.first.weight
    model.again = model.first
    report = quantize_(model)
    assert model.again is model.first
    assert model.second.packed is model.first.packed
    assert [(table.name, table.bytes_before, table.bytes_after) for table in report.tables] == [
        ("first", 320, 120),
        ("second", 0, 0),
    ]
    assert str(report).splitlines()[2].split()[3:6] == ["0", "0", "shared"]
    assert (report.bytes_before, report.bytes_after) == (320, 120 + 2 * 64)


@pytest.mark.parametrize(
    ("view", "other"),
    [
        (lambda weight: weight, lambda weight: weight.T),
        (lambda weight: weight[:32], lambda weight: weight[::2]),
        (lambda weight: weight[:, :32], lambda weight: weight[:, ::2]),
        (lambda weight: weight[:, :32], lambda weight: weight[:32].view(64, 32)),
        (lambda weight: weight, lambda weight: weight.view(torch.bfloat16)[:, :64]),
    ],
    ids=["transposed", "rows", "columns", "another stride", "another type"],
)
def test_weights_of_one_shape_that_begin_at_one_address_are_each_packed(view, other):
    weight = torch.randn(64, 64).bfloat16().float()  # finite as bfloat16, too
    views = {"view": view(weight), "other": other(weight)}
    wanted = {name: embpack.quantize(each.clone()) for name, each in views.items()}
    assert views["view"].data_ptr() == views["other"].data_ptr() and views["view"].shape == views["other"].shape
    model = nn.ModuleDict({name: nn.Embedding.from_pretrained(each) for name, each in views.items()})
    report = quantize_(model)
    for table in report.tables:
        np.testing.assert_array_equal(model[table.name].table.packed, wanted[table.name].packed)
        assert table.loss == wanted[table.name].loss


def test_a_weight_that_only_overlaps_is_not_tied():
    """What is left as floats keeps its values: nothing is written to memory that it has with the embedding."""
    model = nn.ModuleDict({"embed": nn.Embedding(16, 16), "decoder": nn.Linear(16, 16, bias=False)})
    model["decoder"].weight = nn.Parameter(model["embed"].weight.T)
    values = model["embed"].weight.detach().clone()
    quantize_(model)
    assert isinstance(model["embed"], PackedEmbedding)
    assert torch.equal(model["decoder"].weight, values.T)


def test_nothing_is_changed_if_one_module_cannot_be_packed():
    model = nn.ModuleDict({"good": nn.Embedding(20, 4), "bad": nn.Embedding(20, 4, max_norm=1.0)})
    with pytest.raises(ValueError, match=r"bad has max_norm=1\.0: it rewrites rows while they are looked up"):
        quantize_(model)
    assert isinstance(model["good"], nn.Embedding)
    with torch.no_grad():
        model["bad"] = nn.Embedding(20, 4)
        model["bad"].weight[3, 1] = torch.nan
    with pytest.raises(ValueError, match=r"weight\[3, 1\] is nan"):
        quantize_(model)
    assert isinstance(model["good"], nn.Embedding)


def test_what_counts_in_training_alone_can_be_switched_off():
    model = nn.ModuleDict({"trained": nn.EmbeddingBag(20, 4, sparse=True, mode="sum")})
    with pytest.raises(ValueError, match=r"trained has sparse=True: .* after training, set it to False and pack"):
        quantize_(model)
    model["trained"].sparse = False
    quantize_(model)
    assert isinstance(model["trained"], PackedEmbeddingBag)


def test_weights_that_share_their_memory_alone_are_tied():
    model = LanguageModel()
    model.head.weight = nn.Parameter(model.embed.weight.data)
    with pytest.raises(ValueError, match=r"embed\.weight is also head\.weight"):
        quantize_(model)


def test_modules_with_hooks_are_left_alone_and_said_so():
    model = nn.ModuleDict({"watched": nn.Embedding(20, 4), "free": nn.Embedding(20, 4)})
    model["watched"].register_forward_hook(lambda module, inputs, output: 2 * output)
    report = quantize_(model)
    assert report.left_alone == (("watched", "it has hooks, which a packed module would not have"),)
    assert isinstance(model["free"], PackedEmbedding)


def test_what_was_added_to_a_module_is_not_lost():
    modules = {name: nn.Embedding(20, 4) for name in ("wrapped", "adapted", "nested", "watched", "saved")}
    modules["wrapped"].forward = lambda indices: indices
    modules["adapted"].lora_A = nn.Parameter(torch.zeros(4, 16))
    modules["nested"].projection = nn.Linear(4, 4)
    modules["watched"].register_full_backward_hook(lambda module, inputs, outputs: None)
    modules["saved"].register_state_dict_post_hook(lambda module, state, prefix, metadata: None)
    model = nn.ModuleDict(modules)
    report = quantize_(model)
    names = ("a forward of its own", "lora_A", "projection", "hooks", "hooks")
    assert [reason for _, reason in report.left_alone] == [
        f"it has {name}, which a packed module would not have" for name in names
    ]
    assert all(type(module) is nn.Embedding for module in model.values())


def test_what_cannot_be_packed_is_named():
    model = nn.ModuleDict({"fine": nn.Embedding(20, 4), "broken": nn.Embedding(20, 4)})
    with torch.no_grad():
        model["broken"].weight[3, 2] = torch.nan
    with pytest.raises(ValueError, match=r"broken: weight\[3, 2\] is nan"):
        quantize_(model)
    assert isinstance(model["fine"], nn.Embedding)
    with torch.device("meta"):
        unloaded = nn.ModuleDict({"empty": nn.Embedding(20, 4)})
    with pytest.raises(ValueError, match="empty is on the meta device and has no values: load them first"):
        quantize_(unloaded)
    with pytest.raises(TypeError, match=r"only: weight is float64, but .*; convert it with weight\.float\(\)"):
        quantize_(nn.ModuleDict({"only": nn.Embedding(20, 4).double()}))
    with pytest.raises(TypeError, match="filter is str; it must be a function of a module and its name"):
        quantize_(model, filter="fine")
    with pytest.raises(TypeError, match="model is dict; quantize_ packs"):
        quantize_({"weight": torch.zeros(20, 4)})


class Frozen(nn.Module):
    """Refuses to be changed once it is made."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def __setattr__(self, name: str, value: object) -> None:
        if "_modules" in self.__dict__:
            raise AttributeError(f"{name} is frozen")
        super().__setattr__(name, value)


@pytest.mark.parametrize("tied", ["refuse", "share", "untie"])
def test_nothing_is_changed_if_a_parent_refuses(tied):
    shared = nn.Embedding(20, 4)
    model = nn.ModuleDict({"first": nn.Embedding(20, 4), "again": shared, "locked": Frozen(item=shared)})
    before = dict(model.named_modules(remove_duplicate=False))
    with pytest.raises(
        ValueError, match=r"locked\.item is in a Frozen, which does not let .* \(item is frozen\): pack it"
    ):
        quantize_(model, tied=tied)
    assert dict(model.named_modules(remove_duplicate=False)) == before
    report = quantize_(model, filter=lambda module, name: name == "first")
    assert [table.name for table in report.tables] == ["first"]


def spread(weight):
    mesh = init_device_mesh("cpu", (1,))
    return distribute_tensor(weight, mesh, [Shard(0)])


@pytest.fixture
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Wrapped(torch.Tensor):
    """A tensor that is made of another, as torchao's are."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Wrapped":
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        if function is torch.ops.aten.detach.default:
            return cls(arguments[0].inner)
        raise NotImplementedError(function)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda weight: weight.to(torch.float8_e4m3fn), r"float8_e4m3fn, .*; convert it with weight\.float\(\)"),
        (lambda weight: weight.to_sparse(), r"sparse_coo, .*; convert it with weight\.to_dense\(\)"),
        (lambda weight: weight.to_sparse_csr(), r"sparse_csr, .*; convert it with weight\.to_dense\(\)"),
        (
            lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
            r"qint8, .*; convert it with weight\.dequantize\(\)",
        ),
        (spread, r"a DTensor, spread over processes, .*; convert it with weight\.full_tensor\(\)"),
        (Wrapped, r"a Wrapped, .*; convert it with weight\.dequantize\(\)"),
    ],
    ids=["fp8", "coo", "csr", "quantized", "DTensor", "subclass"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:.*quantized tensor creation functions")
def test_values_that_are_not_simply_in_memory_are_named(make, message, process_group):
    weight = torch.rand(20, 16)
    model = nn.ModuleDict({"fine": nn.Embedding(20, 16), "odd": nn.Embedding(20, 16)})
    model["odd"].weight = nn.Parameter(make(weight), requires_grad=False)
    with pytest.raises(TypeError, match=rf"^odd: weight is {message}$"):
        quantize_(model)
    assert isinstance(model["fine"], nn.Embedding)
    with pytest.raises(TypeError, match=rf"^weight is {message}$"):
        PackedEmbedding.from_float(model["odd"])
    quantize_(model, filter=lambda module, name: name == "fine")
    assert isinstance(model["fine"], PackedEmbedding)


def test_a_collections_table_is_named():
    class Collection:
        embedding_bags = nn.ModuleDict({"user": nn.EmbeddingBag(20, 4).double()})

    with pytest.raises(TypeError, match=r"^table 'user': weight is float64"):
        PackedEmbeddingBagCollection.from_float(Collection())


def test_progress_is_told_of_each_table():
    told = []
    quantize_(Recommender(), progress=lambda name, rows: told.append((name, rows)))
    assert told == [("user", 100), ("towers.0", 50), ("towers.1", 60)]


def test_attributes_of_a_module_are_not_lost():
    model = nn.ModuleDict(
        {"scaled": nn.Embedding(20, 4), "marked": nn.EmbeddingBag(20, 4), "plain": nn.Embedding(20, 4)}
    )
    model["scaled"].scale = 3.0
    model["marked"]._is_hf_initialized = True  # as transformers marks every module
    report = quantize_(model)
    assert report.left_alone == (("scaled", "it has scale, which a packed module would not have"),)
    assert [table.name for table in report.tables] == ["marked", "plain"]
    assert type(model["scaled"]) is nn.Embedding


def test_a_subclass_is_left_alone_and_said_so():
    class Scaled(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = nn.ModuleDict({"scaled": Scaled(20, 4)})
    report = quantize_(model)
    assert report.left_alone == (("scaled", "a Scaled, whose own forward a packed module would not have"),)
    assert str(report).splitlines()[1:3] == ["tables: 0 -> 0 bytes", "whole model: 320 -> 320 bytes (100.00%)"]


def test_a_printed_report_has_names_that_can_be_seen():
    model = torch.nn.ModuleDict({"\x1b[31ma\nb": torch.nn.Embedding(40, 8), "c\nd": torch.nn.Embedding(2, 8)})
    lines = str(quantize_(model)).split("\n")
    assert lines[1].startswith(r"\x1b[31ma\nb  ") and lines[-1].startswith(r"left alone: c\nd, ")
    assert all(line.isprintable() for line in lines)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="the model is itself an embedding"):
        quantize_(nn.Embedding(20, 4))
    with pytest.raises(ValueError, match="tied is 'maybe'; choose 'refuse', 'share' or 'untie'"):
        quantize_(Recommender(), tied="maybe")
    with pytest.raises(ValueError, match="bits is 3"):
        quantize_(Recommender(), bits=3)


def test_rows_that_float16_parameters_lose_are_reported():
    model = torch.nn.Sequential(torch.nn.Embedding(20, 8))
    with torch.no_grad():
        model[0].weight *= 1e-9
    report = quantize_(model)
    assert "\n0: 20 of its rows come back no better than zeros would: " in str(report)


@pytest.mark.parametrize(
    ("weight", "options", "sizes"),
    [
        (torch.rand(10_000, 1), {}, "40,000 -> 50,000 bytes"),
        (torch.rand(100, 2).half(), {}, "400 -> 500 bytes"),
        (torch.rand(20, 8), {"method": "kmeans"}, "640 -> 720 bytes"),
        (torch.rand(20, 8).half(), {"bits": 8}, "320 -> 320 bytes"),
        (torch.rand(16, 16), {"method": "trellis"}, "1,024 -> "),  # its levels alone take more
    ],
)
def test_tables_that_packing_makes_no_smaller_are_left_alone(tmp_path, weight, options, sizes):
    """As on the command line; whoever names them has them packed."""
    torch.save({"user_emb.weight": weight}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=rf"user_emb.weight \(packed rows would be no smaller: {sizes}"):
        embpack.quantize_file(tmp_path / "model.pt", tmp_path / "packed.safetensors", **options)
    model = nn.ModuleDict({"user_emb": nn.Embedding.from_pretrained(weight)})
    ((name, reason),) = quantize_(model, **options).left_alone
    assert name == "user_emb" and reason.startswith(f"packed rows would be no smaller: {sizes}")
    assert isinstance(model["user_emb"], nn.Embedding)
    named = embpack.quantize_file(tmp_path / "model.pt", tmp_path / "packed.safetensors", include=["*"], **options)
    report = quantize_(model, filter=lambda module, name: True, **options)
    assert isinstance(model["user_emb"], PackedEmbedding)
    for found in (*named.tables, *report.tables):
        assert f"{found.bytes_before:,} -> {found.bytes_after:,}" in reason


def test_a_module_is_packed_as_quantize_packs_an_array():
    weight = torch.rand(100, 64)
    for options in ({"method": "trellis", "bits": 3.5}, {"method": embpack.parse_method("greedy:b=1000,r=0.5")}):
        model = nn.ModuleDict({"user": nn.Embedding.from_pretrained(weight)})
        quantize_(model, **options)
        np.testing.assert_array_equal(model["user"].table.packed, embpack.quantize(weight, **options).packed)
    theirs, ours = (inspect.signature(function).parameters for function in (embpack.quantize, quantize_))
    for name in ("method", "bits", "param_dtype", "rotate"):
        assert (ours[name].annotation, ours[name].default) == (theirs[name].annotation, theirs[name].default)


def test_a_method_that_does_not_take_a_width_names_the_module():
    model = nn.ModuleDict({"wide": nn.Embedding(20, 16), "narrow": nn.Embedding(20, 3)})
    with pytest.raises(ValueError, match=r"^narrow: embedding_dim is 3; a row of the trellis layout has 4 to 65536"):
        quantize_(model, "trellis")
