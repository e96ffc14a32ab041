"""embpack.torch.load_checkpoint: models with their tables packed and mapped."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_model, save_file, save_model
from torch import nn

import embpack
from benchmarks import opening
from embpack.formats import SourceTensor
from embpack.torch import PackedEmbedding, PackedEmbeddingBag, load_checkpoint, quantize_


class Recommender(nn.Module):
    def __init__(self, rows: int = 100) -> None:
        super().__init__()
        self.user_embedding = nn.EmbeddingBag(rows, 16, mode="sum", padding_idx=0)
        self.item_embedding = nn.Embedding(50, 16)
        self.kind_embedding = nn.Embedding(3, 16)
        self.norm = nn.BatchNorm1d(16)
        self.top = nn.Linear(16, 1)

    def forward(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        rows = self.norm(self.item_embedding(items) + self.kind_embedding(items % 3))
        return self.user_embedding(users).sum(1) + self.top(rows).squeeze(-1)


def make_checkpoint(folder: Path, model: nn.Module, method: str = "greedy") -> Path:
    save_model(model, folder / "float.safetensors")
    embpack.quantize_file(folder / "float.safetensors", folder / "packed.safetensors", method=method)
    return folder / "packed.safetensors"


@pytest.mark.parametrize("method", ["greedy", "kmeans-lloyd", "kmeans-cls:K=4"])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_model_has_its_tables_packed_and_all_else_as_it_was(tmp_path, method, device):
    trained = Recommender().eval()
    path = make_checkpoint(tmp_path, trained, method)
    with torch.device(device):
        model = Recommender()
    assert load_checkpoint(model.eval(), path) is model
    assert isinstance(model.user_embedding, PackedEmbeddingBag)
    assert isinstance(model.item_embedding, PackedEmbedding)
    assert isinstance(model.kind_embedding, nn.Embedding)
    assert (model.user_embedding.mode, model.user_embedding.padding_idx) == ("sum", 0)
    tables = embpack.load(path)
    np.testing.assert_array_equal(model.item_embedding.table.packed, tables["item_embedding.weight"].packed)
    assert torch.equal(model.top.weight, trained.top.weight)
    assert torch.equal(model.kind_embedding.weight, trained.kind_embedding.weight)
    for name in ("user_embedding", "item_embedding"):
        getattr(trained, name).weight.data = torch.from_numpy(tables[f"{name}.weight"].dequantize())
    users, items = torch.randint(0, 100, (5, 4)), torch.randint(0, 50, (5,))
    torch.testing.assert_close(model(users, items), trained(users, items))


def test_a_file_that_is_replaced_after_it_was_opened_is_loaded_as_it_was(tmp_path, monkeypatch):
    first, second = Recommender().eval(), Recommender().eval()
    other = make_checkpoint(tmp_path, second).replace(tmp_path / "other.safetensors")
    path = make_checkpoint(tmp_path, first)
    whole = SourceTensor.whole

    def replace_first(tensor, *, mapped):
        if other.exists():
            other.replace(path)
        return whole(tensor, mapped=mapped)

    monkeypatch.setattr(SourceTensor, "whole", replace_first)
    model = load_checkpoint(Recommender(), path)
    assert torch.equal(model.top.weight, first.top.weight)
    assert not torch.equal(model.top.weight, second.top.weight)
    model.top.weight.data.zero_()  # it is this process's own


def test_a_model_with_ten_gigabytes_of_tables_opens_without_reading_them(tmp_path):
    rows = 300_000_000
    opening.write_sparse_checkpoint(tmp_path / "large.safetensors", rows)
    with torch.device("meta"):
        model = opening.Recommender(rows)
    before = opening.count_resident_bytes()
    load_checkpoint(model, tmp_path / "large.safetensors")
    assert model.user_embedding.packed.nbytes > 10e9
    assert opening.count_resident_bytes() - before < 20e6
    assert torch.equal(model.user_embedding(torch.tensor([[rows - 1]])), torch.zeros(1, 64))


def test_what_does_not_go_together_is_named(tmp_path):
    path = make_checkpoint(tmp_path, Recommender())
    with pytest.raises(ValueError, match="user_embedding is 90 x 16, but its table is 100 x 16"):
        load_checkpoint(Recommender(90), path)

    without = Recommender()
    without.item_embedding = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"item_embedding is a Linear, but a packed weight takes an nn\.Emb"):
        load_checkpoint(without, path)
    del without.item_embedding
    with pytest.raises(ValueError, match=r"the model has no embedding for item_embedding\.weight"):
        load_checkpoint(without, path)

    more = Recommender()
    more.bottom = nn.Linear(1, 1, bias=False)
    del more.top
    with pytest.raises(ValueError, match=r"it lacks bottom\.weight, and the model lacks top\.bias, top\.weight"):
        load_checkpoint(more, path)

    with torch.device("meta"):
        other = Recommender()
        other.register_buffer("positions", torch.arange(3), persistent=False)
    with pytest.raises(ValueError, match="positions: still on the meta device"):
        load_checkpoint(other, path)

    wide = Recommender()
    wide.top = nn.Linear(16, 2)
    with pytest.raises(ValueError, match=r"does not go with the model: (.|\n)*size mismatch for top\.weight"):
        load_checkpoint(wide, path)


class Scaled(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_all_modules_that_cannot_be_packed_are_named(tmp_path):
    path = make_checkpoint(tmp_path, Recommender())
    model = Recommender()
    model.user_embedding, model.item_embedding = Scaled(100, 16), Scaled(50, 16)
    with pytest.raises(
        ValueError,
        match=r"^item_embedding is a Scaled, user_embedding is a Scaled, but a packed weight takes an nn\.Embedding or "
        r"nn\.EmbeddingBag: .* --exclude 'item_embedding\.weight' --exclude 'user_embedding\.weight'$",
    ):
        load_checkpoint(model, path)


class Frozen(Recommender):
    frozen = False

    def __setattr__(self, name: str, value: object) -> None:
        if self.frozen and name == "item_embedding":
            raise AttributeError(f"{name} is frozen")
        super().__setattr__(name, value)


def test_no_module_is_replaced_if_one_cannot_be(tmp_path):
    path = make_checkpoint(tmp_path, Recommender())
    model = nn.ModuleDict({"inner": Frozen()})["inner"]
    model.frozen = True
    before = dict(model.named_modules())
    with pytest.raises(
        ValueError, match=r"item_embedding is in a Frozen, which does not let it be replaced \(item_emb"
    ):
        load_checkpoint(model, path)
    assert dict(model.named_modules()) == before


def test_a_file_of_floats_is_refused(tmp_path):
    save_model(Recommender(), tmp_path / "float.safetensors")
    with pytest.raises(embpack.FormatError):
        load_checkpoint(Recommender(), tmp_path / "float.safetensors")


def test_a_weight_that_two_embeddings_share_may_be_in_the_file_once(tmp_path):
    def make() -> nn.Module:
        model = nn.ModuleDict({"query_embedding": nn.Embedding(20, 4), "title_embedding": nn.Embedding(20, 4)})
        model["title_embedding"].weight = model["query_embedding"].weight
        return model

    path = make_checkpoint(tmp_path, make())  # save_model leaves out what is there twice
    with torch.device("meta"):
        model = make()
    load_checkpoint(model, path)
    assert isinstance(model["title_embedding"], PackedEmbedding)
    assert model["title_embedding"].packed.data_ptr() == model["query_embedding"].packed.data_ptr()


def test_what_a_packed_module_cannot_do_is_refused(tmp_path):
    path = make_checkpoint(tmp_path, Recommender())
    model = Recommender()
    model.item_embedding.max_norm = 1.0
    with pytest.raises(ValueError, match=r"item_embedding has max_norm=1\.0"):
        load_checkpoint(model, path)


@pytest.mark.parametrize("method", ["greedy", "kmeans-cls:K=4"])
def test_a_state_dict_loads_over_mapped_tables(tmp_path, method):
    """And what is written there reaches neither the file nor another model."""
    path = make_checkpoint(tmp_path, Recommender(), method)
    content = path.read_bytes()
    model, other = (load_checkpoint(Recommender(), path) for _ in range(2))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["user_embedding.packed"].zero_()
    assert model.load_state_dict(state).missing_keys == []
    assert (model.user_embedding.packed == 0).all()
    assert torch.equal(model.item_embedding.packed, other.item_embedding.packed)
    assert path.read_bytes() == content
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict({"user_embedding.packed": torch.zeros(3, 12, dtype=torch.uint8)}, strict=False)
    assert torch.equal(other.user_embedding.packed, load_checkpoint(Recommender(), path).user_embedding.packed)
    for buffer in other.buffers():
        buffer.zero_()
    assert path.read_bytes() == content


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_has_the_types_of_the_file(tmp_path, dtype):
    trained = Recommender().eval().to(dtype)
    with torch.device("meta"):
        model = Recommender().eval()
    load_checkpoint(model, make_checkpoint(tmp_path, trained))
    users, items = torch.randint(1, 100, (5, 4)), torch.randint(0, 50, (5,))
    found = model(users, items)
    assert found.dtype == model.user_embedding.dtype == model.top.weight.dtype == dtype
    assert torch.nn.functional.cosine_similarity(found.float(), trained(users, items).float(), dim=0) > 0.95


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.item_embedding = nn.Embedding(20, 4)


def test_a_module_may_hang_in_two_places(tmp_path):
    def make() -> nn.ModuleDict:
        tower = Tower()
        return nn.ModuleDict({"query": tower, "title": tower})

    path = make_checkpoint(tmp_path, make())  # save_model leaves out what is there twice
    torch.save(make().state_dict(), tmp_path / "float.pt")
    embpack.quantize_file(tmp_path / "float.pt", tmp_path / "twice.safetensors")
    for file in (path, tmp_path / "twice.safetensors"):
        model = load_checkpoint(make(), file)
        assert isinstance(model["query"].item_embedding, PackedEmbedding)
        assert model["title"] is model["query"]


def test_what_was_added_to_a_module_is_not_lost(tmp_path):
    path = make_checkpoint(tmp_path, Recommender())
    model = Recommender()
    model.item_embedding.register_forward_hook(lambda module, inputs, output: 100 * output)
    with pytest.raises(
        ValueError, match=r"item_embedding has hooks, .*add it after.*--exclude 'item_embedding\.weight'"
    ):
        load_checkpoint(model, path)


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(60, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 60, bias=False)
        self.head.weight = self.token_embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.token_embedding(tokens)))


@pytest.mark.parametrize("name", ["token_embedding.weight", "head.weight"])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_an_output_layer_gets_the_rows_of_the_table_it_is_tied_to(tmp_path, name, device):
    """A file may have the weight under either name, once: safetensors and transformers leave the other out."""
    trained = LanguageModel()
    state = {"body.weight": trained.body.weight, "body.bias": trained.body.bias, name: trained.head.weight}
    save_file({key: value.detach() for key, value in state.items()}, tmp_path / "float.safetensors")
    embpack.quantize_file(tmp_path / "float.safetensors", tmp_path / "packed.safetensors", include=[name])
    with torch.device(device):
        model, refused = LanguageModel(), LanguageModel()
    model.head.weight = nn.Parameter(model.token_embedding.weight.detach())  # tied by memory alone
    with pytest.raises(ValueError, match=rf"head\.weight is also token_embedding\.weight, .*tied='untie'.*'{name}'"):
        load_checkpoint(refused, tmp_path / "packed.safetensors")
    load_checkpoint(model, tmp_path / "packed.safetensors", tied="untie")
    assert isinstance(model.token_embedding, PackedEmbedding)
    assert torch.equal(model.head.weight, model.token_embedding(torch.arange(60)))
    with pytest.raises(ValueError, match="tied is 'both'; choose 'refuse', 'share' or 'untie'"):
        load_checkpoint(model, tmp_path / "packed.safetensors", tied="both")


def test_the_rows_of_an_untied_layer_are_finite(tmp_path):
    """The highest level of the table lies above what float16 can hold."""
    trained = LanguageModel().half()
    with torch.no_grad():
        trained.head.weight[:] = torch.tensor([-65504, 65504, 0, 100, -100, 5, 6, 7])
    save_file(
        {name: value for name, value in trained.state_dict().items() if "head" not in name},
        tmp_path / "float.safetensors",
    )
    embpack.quantize_file(tmp_path / "float.safetensors", tmp_path / "packed.safetensors", method="asym")
    with torch.device("meta"):
        model = LanguageModel()
    load_checkpoint(model, tmp_path / "packed.safetensors", tied="untie")
    assert model.head.weight.dtype == torch.float16
    assert model.head.weight[:, 1].tolist() == model.token_embedding(torch.arange(60))[:, 1].tolist() == [65504] * 60


@pytest.mark.parametrize("name", ["token_embedding.weight", "head.weight"])
def test_floats_that_are_tied_may_be_in_the_file_once(tmp_path, name):
    trained = nn.ModuleDict({"language": LanguageModel(), "user_embedding": nn.Embedding(40, 4)})
    state = trained.state_dict()
    for twin in ("language.token_embedding.weight", "language.head.weight"):
        if twin != f"language.{name}":
            del state[twin]
    save_file(state, tmp_path / "float.safetensors")
    embpack.quantize_file(tmp_path / "float.safetensors", tmp_path / "packed.safetensors", exclude=["language.*"])
    with torch.device("meta"):
        model = nn.ModuleDict({"language": LanguageModel(), "user_embedding": nn.Embedding(40, 4)})
    load_checkpoint(model, tmp_path / "packed.safetensors")
    language = model["language"]
    assert torch.equal(language.head.weight, trained["language"].head.weight)
    assert language.head.weight.data_ptr() == language.token_embedding.weight.data_ptr()


class Translator(nn.Module):
    """Names of one weight as T5 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.encoder, self.decoder = (nn.Embedding(20, 4) for _ in range(3))
        self.head = nn.Linear(4, 20, bias=False)
        self.other = nn.Embedding(20, 4)
        self.encoder.weight = self.decoder.weight = self.head.weight = self.shared.weight


