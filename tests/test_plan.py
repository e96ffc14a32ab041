"""embpack.plan: what is chosen against every choice there is, and files packed by it."""

import json
import re
from itertools import product

import numpy as np
import pytest
from safetensors.numpy import save_file

import embpack
from embpack.planning.spread import choose


def make_options(rng, num_tables, num_options):
    sizes = rng.integers(1, 60, (num_tables, num_options))
    errors = rng.integers(1, 60, (num_tables, num_options)).astype(float)
    return [(list(map(int, s)), list(e)) for s, e in zip(sizes, errors, strict=True)]


@pytest.mark.parametrize("num_tables", [1, 2, 3, 5])
def test_the_choice_is_the_best_of_all(rng, num_tables):
    for _ in range(30):
        options = make_options(rng, num_tables, int(rng.integers(1, 5)))
        every = list(product(*(range(len(sizes)) for sizes, _ in options)))
        sums = [
            (sum(options[t][0][i] for t, i in enumerate(way)), sum(options[t][1][i] for t, i in enumerate(way)))
            for way in every
        ]
        for limit in (0, 10, 40, 90, 150, 10_000):
            fitting = [error for size, error in sums if size <= limit]
            chosen = choose(options, limit, None)
            assert (chosen is None) == (not fitting)
            if chosen is not None:
                size, error = sums[every.index(tuple(chosen))]
                assert size <= limit and error == min(fitting)
            fitting = [size for size, error in sums if error <= limit]
            chosen = choose(options, None, float(limit))
            assert (chosen is None) == (not fitting)
            if chosen is not None:
                size, error = sums[every.index(tuple(chosen))]
                assert error <= limit and size == min(fitting)


def test_many_tables_get_next_to_the_best_choice(rng):
    """Convex options, of which the best sums are known: by the error that a byte more saves."""
    sizes = [np.cumsum(rng.integers(1, 1000, 5)) for _ in range(200)]
    errors = [1e6 * rng.random() * np.exp(-np.arange(5)) for _ in range(200)]
    limit = int(sum(s[2] for s in sizes))
    chosen = choose([(list(map(int, s)), list(e)) for s, e in zip(sizes, errors, strict=True)], limit, None)
    size = sum(int(s[i]) for s, i in zip(sizes, chosen, strict=True))
    error = sum(float(e[i]) for e, i in zip(errors, chosen, strict=True))
    assert size <= limit
    # No choice within the limit is below the bound of Lagrange, whatever the price of a byte.
    bounds = [
        sum(float((e + price * s).min()) for s, e in zip(sizes, errors, strict=True)) - price * limit
        for price in np.geomspace(1e-2, 1e4, 400)
    ]
    assert max(bounds) <= error <= 1.01 * max(bounds)


# For questions that any variants answer.
FEW = [embpack.Variant(*way) for way in (("optimal", 2), ("optimal", 4), ("optimal", 8), ("trellis", 3))]


@pytest.fixture
def tables(rng):
    return {
        "user_embedding.weight": rng.standard_normal((100, 32), dtype=np.float32),
        "item_embedding.weight": rng.standard_normal((300, 16), dtype=np.float32) * np.float32(0.1),
        "city_embedding.weight": rng.laplace(size=(40, 64)).astype(np.float32) * 3,
    }


