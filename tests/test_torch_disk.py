"""Modules whose rows stay on the disk: what mapped ones return, and what cannot be had is refused."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

import embpack
from embpack.torch import (
    PackedEmbedding,
    PackedEmbeddingBag,
    PackedEmbeddingBagCollection,
    PackedLinear,
    load_checkpoint,
    quantize_,
)

LAYOUTS = {
    "uniform": {"method": "asym"},
    "codebook": {"method": "kmeans"},
    "clustered": {"method": "kmeans-cls"},
    "trellis": {"method": "trellis"},
    "rotated": {"method": "asym", "rotate": "hadamard"},
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words_embedding = nn.Embedding(500, 32, padding_idx=1)
        self.user_embedding = nn.EmbeddingBag(700, 64, mode="sum")
        self.item_embedding = nn.EmbeddingBag(700, 64, mode="max", padding_idx=3)
        self.top = nn.Linear(64, 1)

    def forward(self, words, users, offsets):
        return self.words_embedding(words), self.top(self.user_embedding(users, offsets)), self.item_embedding(words)


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


def load(folder, layout="uniform", dtype=torch.float32):
    """The model, mapped and on the disk."""
    torch.manual_seed(0)
    save_file(Model().to(dtype).state_dict(), folder / "float.safetensors")
    embpack.quantize_file(folder / "float.safetensors", folder / "packed.safetensors", force=True, **LAYOUTS[layout])
    return [
        load_checkpoint(make_empty(), folder / "packed.safetensors", access=access) for access in ("mapped", "disk")
    ]


def make_empty():
    with torch.device("meta"):
        return Model()


def draw(*shape):
    return torch.randint(0, 500, shape)


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_modules_return_what_mapped_ones_do(tmp_path, layout, dtype):
    known, model = load(tmp_path, layout, dtype)
    assert isinstance(model.user_embedding.table, embpack.DiskTable)
    words, users, offsets = draw(7, 11), draw(40), torch.tensor([0, 0, 13])
    words[2, 3] = 3
    for of_model in (model, copy.deepcopy(model), model.eval()):
        assert_equal(of_model(words, users, offsets), known(words, users, offsets))
    assert_equal(model.words_embedding(words[:0]), known.words_embedding(words[:0]))
    assert_equal(model.words_embedding(words.int().T), known.words_embedding(words.int().T))
    assert_equal(model.words_embedding.weight[5], known.words_embedding.weight[5])
    assert_equal(model.user_embedding.to_float().weight, known.user_embedding.to_float().weight)
    for module in (model.user_embedding, known.user_embedding):
        module.rotate_back = False
        module.include_last_offset = True
    offsets = torch.tensor([0, 10, 40])
    assert_equal(model.user_embedding(users, offsets), known.user_embedding(users, offsets))


def test_weights_get_the_gradients_that_mapped_ones_give(tmp_path, layout):
    known, model = load(tmp_path, layout)
    users, weights = draw(5, 8), torch.rand(5, 8)
    gradients = []
    for each in (known, model):
        own = weights.clone().requires_grad_()
        (each.user_embedding(users, per_sample_weights=own) ** 2).sum().backward()
        gradients.append(own.grad)
    assert_equal(*gradients)


def test_collections_return_what_mapped_ones_do(tmp_path, layout, dtype):
    known, model = load(tmp_path, layout, dtype)
    features = {"user": ["a", "b"], "item": ["b", "c"]}
    of_known = PackedEmbeddingBagCollection({"user": known.user_embedding, "item": known.item_embedding}, features)
    indices, offsets = draw(60), torch.tensor([0, 10, 10, 30, 33, 39])
    for user, item in ((model, model), (model, known), (known, model)):
        bags = {"user": user.user_embedding, "item": item.item_embedding}
        collection = PackedEmbeddingBagCollection(bags, features)
        assert_equal(collection(indices, offsets), of_known(indices, offsets))
        assert_equal(collection(indices.reshape(6, 10)), of_known(indices.reshape(6, 10)))
        assert collection.device.type == "cpu"
        assert {type(table) for table in collection.tables.values()} >= {embpack.DiskTable}
        wrong = indices.clone()
        wrong[25] = 700
        for arguments in ((wrong, offsets), (indices, offsets + 1), (indices, offsets * 2), (indices.float(), offsets)):
            messages = []
            for each in (collection, of_known):
                with pytest.raises((IndexError, TypeError, ValueError)) as caught:
                    each(*arguments)
                messages.append((caught.type, str(caught.value)))
            assert messages[0] == messages[1]


def test_weighted_collections_return_what_mapped_ones_do(tmp_path):
    known, model = load(tmp_path)
    indices, offsets, weights = draw(60), torch.tensor([0, 10, 10, 30]), torch.rand(60)
    found = []
    for each in (model, known):
        own = weights.clone().requires_grad_()
        bags = {"user": each.user_embedding, "again": each.user_embedding}
        pooled = PackedEmbeddingBagCollection(bags)(indices, offsets, own)
        pooled.sum().backward()
        found.append((pooled.detach(), own.grad))
    assert_equal(*found)


def test_moving_changes_the_type_alone(tmp_path):
    _, model = load(tmp_path)
    words = draw(5)
    rows = model.words_embedding(words)
    model.half().to("cpu").to(torch.float16)
    assert_equal(model.words_embedding(words), rows.half())
    assert not list(model.words_embedding.buffers())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_models_look_up_by_a_graph_break(tmp_path):
    _, model = load(tmp_path)
    words = draw(5)
    compiled = torch.compile(lambda words: model.words_embedding(words) * 2, backend="eager")
    assert_equal(compiled(words), model.words_embedding(words) * 2)
    whole = torch.compile(lambda words: model.words_embedding(words) * 2, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        whole(words)


def test_what_would_need_all_rows_is_refused(tmp_path):
    known, model = load(tmp_path)
    for call in (model.state_dict, model.words_embedding.state_dict):
        with pytest.raises(ValueError, match=r"the rows of (words_embedding|the module) stay on the disk, and a state"):
            call()
    with pytest.raises(TypeError, match="rows that stay on the disk cannot be pickled"):
        pickle.dumps(model)
    with pytest.raises(RuntimeError, match="but the rows of words_embedding stay on the disk"):
        model.load_state_dict(known.state_dict(), strict=False)
    with pytest.raises(ValueError, match="a product with them needs all of them"):
        nn.functional.linear(torch.rand(2, 32), model.words_embedding.weight)
    with pytest.raises(TypeError, match=r"PackedLinear.from_table takes an embpack.PackedTable, not a DiskTable"):
        PackedLinear.from_table(model.words_embedding.table)
    with pytest.raises(ValueError, match="an output layer needs all rows each time"):
        load_checkpoint(make_empty(), tmp_path / "packed.safetensors", access="disk", tied="share")


def test_wrong_indices_are_named(tmp_path):
    known, model = load(tmp_path)
    for wrong in (torch.tensor([1, 500]), torch.tensor([-1]), torch.tensor([0.5]), torch.tensor([0], device="meta")):
        messages = []
        for each in (known, model):
            with pytest.raises((IndexError, TypeError, ValueError, NotImplementedError)) as caught:
                each.words_embedding(wrong)
            messages.append((caught.type, str(caught.value)))
        assert messages[0] == messages[1] or wrong.is_meta


def test_state_dicts_of_packed_models_cannot_stay_on_the_disk(tmp_path):
    model = Model()
    quantize_(model, "asym")
    save_model(model, str(tmp_path / "state.safetensors"))
    with pytest.raises(ValueError, match="rows of a state dict cannot stay on the disk; pack the checkpoint"):
        load_checkpoint(make_empty(), tmp_path / "state.safetensors", access="disk")


def test_modules_are_made_of_tables(tmp_path):
    load(tmp_path)
    tables = embpack.load(tmp_path / "packed.safetensors", access="disk")
    words = PackedEmbedding.from_table(tables["words_embedding.weight"])
    users = PackedEmbeddingBag.from_table(tables["user_embedding.weight"], mode="sum")
    indices = draw(4, 5)
    assert_equal(words(indices), torch.from_numpy(tables["words_embedding.weight"].gather(indices)))
    assert_equal(users(indices), torch.from_numpy(tables["user_embedding.weight"].embedding_bag(indices, mode="sum")))
    traced = torch.fx.symbolic_trace(nn.Sequential(words))
    assert_equal(traced(indices), words(indices))
