"""Which tensors are packed."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from embpack.formats import Checkpoint, Shard, SourceTensor
from embpack.rules import Rules, decide_all
from embpack.table_names import says_embedding
from embpack.variant import Variant

TABLES = [
    "embedding.weight",
    "embeddings.word_embeddings.weight",
    "embeddings.position_embeddings.weight",
    "model.embed_tokens.weight",
    "decoder.embed_positions.weight",
    "transformer.wte.weight",
    "shared.weight",
    "model.shared.weight",
    "transformer.wpe.weight",
    "tok_embeddings.weight",
    "user_emb.weight",
    "emb_l.0.weight",
    "embedding_user.weight",
    "userEmbedding.weight",
    "ebc.embedding_bags.t_user.weight",
    "embeddings",
    "0.embedding.weight",
    "item_embedding_12.weight",
    # Tables of language models, and as llama.cpp calls them; TorchRec's collections.
    "layers.1.engram.embed.weight",
    "model.language_model.layers.1.ple.ple_embedding.ngram_embedding.weight",
    "model.ngram_embeddings.embedders.0.weight",
    "model.language_model.embed_tokens_per_layer.weight",
    "model.language_model.embed_vision.embedding.weight",
    "token_embd.weight",
    "per_layer_token_embd.weight",
    "blk.1.engram_embd.weight",
    "position_embd.weight",
    "model.sparse.ec.embeddings.t_user.weight",
    "ec.embeddings.large_table.weight",
    "decoder.embed_tokens.3.weight",
    "class_embedding.weight",
    # Of a dict of a training state, beside its optimizer.
    "state.model.embed_tokens.weight",
]
OTHERS = [
    "embeddings.LayerNorm.weight",
    "encoder.layer.0.attention.self.query.weight",
    "lm_head.weight",
    "embed_out.weight",
    "deberta.embeddings.embed_proj.weight",
    "albert.encoder.embedding_hidden_mapping_in.weight",
    "mobilebert.embeddings.embedding_transformation.weight",
    "electra.embeddings_project.weight",
    "time_embedding.linear_1.weight",
    "embeddings.patch_embeddings.projection.weight",
    "member.weight",
    "remember_item.weight",
    "embeddings.norm.weight",
    "weight",
    "0.weight",
    "",
    # Scales, and what else lies beside codes.
    "layers.1.engram.embed.scale",
    "model.embed_tokens.weight_scale",
    "model.embed_tokens.weight_scale_inv",
    "model.embed_tokens.weight_zero_point",
    "model.embed_tokens.weight_packed",
    "ple.ple_embedding.ngram_embedding.weight_scale_2",
    "model.embed_tokens.weight.absmax",
    "ple.ple_embedding.ngram_embedding.trellis",
    "ple.ple_embedding.ngram_heads_offsets",
    # Layers of language models.
    "model.ngram_embeddings.post_projs.0.weight",
    "model.language_model.per_layer_model_projection.weight",
    "model.language_model.layers.0.per_layer_projection.weight",
    "model.language_model.layers.0.per_layer_input_gate.weight",
    "model.embed_vision.embedding_projection.weight",
    "layers.1.engram.wkv.weight",
    "token_embd_norm.weight",
    "blk.0.attn_q.weight",
    "output.weight",
    "model.rotary_emb.inv_freq",
    "layers.0.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    # Layers of encoders, of pictures and of diffusion models.
    "position_embeddings.proj.weight",
    "fnet.embeddings.projection.weight",
    "esm.embeddings.layer_norm.weight",
    "layoutlm.embeddings.dense.weight",
    "lilt.layout_embeddings.box_linear_embeddings.weight",
    "vision_model.embeddings.patch_embedding.weight",
    "vit.embeddings.patch_embeddings.projection.weight",
    "visual.patch_embed.proj.weight",
    "v.patch_embd.weight",
    "wav2vec2.encoder.pos_conv_embed.conv.weight",
    "model.diffusion_model.time_embed.0.weight",
    "model.diffusion_model.time_embed.2.weight",
    "model.diffusion_model.label_emb.0.0.weight",
    "model.diffusion_model.input_blocks.1.0.emb_layers.1.weight",
    "transformer.context_embedder.weight",
    "transformer.x_embedder.weight",
    "time_text_embed.timestep_embedder.linear_1.weight",
    "add_embedding.linear_2.weight",
    # What optimizers and collections keep of tables.
    "state.ebc.embedding_bags.t_user.weight.t_user.momentum1",
    "state.ebc.embedding_bags.user_emb.weight.exp_avg",
    "optim.state.user_emb.weight",
    "optimizer.state.embeddings.t_user.weight",
    "ebc.embedding_bags.t_user.weight.t_user.momentum1",
    "ec.embeddings.embeddings.weight.embeddings.momentum1",
    "ebc.embedding_bags.t_user.weight_id",
    "ebc.embedding_bags.t_user.bucket",
    "user_emb.weight.exp_avg_sq",
]


@pytest.mark.parametrize("name", TABLES)
def test_names_that_say_embedding(name):
    assert says_embedding(name)


@pytest.mark.parametrize("name", OTHERS)
def test_names_that_do_not(name):
    assert not says_embedding(name)


def make_tensor(name, shape=(100, 64), dtype="F32", **kwargs):
    return SourceTensor(name, shape, dtype, lambda start, stop, n: iter(()), None, **kwargs)


def make_checkpoint(*tensors):
    return Checkpoint(Path("model.safetensors"), (Shard("model.safetensors", 0, tensors, {}),), None, ())


def decide(tensor, **rules):
    return Rules(**rules).decide(tensor)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_float_table_is_packed(dtype):
    decision = decide(make_tensor("user_emb.weight", dtype=dtype))
    assert decision.row_format is not None
    assert decision.row_format.row_bytes == 36
    assert decision.bytes_after == 3600
    assert decision.bytes_before == 100 * 64 * (4 if dtype == "F32" else 2)
    assert decision.reason == "name says embedding"


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (make_tensor("emb.weight", (64,)), "^1-D, a table is 2-D$"),
        (make_tensor("emb.weight", (2, 3, 4)), "^3-D, a table is 2-D$"),
        (make_tensor("emb.weight", (0, 4)), "^empty$"),
        (make_tensor("emb.weight", (5, 0)), "^empty$"),
        (make_tensor("emb.weight", dtype="I64"), "I64, not float32"),
        (make_tensor("emb.weight", dtype="F64"), "F64, not float32"),
        (make_tensor("linear.weight"), "does not say embedding"),
        (make_tensor("token_type_embeddings.weight", (15, 64)), "^fewer than 16 rows"),
        (make_tensor("emb.weight", (100, 1)), "^packed rows would be no smaller: 400 -> 500 bytes$"),
        (make_tensor("emb.weight", (100, 2), dtype="F16"), "no smaller: 400 -> 500 bytes"),
    ],
)
def test_what_is_not_packed_says_why(tensor, reason):
    decision = decide(tensor)
    assert decision.row_format is None
    assert decision.bytes_after == decision.bytes_before
    assert re.search(reason, decision.reason)


def test_include_and_exclude():
    assert decide(make_tensor("linear.weight"), include=("lin*",)).reason == "included"
    assert decide(make_tensor("emb.weight", (100, 1)), include=("emb*",)).row_format is not None
    assert decide(make_tensor("emb.weight", (2, 64)), include=("emb*",)).row_format is not None
    assert decide(make_tensor("emb.weight"), exclude=("emb.*",)).reason == "excluded"
    assert decide(make_tensor("emb.weight"), include=("*",), exclude=("emb.*",)).row_format is None


def test_sixteen_rows_are_enough():
    assert decide(make_tensor("emb.weight", (16, 64))).row_format is not None


def test_vectors_need_no_name():
    assert decide(make_tensor("glove", is_vectors=True)).reason == "format holds vectors"


def test_plan_keeps_every_tensor_in_order():
    checkpoint = make_checkpoint(make_tensor("linear.weight"), make_tensor("emb.weight"))
    assert [d.tensor.name for d in decide_all(checkpoint, Rules())] == ["linear.weight", "emb.weight"]


def refuse(*tensors, left_out=(), **rules):
    """What decide_all says of a checkpoint."""
    checkpoint = replace(make_checkpoint(*tensors), left_out=left_out)
    with pytest.raises(ValueError, match=r"^model\.safetensors: ") as refused:
        decide_all(checkpoint, Rules(**rules))
    return str(refused.value).removeprefix("model.safetensors: ")


def test_nothing_to_pack_names_what_include_would_pack():
    linear, bias, double = make_tensor("linear.weight"), make_tensor("bias", (3,)), make_tensor("emb", dtype="F64")
    few = make_tensor("type_emb", (4, 64))
    assert refuse(linear, bias) == (
        "nothing to pack; name those that are tables with --include: linear.weight (name does not say embedding)"
    )
    assert refuse(double) == (
        "nothing to pack; convert to float32 what is a table: emb (F64, not float32, float16 or bfloat16)"
    )
    assert refuse(few, double) == (
        "nothing to pack; name those that are tables with --include: type_emb (fewer than 16 rows: much used, and "
        "little to save); convert to float32 what is a table: emb (F64, not float32, float16 or bfloat16)"
    )
    assert refuse(bias, left_out=("column 'a\nb' (string)",)) == (
        r"nothing to pack; its tensors are bias (1-D, a table is 2-D); left out: column 'a\nb' (string)"
    )
    assert refuse() == "nothing to pack; it has no tensor that can be read"
    assert refuse(make_tensor("emb"), exclude=["e*"]) == "nothing to pack; its tensors are emb (excluded)"
    for tensor in (linear, few):
        assert decide(tensor, include=(tensor.name,)).variant is not None


def test_an_include_that_packs_nothing_says_what_was_left_out():
    left_out = ("entry 'emb' (sparse tensor; save its .to_dense())",)
    said = refuse(make_tensor("bias", (3,)), left_out=left_out, include=["*"])
    assert said == f"include '*' only matches bias (1-D, a table is 2-D); left out: {left_out[0]}"


def test_the_longest_of_many_tensors_is_named_first():
    tensors = [make_tensor(f"layer.{i}.weight", (64, 64)) for i in range(20)]
    assert "--include: lookup.weight (" in refuse(*tensors, make_tensor("lookup.weight", (3000, 64)))


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_glob_that_matches_nothing_is_an_error(option):
    tensors = [make_tensor(f"{name}.weight") for name in ("user_emb", "item_emb", "linear")]
    said = refuse(*tensors, **{option: ["*", "usr_*"]})
    assert said.startswith(f"{option} 'usr_*' matches no tensor; nearest: user_emb.weight, ")
    # What is meant may be there, but of a kind that cannot be read.
    left_out = ("entry 'sparse' (sparse tensor; save its .to_dense())",)
    for rules in ({option: ["sparse"]}, {"variants": {"sparse": Variant()}}):
        assert refuse(*tensors, left_out=left_out, **rules).endswith(f"; left out: {left_out[0]}")
    with pytest.raises(TypeError, match=rf"{option} is 'user\*'; give a list of globs: \['user\*'\]"):
        Rules(**{option: "user*"})


def test_an_include_that_packs_nothing_is_an_error():
    tensors = make_tensor("emb.weight"), make_tensor("ids", (9,), "I64"), make_tensor("a_emb", dtype="F64")
    assert refuse(*tensors, include=["ids"]) == "include 'ids' only matches ids (1-D, a table is 2-D)"
    assert refuse(*tensors, include=["a*"]) == (
        "include 'a*' only matches a_emb (F64, not float32, float16 or bfloat16); convert to float32 what is a table"
    )


def test_variants_of_what_is_no_table_are_an_error():
    tensors, variant = (make_tensor("emb.weight"), make_tensor("linear.weight")), Variant(bits=8)
    assert refuse(*tensors, variants={"emb.wieght": variant}) == (
        "variants (--set) name 'emb.wieght', but there is no such tensor; nearest: emb.weight, linear.weight"
    )
    assert refuse(*tensors, variants={"linear.weight": variant}) == (
        "variants (--set) name 'linear.weight', which is no table: linear.weight (name does not say embedding); "
        "include or drop it"
    )
    # A plan of more tables than are packed, and one with a table that is better left alone.
    variants = {"emb.weight": variant, "linear.weight": variant, "b_emb": variant}
    checkpoint = make_checkpoint(*tensors, make_tensor("b_emb", (100, 2)))
    rules = Rules(include=["lin*"], exclude=["emb*"], variants=variants)
    assert [each.variant for each in decide_all(checkpoint, rules)] == [None, variant, None]


def test_a_table_of_which_a_method_has_no_rows_is_named():
    said = refuse(make_tensor("emb"), make_tensor("a b_emb", (100, 3)), variant=Variant("trellis"))
    assert said == (
        "a b_emb: embedding_dim is 3; a row of the trellis layout has 4 to 65536 values; leave it as it is with "
        "--exclude 'a b_emb'"
    )


def test_names_in_messages_are_printable():
    said = refuse(make_tensor("\x1b[31ma\nb"))
    assert r"--include: \x1b[31ma\nb (name" in said and said.isprintable()


def test_bits_and_parameters_reach_the_rows():
    decision = decide(make_tensor("emb.weight"), variant=Variant(bits=8))
    assert decision.row_format is not None
    assert decision.row_format.row_bytes == 64 + 8
    decision = decide(make_tensor("emb.weight"), variant=Variant(bits=2, param_dtype="float32"))
    assert decision.row_format is not None
    assert decision.row_format.row_bytes == 16 + 8