def test_without_a_limit_tables_get_the_least_loss_in_the_bytes_of_four_bits(tables):
    plan = embpack.plan(tables)
    assert [table.name for table in plan.tables] == list(tables)
    for table in plan.tables:
        assert table.num_bytes <= (table.embedding_dim // 2 + 4) * table.num_embeddings
        assert table.loss <= embpack.quantize(tables[table.name]).loss
    assert plan.num_bytes == sum(table.num_bytes for table in plan.tables)


def quantize_as(weight, variant):
    return embpack.quantize(weight, variant.method, variant.bits, variant.param_dtype, rotate=variant.rotate)


def pack(tables, plan):
    packed = {name: quantize_as(weight, plan.variants[name]) for name, weight in tables.items()}
    errors = {name: np.square(tables[name] - packed[name].dequantize(), dtype=np.float64).sum() for name in tables}
    return packed, errors


@pytest.mark.parametrize("share", ["11 %", "12.5 %", "20 %", "30 %"])
def test_within_max_bytes_the_error_is_the_least(tables, share):
    variants = [embpack.Variant("optimal", bits) for bits in (2, 4, 8)]
    variants += [embpack.Variant("trellis", 2.5), embpack.Variant("trellis", 4, rotate="hadamard")]
    plan = embpack.plan(tables, max_bytes=share, variants=variants)
    limit = sum(weight.nbytes for weight in tables.values()) * float(share[:-1]) / 100
    packed, errors = pack(tables, plan)
    assert sum(table.nbytes for table in packed.values()) == plan.num_bytes <= limit
    every = {(name, variant): quantize_as(weight, variant) for name, weight in tables.items() for variant in variants}
    error_of = {
        key: np.square(tables[key[0]] - table.dequantize(), dtype=np.float64).sum() for key, table in every.items()
    }
    best = min(
        sum(error_of[key] for key in zip(tables, way, strict=True))
        for way in product(variants, repeat=3)
        if sum(every[key].nbytes for key in zip(tables, way, strict=True)) <= limit
    )
    assert sum(errors.values()) == pytest.approx(best)
    norm = sum(np.square(weight, dtype=np.float64).sum() for weight in tables.values())
    assert plan.loss == pytest.approx(np.sqrt(best / norm), rel=1e-5)


def test_rotation_and_trellis_are_chosen_where_they_lose_less(rng):
    tables = {
        "normal": rng.standard_normal((4500, 64), dtype=np.float32),
        "laplace": rng.laplace(size=(4500, 64)).astype(np.float32),
    }
    plan = embpack.plan(tables)
    assert [table.variant.method for table in plan.tables] == ["trellis", "trellis"]
    assert plan.variants["laplace"].rotate == "hadamard"
    assert plan.num_bytes <= 1.01 * 36 * 9000
    assert str(plan).splitlines()[-1].startswith("trellis: embpack alone reads these rows, and sums them at .6 to .9")
    uniform = [embpack.Variant("optimal", 4), embpack.Variant("optimal", 4, rotate="hadamard")]
    plan = embpack.plan(tables, variants=uniform)
    assert plan.variants["laplace"].rotate == "hadamard" and "of the squared error" in str(plan)
    assert str(plan).splitlines()[-1].startswith("324,000 bytes")


def test_what_rows_share_is_counted_once_for_tables_larger_than_the_sample(rng):
    table = rng.standard_normal((40_000, 16), dtype=np.float32)
    plan = embpack.plan({"emb": table}, variants=[embpack.Variant("trellis", 3)])
    assert plan.num_bytes == embpack.quantize(table, "trellis", 3).nbytes


def test_max_loss_is_kept_in_the_fewest_bytes(tables):
    plan = embpack.plan(tables, max_loss=0.05, variants=FEW)
    assert plan.loss <= 0.05
    smaller = embpack.plan(tables, max_bytes=plan.num_bytes - 1, variants=FEW)
    assert smaller.loss > 0.05


def test_a_plan_has_no_way_that_is_larger_than_the_weights(rng):
    half = rng.standard_normal((300, 6)).astype(np.float16)  # 12 bytes a row; at 8 bits 14
    planned = embpack.plan({"emb": half}, max_bytes="100 %")
    [table] = planned.tables
    assert table.num_bytes < half.nbytes
    with pytest.raises(ValueError, match=r"the least loss is 0\.\d+; allow that much, or exclude some"):
        embpack.plan({"emb": half}, max_loss=0.9 * planned.loss)
    [same] = embpack.plan({"emb": half.astype(np.float32)}, max_loss=0.9 * planned.loss).tables
    assert same.num_bytes > half.nbytes


def test_tables_that_are_looked_up_often_get_more(tables):
    names = list(tables)
    how = {"max_bytes": "18 %", "variants": FEW}
    plans = [embpack.plan(tables, access_counts={names[0]: often, names[2]: 1}, **how) for often in (1, 1e9)]
    assert plans[1].tables[0].num_bytes > plans[0].tables[0].num_bytes


def test_a_plan_prints_as_a_table_with_reasons(tables):
    lines = str(embpack.plan(tables, max_bytes="12.5 %")).splitlines()
    assert lines[0].split() == ["table", "rows", "dim", "method", "bits", "bytes", "l2", "loss", "why"]
    assert "of the squared error" in lines[1] and "% of float32; l2 loss 0." in lines[4]


def test_limits_that_cannot_be_kept_are_named(tables):
    with pytest.raises(ValueError, match=r"max_bytes is 10, but the tables take at least [\d,]+ bytes"):
        embpack.plan(tables, max_bytes=10, variants=FEW)
    with pytest.raises(ValueError, match=r"max_loss is 1e-09, but the least loss is 0\.00"):
        embpack.plan(tables, max_loss=1e-9, variants=FEW)
    with pytest.raises(ValueError, match="max_loss is 0; give a positive, finite number"):
        embpack.plan(tables, max_loss=0, variants=FEW)
    with pytest.raises(ValueError, match="give max_bytes or max_loss, not both"):
        embpack.plan(tables, max_bytes=10, max_loss=1, variants=FEW)
    with pytest.raises(ValueError, match="access_counts are of 'nobody', but the tables are user_embedding"):
        embpack.plan(tables, access_counts={"nobody": 1}, variants=FEW)
    with pytest.raises(ValueError, match=r"nearest: user_embedding\.weight, "):
        embpack.plan(tables, access_counts={"usr_embedding.weight": 1}, variants=FEW)


@pytest.mark.parametrize("limit", ["max_bytes", "max_loss"])
def test_the_limit_that_a_message_names_can_be_kept(tables, limit):
    too_little = {"max_bytes": "1 %", "max_loss": 1e-9}[limit]
    with pytest.raises(ValueError, match=f"{limit} is {too_little}, but ") as failed:
        embpack.plan(tables, variants=FEW, **{limit: too_little})
    if limit == "max_loss":
        can = float(re.search(r"the least loss is ([\d.]+); allow that much", str(failed.value))[1])
        assert embpack.plan(tables, variants=FEW, max_loss=can).loss <= can
        return
    found = re.search(r"at least ([\d,]+) bytes, ([\d.]+ %) of float32; allow that much", str(failed.value))
    least = int(found[1].replace(",", ""))
    for can in (least, found[2]):
        assert embpack.plan(tables, variants=FEW, max_bytes=can).num_bytes == least


def test_tables_of_zeros_are_planned():
    zeros = {"t": np.zeros((200, 16), np.float32)}
    for limit in ({}, {"max_loss": 0.1}, {"max_loss": 1e308}, {"max_bytes": "50 %"}):
        plan = embpack.plan(zeros, variants=FEW, **limit)
        assert (plan.loss, plan.tables[0].loss, plan.tables[0].reason) == (0, 0, "no error")
        assert "nan" not in str(plan)
    with pytest.raises(ValueError, match=r"max_bytes is 1, but the tables take at least 1,600 bytes; allow that much"):
        embpack.plan(zeros, variants=FEW, max_bytes=1)


def test_a_table_that_is_never_looked_up_gets_the_fewest_bytes(tables):
    names = list(tables)
    plan = embpack.plan(tables, variants=FEW, max_bytes="18 %", access_counts={names[0]: 0})
    assert plan.tables[0].reason == "never looked up"
    assert plan.tables[0].num_bytes == min(quantize_as(tables[names[0]], variant).nbytes for variant in FEW)


@pytest.mark.parametrize(
    ("count", "error", "message"),
    [
        (-1, ValueError, "is -1; give a number from 0 to 1e+18"),
        (np.nan, ValueError, "is nan; give a number from 0"),
        (10**400, ValueError, "is 1000"),
        (np.inf, ValueError, "is inf; give a number from 0"),
        ("5", TypeError, "is of type str; give a number: how often rows of the table are looked up in all"),
        (True, TypeError, "is of type bool; give a number"),
        (np.ones(100), TypeError, "is of type ndarray; give a number"),
    ],
)
def test_counts_that_cannot_be_weighed(tables, count, error, message):
    with pytest.raises(error, match=re.escape(f"access_counts['user_embedding.weight'] {message}")):
        embpack.plan(tables, variants=FEW, access_counts={"user_embedding.weight": count})


def test_counts_that_are_all_zero_are_refused(tables, tmp_path, embpack_command):
    message = "access_counts are all 0, so no error counts; leave them out, and each row counts the same"
    for limit in ({}, {"max_bytes": 1}, {"max_loss": 0.1}):
        with pytest.raises(ValueError, match=message):
            embpack.plan(tables, variants=FEW, access_counts=dict.fromkeys(tables, 0), **limit)
    save_file(tables, tmp_path / "model.safetensors")
    counts = tmp_path / "counts.json"
    command = ["quantize", tmp_path / "model.safetensors", "--dry-run", "--auto", "--access-counts", counts]
    for content, said in (
        (json.dumps(dict.fromkeys(tables, 0)), message),
        ('{"user_embedding.weight": NaN}', "access_counts['user_embedding.weight'] is nan"),
        ('{"user_embedding.weight": "many"}', "access_counts['user_embedding.weight'] is of type str"),
        ('{"usr_embedding.weight": 1}', "nearest: user_embedding.weight, "),
        ("[1]", "it must be an object of counts by table"),
        ("{", "not valid JSON: "),
        (None, "no such file; --access-counts takes counts by table: "),
    ):
        if content is None:
            counts.unlink()
        else:
            counts.write_text(content)
        code, _, err = embpack_command(*command)
        assert code == 1 and err.startswith(f"error: {counts}: ") and said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"src": {}}, ValueError, "src has no weights"),
        ({"variants": []}, ValueError, "there are no variants to measure"),
        ({"include": ["x"]}, ValueError, "include and exclude choose among tensors of a checkpoint"),
        ({"max_loss": "3"}, TypeError, "max_loss is '3'; give a positive, finite number"),
        ({"src": {"a\n": np.ones((20, 8))}}, TypeError, r"^a\\n: weight is float64"),
    ],
)
def test_what_cannot_be_planned(arguments, error, message):
    whole = {"src": {"emb": np.ones((20, 8), np.float32)}, "variants": FEW, **arguments}
    with pytest.raises(error, match=message):
        embpack.plan(**whole)


