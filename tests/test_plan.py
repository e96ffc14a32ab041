"""embpack.plan: what is chosen against every choice there is, and files packed by it."""

import json
import re
from collections import Counter
from itertools import product

import numpy as np
import pytest
from safetensors.numpy import save_file

import embpack
from embpack.formats import SourceTensor
from embpack.planning import count_work
from embpack.planning.spread import choose
from embpack.rules import Decision
from embpack.samples import make_table
from embpack.selection import select_variants


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


def named_by_default(variant):
    """Leave out of a variant what it has by default anyway."""
    return embpack.Variant(variant.method, variant.bits, rotate=variant.rotate)


# A plan counts so many bytes too many at most for files of three tables: 7 to fill up the header, and of each number
# in it that says where one of six tensors begins or ends some digits.
SLACK_BYTES = 100


@pytest.mark.parametrize("share", ["17 %", "20 %", "30 %", "40 %"])
def test_within_max_bytes_the_error_is_the_least(tmp_path, tables, share):
    variants = [embpack.Variant("optimal", bits) for bits in (2, 4, 8)]
    variants += [embpack.Variant("trellis", 2.5), embpack.Variant("trellis", 4, rotate="hadamard")]
    plan = embpack.plan(tables, max_bytes=share, variants=variants)
    limit = sum(weight.nbytes for weight in tables.values()) * int(share[:-2]) // 100
    every = {(name, variant): quantize_as(weight, variant) for name, weight in tables.items() for variant in variants}
    error_of = {
        key: np.square(tables[key[0]] - table.dequantize(), dtype=np.float64).sum() for key, table in every.items()
    }

    def count_file(way):
        embpack.save(tmp_path / "t.safetensors", {key[0]: every[key] for key in zip(tables, way, strict=True)})
        return (tmp_path / "t.safetensors").stat().st_size

    own = tuple(map(named_by_default, plan.variants.values()))
    assert count_file(own) <= plan.file_bytes <= limit
    ways = sorted(
        product(variants, repeat=3), key=lambda way: sum(error_of[key] for key in zip(tables, way, strict=True))
    )
    # What describes tables is counted to within some bytes: of those within these of the limit, none is missed.
    best = next(way for way in ways if count_file(way) <= limit)
    surely = next(way for way in ways if count_file(way) <= limit - SLACK_BYTES)
    assert own in (best, surely)
    error = sum(error_of[key] for key in zip(tables, own, strict=True))
    norm = sum(np.square(weight, dtype=np.float64).sum() for weight in tables.values())
    assert plan.loss == pytest.approx(np.sqrt(error / norm), rel=1e-5)
    assert plan.num_bytes == sum(every[key].nbytes for key in zip(tables, own, strict=True))
    assert sum(table.error_share for table in plan.tables) == pytest.approx(1)


def test_rotation_and_trellis_are_chosen_where_they_lose_less(rng):
    tables = {
        "normal": rng.standard_normal((4500, 64), dtype=np.float32),
        "laplace": rng.laplace(size=(4500, 64)).astype(np.float32),
    }
    ways = [
        embpack.Variant(method, 4, rotate=rotate) for method in ("optimal", "trellis") for rotate in (None, "hadamard")
    ]
    plan = embpack.plan(tables, variants=ways)
    assert [table.variant.method for table in plan.tables] == ["trellis", "trellis"]
    assert plan.variants["laplace"].rotate == "hadamard"
    assert plan.num_bytes <= 1.01 * 36 * 9000
    assert str(plan).splitlines()[-1].startswith("trellis: embpack alone reads these rows, and sums them at .6 to .9")
    plan = embpack.plan(tables, variants=ways[:2])
    assert plan.variants["laplace"].rotate == "hadamard"
    assert str(plan).splitlines()[-1].startswith("324,000 bytes, 14.06 % of float32, in a file of at most 325,")


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
    planned = embpack.plan({"emb": half}, max_bytes="130 %")
    [table] = planned.tables
    assert table.num_bytes < half.nbytes
    with pytest.raises(ValueError, match=r"the least loss is 0\.\d+; allow that much"):
        embpack.plan({"emb": half}, max_loss=0.9 * planned.loss)
    [same] = embpack.plan({"emb": half.astype(np.float32)}, max_loss=0.9 * planned.loss).tables
    assert same.num_bytes > half.nbytes


def test_tables_that_are_looked_up_often_get_more(tables):
    names = list(tables)
    how = {"max_bytes": "24 %", "variants": FEW}
    plans = [
        embpack.plan(tables, access_counts=dict(zip(names, (often, 0, 1), strict=True)), **how) for often in (1, 1e9)
    ]
    assert plans[1].tables[0].num_bytes > plans[0].tables[0].num_bytes


