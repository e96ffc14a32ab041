"""Which tensors are packed."""

import re
from pathlib import Path

import pytest

from embpack.formats import Checkpoint, Shard, SourceTensor
from embpack.rules import Rules, decide_all, says_embedding
from embpack.variant import Variant

TABLES = [
    "embedding.weight",
    "embeddings.word_embeddings.weight",
    "embeddings.position_embeddings.weight",
    "model.embed_tokens.weight",
    "decoder.embed_positions.weight",
    "transformer.wte.weight",
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
]


@pytest.mark.parametrize("name", TABLES)
def test_names_that_say_embedding(name):
    assert says_embedding(name)


@pytest.mark.parametrize("name", OTHERS)
def test_names_that_do_not(name):
    assert not says_embedding(name)


def make_tensor(name, shape=(100, 64), dtype="F32", **kwargs):
    return SourceTensor(name, shape, dtype, lambda start, stop, n: iter(()), **kwargs)


def make_checkpoint(*tensors):
    return Checkpoint(Path("model.safetensors"), (Shard("model.safetensors", tensors, {}),), None, ())


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


def test_nothing_to_pack_names_the_candidates():
    checkpoint = make_checkpoint(make_tensor("linear.weight"), make_tensor("bias", (3,)))
    with pytest.raises(ValueError, match=r"nothing to pack among 2 tensors; its 2-D tensors are linear\.weight"):
        decide_all(checkpoint, Rules())
    with pytest.raises(ValueError, match="it has no 2-D tensor"):
        decide_all(make_checkpoint(make_tensor("bias", (3,))), Rules())


def test_an_include_that_packs_nothing_is_an_error():
    checkpoint = make_checkpoint(make_tensor("emb.weight"), make_tensor("ids", (9,), "I64"))
    with pytest.raises(ValueError, match=r"include 'user\*' matches no tensor"):
        decide_all(checkpoint, Rules(include=("user*",)))
    with pytest.raises(ValueError, match=r"include 'ids' only matches ids \(1-D, a table is 2-D\)"):
        decide_all(checkpoint, Rules(include=("ids",)))


def test_bits_and_parameters_reach_the_rows():
    decision = decide(make_tensor("emb.weight"), variant=Variant(bits=8))
    assert decision.row_format is not None
    assert decision.row_format.row_bytes == 64 + 8
    decision = decide(make_tensor("emb.weight"), variant=Variant(bits=2, param_dtype="float32"))
    assert decision.row_format is not None
    assert decision.row_format.row_bytes == 16 + 8