def test_a_printed_plan_has_names_that_can_be_seen():
    plan = embpack.plan({"\x1b[31ma\nb": np.ones((20, 8), np.float32)}, variants=FEW)
    assert str(plan).splitlines()[1].startswith(r"\x1b[31ma\nb  ")
    assert all(line.isprintable() for line in str(plan).split("\n"))


def test_files_are_packed_by_a_plan(tmp_path, tables, embpack_command):
    src, dst = tmp_path / "model.safetensors", tmp_path / "packed.safetensors"
    save_file({**tables, "top.weight": np.ones((3, 3), np.float32)}, src)
    plan = embpack.plan(src, max_bytes="12.5 %")
    embpack.quantize_file(src, dst, variants=plan.variants)
    packed = embpack.load(dst, verify=True)
    assert {name: (table.bits, table.nbytes) for name, table in packed.items()} == {
        table.name: (table.variant.bits, table.num_bytes) for table in plan.tables
    }
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps({"user_embedding.weight": 5000}))
    other = tmp_path / "other.safetensors"
    arguments = ("--auto", "--max-bytes", "12.5 %", "--access-counts", counts)
    code, out, err = embpack_command("quantize", src, other, *arguments)
    assert (code, err) == (0, "") and "of the squared error" in out
    weighted = embpack.plan(src, max_bytes="12.5 %", access_counts={"user_embedding.weight": 5000})
    assert {name: table.bits for name, table in embpack.load(other).items()} == {
        table.name: table.variant.bits for table in weighted.tables
    }
    halves = tmp_path / "halves.safetensors"
    code, out, err = embpack_command("quantize", src, halves, "--method", "trellis", "--bits", "3.5")
    assert (code, err) == (0, "") and {table.bits for table in embpack.load(halves).values()} == {3.5}
    code, out, err = embpack_command("quantize", src, tmp_path / "no.safetensors", "--bits", "3.5")
    assert code == 2 and "bits is 3.5; choose 2, 4 or 8" in err
    code, out, err = embpack_command("quantize", src, tmp_path / "no.safetensors", "--max-bytes", "1 MB")
    assert code == 2 and "goes with --auto" in err
    code, out, err = embpack_command("quantize", src, tmp_path / "no.safetensors", "--auto", "--rotate", "hadamard")
    assert code == 2 and "does not go with --auto" in err
    counts.write_text("[1]")
    code, out, err = embpack_command("quantize", src, tmp_path / "no.safetensors", *arguments)
    assert code == 1 and "must be an object of counts by table" in err
