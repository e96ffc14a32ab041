"""embpack.torch.quantize_: models packed in place."""

import numpy as np
import pytest
import torch
from torch import nn

import embpack
from embpack.torch import PackedEmbedding, PackedEmbeddingBag, quantize_


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
    assert lines[3] == "6,496 -> 2,448 bytes (37.68%)"
    assert lines[4:] == ["left alone: towers.0, the filter says no", "left alone: towers.1, the filter says no"]


def test_a_tied_weight_is_refused_and_the_model_stays_as_it_is():
    model = LanguageModel()
    with pytest.raises(ValueError, match=r"embed\.weight is also head\.weight, which stays float: pass tied='untie'"):
        quantize_(model)
    assert isinstance(model.embed, nn.Embedding)
    assert model.head.weight is model.embed.weight


def test_a_tied_weight_can_be_untied():
    model = LanguageModel()
    weight = model.head.weight
    quantize_(model, tied="untie")
    assert isinstance(model.embed, PackedEmbedding)
    assert model.head.weight is weight
    assert model(torch.tensor([1, 2])).shape == (2, 64)


def test_shared_weights_and_modules_are_packed_once():
    model = nn.Module()
    model.first, model.second = nn.Embedding(20, 4), nn.Embedding(20, 4)
    model.second.weight = model.first.weight
    model.again = model.first
    report = quantize_(model)
    assert model.again is model.first
    assert model.second.packed.data_ptr() == model.first.packed.data_ptr()
    assert [table.name for table in report.tables] == ["first", "second"]


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


def test_progress_is_told_of_each_table():
    told = []
    quantize_(Recommender(), progress=lambda name, rows: told.append((name, rows)))
    assert told == [("user", 100), ("towers.0", 50), ("towers.1", 60)]


def test_a_subclass_is_left_alone_and_said_so():
    class Scaled(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = nn.ModuleDict({"scaled": Scaled(20, 4)})
    report = quantize_(model)
    assert report.left_alone == (("scaled", "a Scaled, whose own forward a packed module would not have"),)
    assert str(report).splitlines()[1] == "0 -> 0 bytes"


def test_a_printed_report_has_names_that_can_be_seen():
    model = torch.nn.ModuleDict({"\x1b[31ma\nb": torch.nn.Embedding(40, 8), "c\nd": torch.nn.Embedding(2, 8)})
    lines = str(quantize_(model)).split("\n")
    assert lines[1].startswith(r"\x1b[31ma\nb  ") and lines[-1].startswith(r"left alone: c\nd, ")
    assert all(line.isprintable() for line in lines)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="the model is itself an embedding"):
        quantize_(nn.Embedding(20, 4))
    with pytest.raises(ValueError, match="tied is 'maybe'; choose 'refuse' or 'untie'"):
        quantize_(Recommender(), tied="maybe")
    with pytest.raises(ValueError, match="bits is 3"):
        quantize_(Recommender(), bits=3)
