"""Language models of transformers, made from small configurations, with one packed table for tokens and logits."""

import copy

import pytest
import torch
from torch import nn

import embpack
from embpack.torch import PackedEmbedding, PackedLinear, load_checkpoint, quantize_

transformers = pytest.importorskip("transformers")

VOCABULARY, DIM = 160, 32
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": DIM,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    **TOKENS,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": DIM,
    "d_kv": 16,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    **TOKENS,
}
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=DIM, n_layer=2, n_head=2, n_positions=40, **TOKENS
    ),
    "llama": lambda: transformers.LlamaConfig(**DECODER),
    "qwen2": lambda: transformers.Qwen2Config(**DECODER),
    "qwen3": lambda: transformers.Qwen3Config(**DECODER, head_dim=16),
    "t5": lambda: transformers.T5Config(**T5),
}
MODELS = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(autouse=True)
def one_thread():
    """More would take longer to start than such small models take."""
    before = torch.get_num_threads(), embpack.get_num_threads()
    torch.set_num_threads(1)
    embpack.set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    embpack.set_num_threads(before[1])


def make(config):
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    return kind.from_config(config).eval()


def make_random(name, **more):
    """A model whose tokens differ: new ones repeat one token."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    for key, value in more.items():
        setattr(config, key, value)
    model = make(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model


def is_of_tokens(module, name):
    return module.num_embeddings == VOCABULARY


def pack(model, **options):
    return quantize_(model, tied="share", filter=is_of_tokens, **options)


def generate(model, *, cached=True):
    prompt = torch.tensor([[5, 17, 30, 4], [9, 9, 80, 3]])
    new = {"max_new_tokens": 10, "min_new_tokens": 10}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, use_cache=cached, **new)


def dequantize(packed):
    """The float model that has the rows of a packed one."""
    model = make_random(packed.config.model_type)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(packed.get_input_embeddings().weight)
    return model


@MODELS
@pytest.mark.parametrize(
    "options", [{}, {"method": "trellis"}, {"rotate": "hadamard"}], ids=["4 bits", "trellis", "rotated"]
)
def test_tokens_are_those_of_the_float_model_with_the_same_rows(name, options):
    model = make_random(name)
    report = pack(model, **options)
    assert isinstance(model.get_input_embeddings(), PackedEmbedding)
    assert isinstance(model.get_output_embeddings(), PackedLinear)
    assert model.get_output_embeddings().packed is model.get_input_embeddings().packed
    saved = VOCABULARY * DIM * 4 - model.get_input_embeddings().table.nbytes
    assert report.bytes_before - report.bytes_after == saved - 64 * len(report.tables)
    wanted = dequantize(model)
    found = generate(model)
    assert len(set(found[0].tolist())) > 3
    assert torch.equal(found, generate(wanted))
    assert torch.equal(found, generate(model, cached=False))


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_a_bfloat16_model_stays_one(name):
    model = make_random(name).bfloat16()
    pack(model)
    wanted = dequantize(model).bfloat16()
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16
    assert generate(model).shape == generate(wanted).shape
    tokens = torch.arange(20).reshape(2, 10)
    more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    found, expected = (each(input_ids=tokens, **more).logits for each in (model, wanted))
    assert found.dtype == torch.bfloat16
    # Logits of rows that are rounded to 8 bits, and those of the same rows unrounded.
    assert (found - expected).float().norm() / expected.float().norm() < 2**-7


@MODELS
def test_a_packed_model_is_saved_and_opened_again(tmp_path, name):
    model = make_random(name)
    report = pack(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < report.bytes_after + 10_000  # of names
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    opened = load_checkpoint(make(config), tmp_path / "model.safetensors", tied="share")
    assert opened.get_output_embeddings().packed is opened.get_input_embeddings().packed
    assert torch.equal(generate(opened), generate(model))
    opened.save_pretrained(tmp_path / "again")
    first, second = (folder / "model.safetensors" for folder in (tmp_path, tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    sharded = load_checkpoint(make(config), tmp_path / "shards", tied="share")
    assert torch.equal(generate(sharded), generate(model))


@MODELS
def test_a_packed_file_is_served_without_floats(tmp_path, name):
    model = make_random(name)
    model.save_pretrained(tmp_path)
    table = model.get_input_embeddings()
    [tokens] = [key for key, module in model.named_modules() if module is table]
    embpack.quantize_file(tmp_path / "model.safetensors", tmp_path / "packed.safetensors", include=[f"{tokens}.weight"])
    served = load_checkpoint(make(model.config), tmp_path / "packed.safetensors", tied="share")
    assert isinstance(served.get_output_embeddings(), PackedLinear)
    # GPT-2's positions are packed, too.
    quantize_(model, tied="share", filter=lambda _, name: isinstance(served.get_submodule(name), PackedEmbedding))
    assert torch.equal(generate(served), generate(model))


@MODELS
def test_tie_weights_leaves_a_packed_model_as_it_is(name):
    model = make_random(name)
    pack(model)
    wanted = generate(model)
    model.tie_weights()
    assert model.get_output_embeddings().packed is model.get_input_embeddings().packed
    assert torch.equal(generate(model), wanted)
    twin = copy.deepcopy(model)
    twin.tie_weights()
    assert twin.get_output_embeddings().packed is twin.get_input_embeddings().packed
    assert torch.equal(generate(twin), wanted)


@MODELS
def test_a_packed_model_is_not_resized(name):
    model = make_random(name)
    pack(model)
    wanted = generate(model)
    with pytest.raises(ValueError, match="is packed and has 160 rows, not 170: resize the model before it is packed"):
        model.resize_token_embeddings(170)
    with pytest.raises(ValueError, match="is packed and has 160 rows, not 192"):
        copy.deepcopy(model).resize_token_embeddings(pad_to_multiple_of=64)
    for same in ({}, {"new_num_tokens": VOCABULARY}, {"pad_to_multiple_of": 32}):
        assert model.resize_token_embeddings(**same) is model.get_input_embeddings()
    assert torch.equal(generate(model), wanted)
    resized = make_random(name)
    resized.resize_token_embeddings(170, mean_resizing=False)
    quantize_(resized, tied="share", filter=lambda module, name: module.num_embeddings == 170)
    assert resized.get_output_embeddings().out_features == 170


@MODELS
def test_weights_of_a_packed_model_can_be_read(name):
    model = make_random(name)
    pack(model)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert module.weight.shape == (VOCABULARY, DIM) and module.weight.dtype == model.dtype
        assert torch.equal(module.weight, module.to_float().weight)
    with pytest.raises(TypeError, match="packed rows, which cannot be written to"):
        model.get_input_embeddings().weight.data[3] = 0.0


def test_t5_scales_its_hidden_values_before_the_layer():
    scaled, plain = (make_random("t5", scale_decoder_outputs=scales) for scales in (True, False))
    tokens = torch.arange(10)[None]
    logits = []
    for model in (scaled, plain):
        pack(model)
        logits.append(model(input_ids=tokens, decoder_input_ids=tokens).logits)
    torch.testing.assert_close(logits[0] * DIM**0.5, logits[1])


def test_an_output_layer_of_its_own_stays_float(tmp_path):
    """As T5 1.1 has it."""
    model = make_random("t5", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight = nn.Parameter(torch.randn(VOCABULARY, DIM))
    head = model.lm_head
    report = pack(model)
    assert model.lm_head is head and report.untied == ()
    assert isinstance(model.shared, PackedEmbedding)
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    opened = load_checkpoint(make(config), tmp_path / "model.safetensors", tied="share")
    assert torch.equal(opened.lm_head.weight, head.weight)
    assert torch.equal(generate(opened), generate(model))


def test_a_bias_of_the_layer_stays_tied():
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=DIM, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    model = transformers.BertForMaskedLM(config).eval()
    bias = model.cls.predictions.bias
    pack(model)
    model.tie_weights()
    decoder = model.cls.predictions.decoder
    assert isinstance(decoder, PackedLinear) and decoder.bias is bias and model.cls.predictions.bias is bias


def test_training_goes_on_around_a_packed_table():
    model = make_random("llama").train()
    pack(model)
    tokens = torch.arange(12).reshape(2, 6)
    model(input_ids=tokens, labels=tokens).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    wanted = make_random("llama").train()
    with torch.no_grad():
        wanted.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight)
    wanted(input_ids=tokens, labels=tokens).loss.backward()
    name = "model.layers.0.mlp.up_proj.weight"
    found, expected = (dict(each.named_parameters())[name].grad for each in (model, wanted))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=expected.abs().max().item() * 1e-5)