def test_a_plan_prints_as_a_table_with_reasons(tables):
    plan = embpack.plan(tables, max_bytes="18 %", variants=FEW)
    lines = str(plan).splitlines()
    assert lines[0].split() == ["table", "rows", "dim", "method", "bits", "bytes", "l2", "loss", "error", "why"]
    assert f"in a file of at most {plan.file_bytes:,}; l2 loss 0." in lines[4]
    for table, line in zip(plan.tables, lines[1:4], strict=True):
        more = table.better.num_bytes - table.num_bytes
        assert more > 0 and table.better.loss < table.loss and 0 < table.better.saved_share < table.error_share
        assert re.fullmatch(r"([a-z]+ )?[\d.]+( bits)?: [\d.]+, \+[\d.]+ k?B", table.reason)
        assert len(table.reason) <= 30 and line.endswith(table.reason)
    assert len({table.reason for table in plan.tables}) == 3
    most = embpack.plan(tables, max_bytes="95 %", variants=FEW)
    assert {(table.reason, table.better) for table in most.tables} == {("nothing measured loses less", None)}


def test_limits_that_cannot_be_kept_are_named(tables):
    with pytest.raises(ValueError, match=r"max_bytes is 10, but the packed file takes at least [\d,]+ bytes"):
        embpack.plan(tables, max_bytes=10, variants=FEW)
    with pytest.raises(ValueError, match=r"max_loss is 1e-09, but the least loss is 0\.00"):
        embpack.plan(tables, max_loss=1e-9, variants=FEW)
    with pytest.raises(ValueError, match="max_loss is 0; give a positive, finite number"):
        embpack.plan(tables, max_loss=0, variants=FEW)
    with pytest.raises(ValueError, match="give max_bytes or max_loss, not both; max_loss of quantize_file refuses"):
        embpack.plan(tables, max_bytes=10, max_loss=1, variants=FEW)
    with pytest.raises(ValueError, match="access_counts are of 'nobody', but the tables are user_embedding"):
        embpack.plan(tables, access_counts={"nobody": 1}, variants=FEW)
    with pytest.raises(ValueError, match=r"nearest: user_embedding\.weight, "):
        embpack.plan(tables, access_counts={"usr_embedding.weight": 1}, variants=FEW)
    with pytest.raises(
        ValueError, match=r"have 1 of the 3 tables, and not item_embedding\.weight, city_embedding\.weight; give each"
    ):
        embpack.plan(tables, access_counts={"user_embedding.weight": 1}, variants=FEW)


@pytest.mark.parametrize("limit", ["max_bytes", "max_loss"])
def test_the_limit_that_a_message_names_can_be_kept(tables, limit):
    too_little = {"max_bytes": "1 %", "max_loss": 1e-9}[limit]
    with pytest.raises(ValueError, match=f"{limit} is {too_little}, but ") as failed:
        embpack.plan(tables, variants=FEW, **{limit: too_little})
    if limit == "max_loss":
        can = float(re.search(r"the least loss is ([\d.]+); allow that much", str(failed.value))[1])
        assert embpack.plan(tables, variants=FEW, max_loss=can).loss <= can
        return
    found = re.search(r"at least ([\d,]+) bytes, ([\d.]+ %) of what is read; allow that much", str(failed.value))
    least = int(found[1].replace(",", ""))
    for can in (least, found[2]):
        assert embpack.plan(tables, variants=FEW, max_bytes=can).file_bytes == least


def test_tables_of_zeros_are_planned():
    zeros = {"t": np.zeros((200, 16), np.float32)}
    for limit in ({}, {"max_loss": 0.1}, {"max_loss": 1e308}, {"max_bytes": "90 %"}):
        plan = embpack.plan(zeros, variants=FEW, **limit)
        assert (plan.loss, plan.tables[0].loss, plan.tables[0].reason) == (0, 0, "no error")
        assert "nan" not in str(plan)
    with pytest.raises(
        ValueError, match=r"max_bytes is 1, but the packed file takes at least 2,\d\d\d bytes; allow that much"
    ):
        embpack.plan(zeros, variants=FEW, max_bytes=1)


