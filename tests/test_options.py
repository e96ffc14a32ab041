"""What chooses how tables are packed: patterns, restrictions of a plan, readers; in Python and on the command line."""

import re

import numpy as np
import pytest
from checkpoints import Arrays, write_safetensors

import embpack
from embpack import Variant
from embpack.planning import VARIANTS
from embpack.selection import keep_readable, select_variants
from embpack.variant import parse_variant


@pytest.fixture
def weights(rng):
    return {
        "user_emb.weight": rng.standard_normal((300, 32), np.float32),
        "user_emb[2].weight": rng.standard_normal((200, 32), np.float32),
        "item_emb.weight": rng.standard_normal((400, 15), np.float32),
    }


@pytest.fixture
def model(tmp_path, weights):
    return write_safetensors(tmp_path, Arrays(weights, {"top.weight": np.ones((8, 8), np.float32)}))


def packed_ways(path):
    """How each table of a file is packed."""
    return {
        name: (table.method.partition(":")[0], table.bits, table.row_format.param_dtype, table.rotation)
        for name, table in embpack.load(path, verify=True).items()
    }


# One way to pack a table, as text


@pytest.mark.parametrize(
    ("text", "variant"),
    [
        ("asym", Variant("asym")),
        ("trellis:bits=3.5,rotate=hadamard", Variant("trellis", 3.5, rotate="hadamard")),
        ("greedy:b=1000,bits=8,r=0.5,param-dtype=float16", Variant("greedy:b=1000,r=0.5", 8, "float16")),
        ("optimal:param_dtype=float32,rotate=none", Variant("optimal", 4, "float32")),
    ],
)
def test_a_variant_is_read(text, variant):
    assert parse_variant(text) == variant


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("best", "there is no method 'best'; choose one of asym, "),
        ("greedy:bit=3", "'greedy:bit=3' sets 'bit'; what can be set: bits, param_dtype, rotate, b, r"),
        ("greedy:bits=3.5", "bits is 3.5; choose 2, 4 or 8"),
        ("greedy:bits=many", "bits is 'many'; give a number"),
        ("greedy:rotate=twice", "rotation is 'twice'; choose None or one of 'hadamard'"),
        ("trellis:param_dtype=float16", "param_dtype is 'float16'; the trellis layout has 'float32'"),
    ],
)
def test_what_is_no_variant(text, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        parse_variant(text)


# What a plan chooses from


def test_restrictions_leave_what_a_plan_tries_of_that_kind():
    assert select_variants() == list(VARIANTS)
    assert select_variants(rotate=None) == [each for each in VARIANTS if each.rotate is None]
    assert select_variants(bits=(2, 3.5)) == [each for each in VARIANTS if each.bits in (2, 3.5)]
    assert select_variants("kmeans") == [each for each in VARIANTS if each.method == "kmeans"]
    assert {each.bits for each in select_variants("optimal:effort=fast")} == {2, 4, 8}


def test_restrictions_name_what_a_plan_does_not_try_by_itself():
    assert select_variants(["greedy:b=100", "asym"], bits=8, rotate=None) == [
        Variant("greedy:b=100", 8),
        Variant("asym", 8),
    ]
    assert select_variants("sym", rotate="hadamard") == [Variant("sym", bits, rotate="hadamard") for bits in (2, 4, 8)]
    of_halves = select_variants(param_dtype="float16")
    assert {each.method for each in of_halves} == {"optimal", "kmeans"}
    assert {each.param_dtype for each in of_halves} == {"float16"}


@pytest.mark.parametrize(
    ("restrictions", "message"),
    [
        ({"bits": 9}, "bits is 9; the trellis layout has 2 to 7"),
        ({"bits": [4, 3.7, 1]}, "bits is 1; the trellis layout has 2 to 7"),
        ({"methods": ["optimal", "trellis"], "bits": 3.5}, "bits is 3.5; choose 2, 4 or 8"),
        ({"methods": "trellis", "param_dtype": "float16"}, "param_dtype is 'float16'; the trellis layout has"),
        ({"methods": "best"}, "there is no method 'best'"),
        ({"rotate": "twice"}, "rotation is 'twice'"),
        ({"param_dtype": "float64"}, "param_dtype is 'float64'; choose"),
        ({"methods": []}, "there is nothing to choose from; give at least one"),
    ],
)
def test_restrictions_that_leave_nothing(restrictions, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        select_variants(**restrictions)


def test_what_others_read_is_kept_with_parameters_that_they_read():
    variants = [
        Variant("optimal", 8),
        Variant("optimal", 4),
        Variant("optimal", 4, rotate="hadamard"),
        Variant("kmeans"),
    ]
    assert keep_readable(variants, 16, ["fbgemm"]) == [Variant("optimal", 8, "float16"), Variant("optimal", 4)]
    assert keep_readable(variants, 15, ["torch"]) == [Variant("optimal", 8)]
    assert keep_readable(variants, 15, ["torch", "fbgemm"]) == []
    assert keep_readable(variants, 15, ["onnx"]) == variants
    assert keep_readable([Variant("optimal", 8, "float32")], 16, ["fbgemm"]) == []
    assert keep_readable([Variant("trellis")], 3, []) == [Variant("trellis")]


# Plans


def test_a_plan_chooses_what_all_readers_read(model, weights):
    for src in (model, weights):
        plan = embpack.plan(src, readable_by=["fbgemm", "onnx"])
        assert {table.name: table.variant for table in plan.tables} == {
            "user_emb.weight": Variant("optimal", 4, "float16"),
            "user_emb[2].weight": Variant("optimal", 4, "float16"),
            "item_emb.weight": Variant("optimal", 8, "float16"),  # there are no rows of 15 values at 4 bits
        }


def test_a_plan_that_no_reader_reads_is_refused_with_what_would_do(model, weights):
    for src in (model, weights):
        with pytest.raises(
            ValueError, match=r"item_emb.weight: has rows of the trellis .*; FBGEMM can read optimal at 8 b"
        ):
            embpack.plan(src, variants=[Variant("trellis", 3)], chosen={"user*": Variant()}, readable_by=["fbgemm"])
    with pytest.raises(ValueError, match="there is no reader 'faiss'; choose one of torch, fbgemm, torchrec, onnx"):
        embpack.plan(model, readable_by=["faiss"])


def test_a_plan_spreads_what_is_left_of_the_budget(model, weights):
    few = [Variant("asym", bits) for bits in (2, 4, 8)]
    for src in (model, weights):
        plan = embpack.plan(src, variants=few, chosen={"user*": Variant("sym", 8)}, max_bytes="40 %")
        ways = {table.name: (table.variant.method, table.variant.bits) for table in plan.tables}
        assert ways == {"user_emb.weight": ("sym", 8), "user_emb[2].weight": ("sym", 8), "item_emb.weight": ("asym", 8)}
        tight = embpack.plan(src, variants=few, chosen={"user*": Variant("sym", 8)}, max_bytes="31 %")
        assert {each.name: each.variant.bits for each in tight.tables if each.variant.method == "asym"} == {
            "item_emb.weight": 4
        }
    with pytest.raises(
        ValueError, match=r"user_emb\S+: has float32 parameters.*FBGEMM can read sym at 8 bits with float16"
    ):
        embpack.plan(model, variants=few, chosen={"user*": Variant("sym", 8)}, readable_by=["fbgemm"])


def test_a_plan_refuses_a_pattern_that_means_no_table(model, weights):
    for src in (model, weights):
        with pytest.raises(
            ValueError, match=r"variants \(--set\) name 'usr\*', but there is no such tensor; nearest: user"
        ):
            embpack.plan(src, chosen={"usr*": Variant()})


# Patterns


def test_tables_are_packed_by_pattern_and_the_last_counts(tmp_path, model):
    dst = tmp_path / "p.safetensors"
    variants = {"*": Variant("sym", 8), "user*": Variant("trellis", 2.5), "user_emb[2].weight": Variant("asym", 2)}
    embpack.quantize_file(model, dst, variants=variants)
    assert packed_ways(dst) == {
        "user_emb.weight": ("trellis", 2.5, "float32", None),
        "user_emb[2].weight": ("asym", 2, "float16", None),  # named, though as a glob it is another's name
        "item_emb.weight": ("sym", 8, "float32", None),
    }
    embpack.quantize_file(model, dst, variants=dict(reversed(variants.items())))
    assert {way[0] for way in packed_ways(dst).values()} == {"sym"}


def test_a_pattern_that_means_no_table_is_refused(tmp_path, model):
    for pattern, message in (
        ("usr*", r"variants \(--set\) name 'usr\*', but there is no such tensor; nearest: user_emb"),
        ("top*", r"name 'top\*', which is no table: top.weight \(name does not say embedding\); include or drop it"),
    ):
        with pytest.raises(ValueError, match=message):
            embpack.quantize_file(model, tmp_path / "p.safetensors", variants={pattern: Variant("asym")})
    assert not (tmp_path / "p.safetensors").exists()


def test_what_a_reader_cannot_read_is_refused_before_packing(tmp_path, model):
    dst = tmp_path / "p.safetensors"
    with pytest.raises(
        ValueError, match=r"item_emb.weight: has embedding_dim 15.*; FBGEMM can read optimal at 8 bits with"
    ):
        embpack.quantize_file(model, dst, readable_by=["fbgemm"])
    embpack.quantize_file(model, dst, readable_by=["fbgemm"], exclude=["item*"])
    embpack.quantize_file(model, dst, readable_by=["fbgemm"], variants={"item*": Variant("asym", 8, "float16")})
    with pytest.raises(TypeError, match=r"readable_by is 'torch'; give a list of readers: \['torch'\]"):
        embpack.quantize_file(model, dst, readable_by="torch")


# On the command line


def quantized(embpack_command, model, *options):
    dst = model.with_name("p.safetensors")
    code, _, err = embpack_command("quantize", model, dst, *options)
    assert (code, err) == (0, "")
    return packed_ways(dst)


def test_auto_chooses_within_restrictions(embpack_command, model):
    ways = quantized(embpack_command, model, "--auto", "--method", "sym,trellis", "--bits", "2,2.5", "--rotate", "none")
    assert {way[0] for way in ways.values()} <= {"sym", "trellis"}
    assert {way[1] for way in ways.values()} <= {2, 2.5}
    assert {way[3] for way in ways.values()} == {None}
    ways = quantized(embpack_command, model, "--auto", "--method", "greedy:b=50,r=0.5", "--param-dtype", "float32")
    assert {way[0::2] for way in ways.values()} == {("greedy", "float32")}
    ways = quantized(embpack_command, model, "--auto", "--method", "optimal", "--bits", "4", "--rotate", "hadamard")
    assert set(ways.values()) == {("optimal", 4, "float16", "hadamard")}


def test_auto_chooses_what_others_read(embpack_command, model):
    ways = quantized(embpack_command, model, "--auto", "--readable-by", "torchrec", "--readable-by", "onnx")
    assert ways == {
        "user_emb.weight": ("optimal", 4, "float16", None),
        "user_emb[2].weight": ("optimal", 4, "float16", None),
        "item_emb.weight": ("optimal", 8, "float16", None),
    }
    code, _, err = embpack_command("quantize", model, "--dry-run", "--auto", "--bits", "4", "--readable-by", "torch")
    assert code == 1
    assert "item_emb.weight: has embedding_dim 15, but PyTorch takes multiples of 2 at 4 bits" in err
    assert "PyTorch can read optimal at 8 bits" in err


def test_set_packs_by_pattern_with_and_without_auto(embpack_command, model):
    chosen = [
        "--set",
        "user*=trellis:bits=2.5,rotate=hadamard",
        "--set",
        "user_emb[[]2]*=sym:bits=8,param-dtype=float16",
    ]
    ways = quantized(embpack_command, model, "--method", "asym", *chosen)
    assert ways == {
        "user_emb.weight": ("trellis", 2.5, "float32", "hadamard"),
        "user_emb[2].weight": ("sym", 8, "float16", None),
        "item_emb.weight": ("asym", 4, "float16", None),
    }
    ways = quantized(
        embpack_command, model, "--auto", "--rotate", "none", "--method", "asym", "--max-bytes", "45 %", *chosen
    )
    assert ways == {
        "user_emb.weight": ("trellis", 2.5, "float32", "hadamard"),
        "user_emb[2].weight": ("sym", 8, "float16", None),
        "item_emb.weight": ("asym", 8, "float32", None),
    }


def test_readable_by_checks_before_packing(embpack_command, tmp_path, model):
    dst = tmp_path / "p.safetensors"
    for options, message in (
        (["--rotate", "hadamard"], "has rotation 'hadamard', which FBGEMM would not undo"),
        (["--method", "trellis"], "has rows of the trellis layout, but FBGEMM reads uniform ones only"),
        (["--bits", "8"], "FBGEMM can read optimal at 8 bits with float16 parameters"),
        (["--set", "user*=kmeans", "--exclude", "item*"], "has rows of the codebook layout, but FBGEMM reads uniform"),
    ):
        code, out, err = embpack_command("quantize", model, dst, "--readable-by", "fbgemm", *options)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert message in err and "_emb" in err and "leave it as it is with --exclude" in err
        assert not dst.exists()
    assert quantized(embpack_command, model, "--readable-by", "fbgemm", "--bits", "8", "--param-dtype", "float16")


def test_a_glob_of_set_that_matches_nothing_is_refused(embpack_command, tmp_path, model):
    code, out, err = embpack_command("quantize", model, tmp_path / "p.safetensors", "--set", "usr*=asym")
    assert (code, out) == (1, "")
    assert "variants (--set) name 'usr*', but there is no such tensor; nearest: user_emb" in err


@pytest.mark.parametrize(
    ("options", "option", "message"),
    [
        (["--max-bytes", "1 MB"], "--max-bytes", "goes with --auto"),
        (["--access-counts", "counts.json"], "--access-counts", "goes with --auto"),
        (["--method", "asym,greedy:b=5,r=0.5"], "--method", "give one, or add --auto, which chooses among several"),
        (["--bits", "2,4"], "--bits", "give one, or add --auto"),
        (["--rotate", "none,hadamard"], "--rotate", "give one, or add --auto"),
        (["--rotate", "twice"], "--rotate", "'twice'; choose none, hadamard"),
        (["--param-dtype", "float16,float32"], "--param-dtype", "choose float16 or float32"),
        (["--param-dtype", "float16", "--method", "trellis"], "--param-dtype", "the trellis layout has 'float32'"),
        (["--auto", "--param-dtype", "float16", "--method", "trellis"], "--auto", "the trellis layout has 'float32'"),
        (["--auto", "--bits", "9"], "--auto", "bits is 9; the trellis layout has 2 to 7"),
        (["--auto", "--method", "kmeans", "--bits", "4,3.5"], "--auto", "bits is 3.5; choose 2, 4 or 8"),
        (["--readable-by", "faiss"], "--readable-by", "there is no reader 'faiss'; choose one of torch, fbgemm,"),
        (["--set", "user*"], "--set", "'user*'; give a glob of names and a method, 'user_*=trellis:bits=3.5'"),
        (["--set", "user*=best"], "--set", "'user*=best': there is no method 'best'; choose one of asym"),
        (["--set", "=asym"], "--set", "'=asym'; give a glob of names and a method"),
        (["--set", "a=b=trellis:bits=9"], "--set", "'a=b=trellis:bits=9': bits is 9; the trellis layout has 2 to 7"),
        (["--set", "a=trellis:bit=9"], "--set", "sets 'bit'; what can be set: bits, param_dtype, rotate"),
    ],
)
def test_options_without_effect_or_sense_exit_2(embpack_command, tmp_path, model, options, option, message):
    code, out, err = embpack_command("quantize", model, tmp_path / "p.safetensors", *options)
    said = " ".join(re.sub(r"[│╭╮╰╯─]", " ", err).split())
    assert (code, out) == (2, "")
    assert f"Invalid value for '{option}'" in said or f"Invalid value for {option}" in said
    assert message in said


def test_set_takes_names_with_equals_signs_and_colons(embpack_command, tmp_path, rng):
    arrays = Arrays({"a=b:0_emb": rng.standard_normal((50, 16), np.float32)}, {})
    model = write_safetensors(tmp_path, arrays)
    assert quantized(embpack_command, model, "--set", "a=b:0*=greedy:b=20,bits=8") == {
        "a=b:0_emb": ("greedy", 8, "float32", None)
    }