EMBEDDINGS = ("shared", "encoder", "decoder")
WAYS = ("absent", "float", "packed")


def write_translator(folder, ways):
    """A file with another table, and a weight of other values under each name that is there."""
    weights = {f"{name}.weight": torch.rand(20, 4) for name, way in ways.items() if way != "absent"}
    torch.save({**weights, "other.weight": torch.rand(20, 4)}, folder / "float.bin")
    packed = [f"{name}.weight" for name, way in ways.items() if way == "packed"]
    globs = {
        "include": [*packed, "other.weight"],
        # Its name says that it is a table.
        "exclude": ["shared.weight"] if ways["shared"] == "float" else [],
    }
    embpack.quantize_file(folder / "float.bin", folder / "packed.safetensors", **globs)
    return weights, embpack.load(folder / "packed.safetensors")


@pytest.mark.parametrize("head", WAYS)
def test_a_weight_may_be_there_under_any_of_its_names(tmp_path, head):
    """Packed or not: each module gets what has its own name."""
    path = tmp_path / "packed.safetensors"
    for embeddings in product(WAYS, repeat=3):
        ways = {**dict(zip(EMBEDDINGS, embeddings, strict=True)), "head": head}
        weights, tables = write_translator(tmp_path, ways)
        model, any_packed = Translator(), "packed" in ways.values()
        if not weights:
            with pytest.raises(ValueError, match=r"it lacks shared\.weight, encoder\.weight, decoder\.weight, head"):
                load_checkpoint(model, path)
            continue
        if head == "packed" and set(embeddings) == {"float"}:
            with pytest.raises(ValueError, match=r"head is a Linear, but a packed.* --exclude 'head\.weight'"):
                load_checkpoint(model, path, tied="untie")
            continue
        if head == "packed" or (head == "absent" and "float" not in embeddings):
            with pytest.raises(ValueError, match=r"head\.weight is also .*, which is packed: .*tied='untie'"):
                load_checkpoint(Translator(), path)
        load_checkpoint(model, path, tied="untie")
        first_float = next((f"{name}.weight" for name, way in ways.items() if way == "float"), None)
        first_table = next((f"{name}.weight" for name, way in ways.items() if way == "packed"), None)
        for name in EMBEDDINGS:
            module, own = getattr(model, name), f"{name}.weight"
            if ways[name] == "packed" or (ways[name] == "absent" and any_packed):
                table = tables[own if ways[name] == "packed" else first_table]
                np.testing.assert_array_equal(module.table.packed, table.packed)
            else:
                assert torch.equal(module.weight, weights[own if own in weights else first_float])
        if head == "float":
            wanted = weights["head.weight"]
        elif head == "absent" and first_float is not None:
            wanted = weights[first_float]
        else:
            wanted = torch.from_numpy(tables[first_table if head == "absent" else "head.weight"].dequantize())
        assert torch.equal(model.head.weight, wanted)