def test_a_table_that_is_never_looked_up_gets_the_fewest_bytes(tables):
    names = list(tables)
    plan = embpack.plan(tables, variants=FEW, max_bytes="24 %", access_counts=dict(zip(names, (0, 1, 1), strict=True)))
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
        ('{"user_embedding.weight": NaN}', "NaN is no number of JSON"),
        ('{"user_embedding.weight": -1}', "access_counts['user_embedding.weight'] is -1; give a number from 0"),
        ('{"user_embedding.weight": "many"}', "access_counts['user_embedding.weight'] is of type str"),
        ('{"usr_embedding.weight": 1}', "nearest: user_embedding.weight, "),
        ('{"user_embedding.weight": 1}', "have 1 of the 3 tables, and not "),
        ('{"user_embedding.weight": 1, "user_embedding.weight": 2}', "is there twice"),
        ("[1]", "it must be an object with a number for each table: {"),
        ("{", "not valid JSON: "),
        (None, "no such file; --access-counts takes a number for each table: "),
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
    uniform = select_variants("optimal")
    plan = embpack.plan(src, max_bytes="25 %", variants=uniform)
    embpack.quantize_file(src, dst, variants=plan.variants)
    packed = embpack.load(dst, verify=True)
    assert {name: (table.bits, table.nbytes) for name, table in packed.items()} == {
        table.name: (table.variant.bits, table.num_bytes) for table in plan.tables
    }
    assert dst.stat().st_size <= plan.file_bytes <= src.stat().st_size / 4
    counts = tmp_path / "counts.json"
    often = {"user_embedding.weight": 5000, "item_embedding.weight": 20, "city_embedding.weight": 0}
    counts.write_text(json.dumps(often))
    other = tmp_path / "other.safetensors"
    arguments = ("--auto", "--method", "optimal", "--max-bytes", "25 %", "--access-counts", counts)
    code, out, err = embpack_command("quantize", src, other, *arguments)
    assert (code, err) == (0, "") and "never looked up" in out
    weighted = embpack.plan(src, max_bytes="25 %", variants=uniform, access_counts=often)
    assert {name: table.bits for name, table in embpack.load(other).items()} == {
        table.name: table.variant.bits for table in weighted.tables
    }
    halves = tmp_path / "halves.safetensors"
    code, out, err = embpack_command("quantize", src, halves, "--method", "trellis", "--bits", "3.5")
    assert (code, err) == (0, "") and {table.bits for table in embpack.load(halves).values()} == {3.5}
    code, out, err = embpack_command("quantize", src, tmp_path / "no.safetensors", "--bits", "3.5")
    assert code == 2 and "bits is 3.5; choose 2, 4 or 8" in err


def test_progress_sums_up_to_what_was_promised(tables):
    told = Counter()
    decisions = {}

    def progress(name, rows):
        told[name] += rows

    embpack.plan(tables, max_bytes="25 %", variants=FEW, progress=progress)
    for name, weight in tables.items():
        tensor = SourceTensor(name, weight.shape, "F32", None, None)
        decisions[name] = count_work(Decision(tensor, embpack.Variant(), ""), FEW)
    assert told == decisions


def make_trained(rng, rows, dim):
    return make_table(rng, rows, dim) * np.float32(rng.lognormal(0, 0.5))


def test_few_rows_choose_next_to_as_well_as_many(rng, monkeypatch):
    """What is measured on few rows, or lies between what was, against all ways on all rows of the sample."""
    trained = {f"emb{i}": make_trained(rng, rows, 16) for i, rows in enumerate((1500, 700))}
    ways = [*select_variants("trellis", rotate=None), embpack.Variant("optimal", 8)]
    fast = {share: embpack.plan(trained, max_bytes=share, variants=ways) for share in ("18 %",)}
    monkeypatch.setattr("embpack.planning.candidates.FEWEST_ROWS", (20_000, 20_000, 20_000))
    monkeypatch.setattr("embpack.planning.candidates._STRIDE", 100)
    for share, plan in fast.items():
        full = embpack.plan(trained, max_bytes=share, variants=ways)
        assert plan.loss == pytest.approx(full.loss, rel=0.01)
        assert plan.file_bytes == pytest.approx(full.file_bytes, rel=0.01)


def test_a_way_that_only_later_rows_refuse_is_left_out(rng):
    """Values that float16 cannot hold, in a row that the first level does not have."""
    weight = rng.standard_normal((4000, 32), dtype=np.float32)
    weight[1] = 1e6
    variants = [embpack.Variant("optimal", 4), embpack.Variant("optimal", 8)]
    [table] = embpack.plan({"emb": weight}, max_loss=0.5, variants=variants).tables
    assert table.variant == embpack.Variant("optimal", 8, "float32")
    with pytest.raises(ValueError, match=r"^emb: nothing asked for can be done; .*emb\[1\] has values .* float16"):
        embpack.plan({"emb": weight}, max_loss=0.5, variants=variants[:1])
    with pytest.raises(ValueError, match=r"max_bytes is 90,000, but the packed file takes at least 1\d\d,\d\d\d bytes"):
        embpack.plan({"emb": weight}, max_bytes=90_000, variants=variants)