def test_floats_of_one_weight_stay_one_if_they_are_equal(tmp_path):
    torch.save(Translator().state_dict(), tmp_path / "float.bin")
    globs = {"include": ["other.weight"], "exclude": ["shared.weight"]}
    embpack.quantize_file(tmp_path / "float.bin", tmp_path / "packed.safetensors", **globs)
    model = load_checkpoint(Translator(), tmp_path / "packed.safetensors")
    assert len({getattr(model, name).weight.data_ptr() for name in (*EMBEDDINGS, "head")}) == 1


def test_a_module_in_two_places_is_packed_if_one_of_its_names_is(tmp_path):
    towers = nn.ModuleDict({"query": nn.Embedding(20, 4)})
    towers["title"] = towers["query"]
    torch.save(towers.state_dict(), tmp_path / "float.bin")
    embpack.quantize_file(tmp_path / "float.bin", tmp_path / "packed.safetensors", include=["title.weight"])
    model = load_checkpoint(towers, tmp_path / "packed.safetensors")
    assert isinstance(model["query"], PackedEmbedding) and model["title"] is model["query"]


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_transposed_weight_is_another(tmp_path, device):
    def make():
        model = nn.ModuleDict({"embedding": nn.Embedding(16, 16), "decoder": nn.Linear(16, 16, bias=False)})
        model["decoder"].weight = nn.Parameter(model["embedding"].weight.T)
        return model

    weight = make()["embedding"].weight.detach()
    save_file({"embedding.weight": weight}, tmp_path / "float.safetensors")
    embpack.quantize_file(tmp_path / "float.safetensors", tmp_path / "packed.safetensors")
    with torch.device(device):
        model = make()
    with pytest.raises(ValueError, match=r"it lacks decoder\.weight"):
        load_checkpoint(model, tmp_path / "packed.safetensors", tied="untie")


def test_models_that_cannot_be_loaded_into_are_named(tmp_path):
    path = make_checkpoint(tmp_path, Recommender())
    with pytest.raises(ValueError, match="embedding is packed already; load the file into the model as it was before"):
        load_checkpoint(load_checkpoint(Recommender(), path), path)
    with pytest.raises(ValueError, match=r"no embedding for item_emb.*; it has module\.user_embedding\.weight, module"):
        load_checkpoint(nn.ModuleDict({"module": Recommender()}), path)
    with pytest.raises(
        ValueError, match=r"itself an nn\.Embedding, .*; use PackedEmbedding\.from_table\(embpack\.load"
    ):
        load_checkpoint(nn.Embedding(3, 4), path)
    with pytest.raises(TypeError, match=r"model is dict; load_checkpoint loads a file into a torch\.nn\.Module"):
        load_checkpoint({}, path)
    without = Recommender()
    without.bottom = nn.Linear(1, 1, bias=False)
    with pytest.raises(ValueError, match=r"does not go with the model: it lacks bottom\.weight$"):
        load_checkpoint(without, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_language_model_of_transformers_opens(tmp_path, dtype):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=16, vocab_size=100, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    trained = transformers.GPT2LMHeadModel(config).eval().to(dtype)
    trained.save_pretrained(tmp_path)
    embpack.quantize_file(tmp_path / "model.safetensors", tmp_path / "packed.safetensors", include=["*.wte.weight"])
    model = load_checkpoint(transformers.GPT2LMHeadModel(config).eval(), tmp_path / "packed.safetensors", tied="untie")
    assert isinstance(model.transformer.wte, PackedEmbedding)
    tokens = torch.arange(10)[None]
    found, wanted = model(tokens).logits, trained(tokens).logits
    assert found.dtype == wanted.dtype == dtype
    assert torch.nn.functional.cosine_similarity(found.float().flatten(), wanted.float().flatten(), dim=0) > 0.98
    assert model.generate(tokens, max_new_tokens=2, do_sample=False, pad_token_id=0).shape[1] > 10


def make_t5(transformers):
    config = transformers.T5Config(
        vocab_size=100, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def make_bert(transformers):
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    return transformers.BertForMaskedLM(config)


def make_gpt2(transformers):
    config = transformers.GPT2Config(vocab_size=100, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def make_llama(transformers):
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def run(model):
    tokens = torch.arange(10)[None]
    more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    return model(input_ids=tokens, **more).logits


@pytest.mark.parametrize("make", [make_t5, make_bert, make_gpt2, make_llama])
def test_a_tied_model_of_transformers_is_untied(tmp_path, make):
    """It says itself what is tied still, so that tie_weights and save_pretrained go on working."""
    transformers = pytest.importorskip("transformers")
    model = make(transformers).eval()
    with pytest.raises(ValueError, match=r"which stays float: pass tied='share' .* tied='untie'"):
        quantize_(model)
    head = model.get_output_embeddings().weight
    quantize_(model, tied="untie")
    assert isinstance(model.get_input_embeddings(), PackedEmbedding)
    wanted = run(model)
    model.tie_weights()
    assert model.get_output_embeddings().weight is head
    assert torch.equal(run(model), wanted)
    model.save_pretrained(tmp_path)
    other = make(transformers).eval()
    quantize_(other, tied="untie")
    load_model(other, tmp_path / "model.safetensors")
    assert torch.equal(run(other), wanted)


def test_a_model_of_transformers_may_be_packed_in_parts(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = make_t5(transformers).eval()
    for names in (("shared",), ("encoder.embed_tokens", "decoder.embed_tokens")):
        quantize_(model, tied="untie", filter=lambda module, name, names=names: name in names)
        wanted = run(model)
        model.tie_weights()
        model.save_pretrained(tmp_path)
        assert torch.equal(run(model), wanted)
    assert model.decoder.embed_tokens.packed is model.encoder.embed_tokens.packed
    assert model.decoder.embed_tokens.packed is not model.shared.packed


def test_a_model_that_declares_what_is_not_there_is_packed_all_the_same():
    class Declaring(nn.ModuleDict):
        def get_expanded_tied_weights_keys(self):
            raise ValueError("There is an issue with your definition of `tie_weights_keys`")

    model = Declaring({"token": nn.Embedding(20, 4)})
    quantize_(model)
    assert isinstance(model["token"], PackedEmbedding)


@pytest.mark.parametrize(("include", "exclude"), [((), ("shared.weight",)), ((), ()), (("lm_head.weight",), ())])
def test_t5_opens_from_a_file_with_all_names_of_its_weight(tmp_path, include, exclude):
    transformers = pytest.importorskip("transformers")
    trained = make_t5(transformers).eval()
    torch.save(trained.state_dict(), tmp_path / "pytorch_model.bin")
    globs = {"include": include, "exclude": exclude}
    embpack.quantize_file(tmp_path / "pytorch_model.bin", tmp_path / "packed.safetensors", **globs)
    model = make_t5(transformers).eval()
    load_checkpoint(model, tmp_path / "packed.safetensors", tied="untie" if "lm_head.weight" in include else "refuse")
    assert isinstance(model.encoder.embed_tokens, PackedEmbedding)
    assert isinstance(model.shared, PackedEmbedding) == ("shared.weight" not in exclude)
    assert torch.equal(model.lm_head.weight, trained.lm_head.weight) == ("lm_head.weight" not in include)
    wanted = run(model)
    assert torch.nn.functional.cosine_similarity(wanted.flatten(), run(trained).flatten(), dim=0) > 0.98
    model.tie_weights()
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(run(model), wanted)
