"""Plans that are saved and used again: the file, what has changed since, and what is refused."""

import json
import os
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import embpack
from embpack.planning.planned import MOST_CHANGE

FEW = [embpack.Variant(*way) for way in (("optimal", 2), ("optimal", 4), ("greedy:b=100,r=0.5", 4), ("trellis", 3))]
# The same on the command line: few ways are measured, so that tests are fast.
AUTO = ("--auto", "--method", "asym,optimal", "--bits", "2,4")


@pytest.fixture
def tables(rng):
    return {
        "user_embedding.weight": rng.standard_normal((100, 32), dtype=np.float32),
        "item_embedding.weight": rng.laplace(size=(300, 16)).astype(np.float32),
        "top.weight": np.ones((3, 3), np.float32),
    }


@pytest.fixture
def src(tmp_path, tables):
    save_file(tables, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def planned(src, tmp_path):
    """A plan, and the file that it is in."""
    plan = embpack.plan(src, max_bytes="40 %", variants=FEW)
    plan.save(tmp_path / "plan.json")
    return plan, tmp_path / "plan.json"


def resolve(plan):
    """A plan as it comes back: methods have all their parameters, and numbers of better ways are left out."""
    return replace(
        plan,
        tables=tuple(
            replace(each, better=None, variant=replace(each.variant, method=each.variant.parsed_method.spec))
            for each in plan.tables
        ),
    )


def test_a_plan_comes_back_from_its_file(planned, tmp_path):
    plan, path = planned
    loaded = embpack.Plan.load(path)
    assert loaded == resolve(plan) and loaded.num_bytes == plan.num_bytes
    assert [table.reason for table in loaded.tables] == [table.reason for table in plan.tables]
    loaded.save(path)
    again = path.read_bytes()
    embpack.Plan.load(path).save(path)
    assert path.read_bytes() == again and again.endswith(b"}\n")
    assert not list(tmp_path.glob("*.tmp"))


def test_a_plan_packs_to_the_same_bytes_again(src, tmp_path, planned):
    plan, path = planned
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    embpack.quantize_file(src, first, variants=plan.variants)
    report = embpack.quantize_file(src, second, variants=embpack.Plan.load(path).variants)
    assert first.read_bytes() == second.read_bytes()
    assert report.file_bytes_after <= plan.file_bytes <= 0.4 * src.stat().st_size
    assert plan.find_changes(report.tables) == {}


def spoil(value, path, wrong):
    """Put something else at a path of keys."""
    *keys, last = path
    for key in keys:
        value = value[key]
    if wrong is None and last != "rotation":
        del value[last]
    else:
        value[last] = wrong


@pytest.mark.parametrize(
    ("path", "wrong", "message"),
    [
        (("format",), "other", r"is no plan; make one: embpack quantize SRC --auto --save-plan "),
        (("format",), None, "is no plan"),
        (("version",), 2, "plan version 2, but this embpack reads version 1; update embpack, or make the plan anew"),
        (("version",), [[[]]], "plan version "),
        (("extra",), 1, r"the plan is damaged \(it has \['extra', "),
        (("tables",), [], "the plan is damaged"),
        (("tables",), {}, "the plan is damaged"),
        (("tables", 0), [], r"tables\[0\] has list, but a table has \['bits', "),
        (("tables", 0, "bits"), None, r"tables\[0\] has \['embedding_dim', "),
        (("loss",), -1, r"the plan is damaged \(loss is -1\); make it anew"),
        (("file_bytes",), "1", r"file_bytes is '1'"),
        (("tables", 0, "name"), 3, r"tables\[0\]: name is 3"),
        (("tables", 0, "name"), "\ud800", r"tables\[0\]: name is "),
        (("tables", 1, "name"), "item_embedding.weight", "has table 'item_embedding.weight' twice"),
        (("tables", 0, "num_embeddings"), 0, "num_embeddings is 0"),
        (("tables", 0, "num_embeddings"), True, "num_embeddings is True"),
        (("tables", 0, "num_embeddings"), 10**30, "num_embeddings is 1000"),
        (("tables", 0, "embedding_dim"), 1.5, "embedding_dim is 1.5"),
        (("tables", 0, "method"), "nothing", r"tables\[0\]: .*nothing"),
        (("tables", 0, "method"), "greedy:b=x", r"tables\[0\]: "),
        (("tables", 0, "bits"), 9.5, r"tables\[0\]: bits is 9.5"),
        (("tables", 0, "bits"), True, "bits is True"),
        (("tables", 0, "param_dtype"), "int8", r"tables\[0\]: param_dtype is 'int8'"),
        (("tables", 0, "rotation"), "fourier", r"tables\[0\]: rotation is 'fourier'"),
        (("tables", 0, "loss"), "0", "loss is '0'"),
        (("tables", 0, "square_norm"), -1.0, "square_norm is -1.0"),
        (("tables", 0, "error_share"), 1.5, "error_share is 1.5"),
        (("tables", 0, "reason"), 5, "reason is 5"),
    ],
)
def test_a_damaged_plan_is_refused(planned, path, wrong, message):
    _, file = planned
    value = json.loads(file.read_text())
    spoil(value, path, wrong)
    file.write_text(json.dumps(value))
    with pytest.raises(embpack.FormatError, match=message) as failed:
        embpack.Plan.load(file)
    assert str(failed.value).startswith(f"{file}: ") and "\n" not in str(failed.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "holds a JSON list, not an object"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
        (b'{"format": "embpack plan", "version": 1, "loss": NaN}', "NaN is no number of JSON"),
        (b'{"format": "embpack plan", "loss": 1' + b"0" * 10_000 + b"}", "not valid JSON"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path, content, message):
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(embpack.FormatError, match=message):
        embpack.Plan.load(tmp_path / "plan.json")


def test_plans_that_cannot_be_read_or_written(tmp_path, planned):
    plan, _ = planned
    with pytest.raises(FileNotFoundError, match="no such file; make a plan: embpack quantize SRC --auto --save-plan"):
        embpack.Plan.load(tmp_path / "no.json")
    with pytest.raises(IsADirectoryError, match="cannot be read: Is a directory"):
        embpack.Plan.load(tmp_path)
    with pytest.raises(ValueError, match=r"plan\.txt: a plan ends in \.json"):
        plan.save(tmp_path / "plan.txt")
    with pytest.raises(FileNotFoundError, match=r"folder .* does not exist; create it first"):
        plan.save(tmp_path / "no" / "plan.json")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {}}')
    with pytest.raises(FileExistsError, match="exists and is no plan, so it is not replaced"):
        plan.save(index)
    assert index.read_text() == '{"weight_map": {}}'


def grow(table, factor):
    return np.concatenate([table, table])[: int(len(table) * factor)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table, None),
        (lambda table: grow(table, 1.2), None),
        (lambda table: 1.2 * table, None),
        (lambda table: grow(table, 1.3), "rows 100 -> 130"),
        (lambda table: table[:70], "rows 100 -> 70"),
        (lambda table: np.float32(1.5) * table, "root mean square "),
        (lambda table: np.where(np.arange(32) == 3, np.float32(5), table), "loss 0."),
    ],
)
def test_tables_that_have_changed_are_named(tmp_path, tables, planned, change, said):
    plan, _ = planned
    tables["user_embedding.weight"] = np.ascontiguousarray(change(tables["user_embedding.weight"]), np.float32)
    save_file(tables, tmp_path / "later.safetensors")
    report = embpack.quantize_file(tmp_path / "later.safetensors", tmp_path / "p.safetensors", variants=plan.variants)
    changes = plan.find_changes(report.tables)
    assert list(changes) == ([] if said is None else ["user_embedding.weight"])
    if said is not None:
        assert said in changes["user_embedding.weight"]


def test_what_has_changed_is_told_at_the_bound(planned):
    plan, _ = planned
    table = plan.tables[0]

    def find(**moved):
        values = {"num_embeddings": 1000, "embedding_dim": 8, "loss": 0.1, "square_norm": 8000.0, **moved}
        report = embpack.TableReport(
            name=table.name, dtype="float32", method="optimal", bytes_before=1, bytes_after=1, seconds=1, **values
        )
        return replace(table, num_embeddings=1000, embedding_dim=8, loss=0.1, square_norm=8000.0).find_changes(report)

    assert MOST_CHANGE == 1.25 and find() == []
    assert find(loss=0.1249) == find(loss=0.0801) == []
    assert find(loss=0.1251) == ["loss 0.10000 -> 0.12510"] and find(loss=0.0799) == ["loss 0.10000 -> 0.07990"]
    assert find(square_norm=8000 * 1.26**2) == ["root mean square 1 -> 1.26"]
    assert find(loss=0.0) == ["loss 0.10000 -> 0.00000"]


def test_the_command_line_makes_and_uses_a_plan(src, tmp_path, embpack_command):
    plan, first, second = (tmp_path / name for name in ("plan.json", "first.safetensors", "second.safetensors"))
    code, _, err = embpack_command("quantize", src, first, *AUTO, "--save-plan", plan)
    assert (code, err) == (0, "")
    saved = embpack.Plan.load(plan)
    # What packing came to, of all rows.
    assert {table.name: table.loss for table in saved.tables} == {
        name: table.loss for name, table in embpack.load(first).items()
    }
    code, out, err = embpack_command("quantize", src, second, "--plan", plan)
    assert (code, err) == (0, "")
    # What was measured when the plan was made is not said of what is packed now.
    assert saved.tables[0].reason not in out and f"in a file of at most {saved.file_bytes:,}" not in out
    assert first.read_bytes() == second.read_bytes()
    code, out, err = embpack_command("quantize", src, second, "--plan", plan, "--json")
    assert code == 0 and {table["plan_change"] for table in json.loads(out)["tables"]} == {None}
    code, _, err = embpack_command("quantize", src, "--dry-run", *AUTO, "--save-plan", plan)
    assert (code, err) == (0, "")
    assert {name: each.bits for name, each in embpack.Plan.load(plan).variants.items()} == {
        name: each.bits for name, each in saved.variants.items()
    }


def test_the_command_line_says_what_has_changed(src, tmp_path, tables, embpack_command):
    plan, dst = tmp_path / "plan.json", tmp_path / "p.safetensors"
    assert embpack_command("quantize", src, "--dry-run", *AUTO, "--save-plan", plan)[0] == 0
    tables["user_embedding.weight"] = grow(tables["user_embedding.weight"], 2)
    save_file(tables, src)
    code, _, err = embpack_command("quantize", src, dst, "--plan", plan)
    assert code == 0 and dst.exists()
    first, second = err.splitlines()
    assert first == (
        f"warning: {plan}: tables that have changed since the plan was made, 1 of 2; make it anew with --auto "
        "--save-plan:"
    )
    assert second.startswith("warning: user_embedding.weight: rows 100 -> 200")
    code, out, _ = embpack_command("quantize", src, dst, "--plan", plan, "--json")
    assert json.loads(out)["tables"][1]["plan_change"].startswith("rows 100 -> 200")


@pytest.mark.parametrize(
    ("alter", "options", "said"),
    [
        (lambda t: t.pop("user_embedding.weight"), (), "the plan has user_embedding.weight, but the checkpoint has no"),
        (lambda t: t.update({"new_embedding.weight": np.ones((50, 8), np.float32)}), (), "does not have new_embedding"),
        (lambda t: t.update({"user_embedding.weight": np.ones((50, 8), np.float32)}), (), "rows of 32 values, but its"),
        (lambda t: None, ("--max-bytes", "2 kB"), "max_bytes is 2 kB, but the packed file would take"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_packing(
    src, tmp_path, tables, embpack_command, monkeypatch, alter, options, said
):
    plan, dst = tmp_path / "plan.json", tmp_path / "p.safetensors"
    assert embpack_command("quantize", src, "--dry-run", *AUTO, "--save-plan", plan)[0] == 0
    alter(tables)
    save_file(tables, src)
    monkeypatch.setattr("embpack.cli.quantize.pack_checkpoint", lambda *_, **__: pytest.fail("it packs"))
    code, _, err = embpack_command("quantize", src, dst, "--plan", plan, *options)
    assert code == 1 and said in err and "make the plan anew with --auto --save-plan" in err and not dst.exists()


def test_new_tables_may_be_excluded_and_planned_ones_need_no_include(src, tmp_path, tables, embpack_command):
    plan, dst = tmp_path / "plan.json", tmp_path / "p.safetensors"
    tables["[odd].weight"] = np.ones((50, 32), np.float32)
    save_file(tables, src)
    assert embpack_command("quantize", src, "--dry-run", *AUTO, "--save-plan", plan, "--include", "[[]odd*")[0] == 0
    tables["new_embedding.weight"] = np.ones((50, 8), np.float32)
    save_file(tables, src)
    code, _, err = embpack_command("quantize", src, dst, "--plan", plan, "--exclude", "new_*")
    assert (code, err) == (0, "")
    assert set(embpack.load(dst)) == {"user_embedding.weight", "item_embedding.weight", "[odd].weight"}
    assert load_file(dst)["new_embedding.weight"].dtype == np.float32


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--plan", "p.json", "--auto"), "does not go with --plan"),
        (("--plan", "p.json", "--method", "asym"), "does not go with --plan"),
        (("--plan", "p.json", "--bits", "4"), "does not go with --plan"),
        (("--plan", "p.json", "--set", "*=asym"), "does not go with --plan"),
        (("--plan", "p.json", "--save-plan", "p.json"), "does not go with --plan"),
        (("--plan", "p.json", "--access-counts", "c.json"), "does not go with --plan"),
        (("--save-plan", "p.json"), "goes with --auto"),
        (("--max-bytes", "1 MB"), "goes with --auto or --plan"),
    ],
)
def test_options_that_do_not_go_together(src, tmp_path, embpack_command, options, said):
    code, _, err = embpack_command("quantize", src, tmp_path / "p.safetensors", *options)
    assert code == 2 and said in " ".join(err.replace("│", " ").split())


def test_the_budget_is_of_the_file_and_the_gate_judges_each_table(src, tmp_path, embpack_command):
    dst = tmp_path / "p.safetensors"
    for size in (6000, "30 %", "9k"):
        code, _, err = embpack_command("quantize", src, dst, *AUTO, "--max-bytes", size)
        limit = {"30 %": int(0.3 * src.stat().st_size), "9k": 9000}.get(size, size)
        assert (code, err) == (0, "") and dst.stat().st_size <= limit
    before = dst.read_bytes()
    code, _, err = embpack_command("quantize", src, dst, *AUTO, "--max-bytes", "30 %", "--max-loss", "0.01")
    assert code == 3 and "2 of 2 tables lose more than the limit of 0.01" in err and dst.read_bytes() == before
    plan = tmp_path / "plan.json"
    assert embpack_command("quantize", src, "--dry-run", *AUTO, "--save-plan", plan)[0] == 0
    code, _, err = embpack_command("quantize", src, dst, "--plan", plan, "--max-loss", "0.01")
    assert code == 3 and "2 of 2 tables lose more" in err and dst.read_bytes() == before


@pytest.mark.parametrize("case", ["folder", "read-only", "plan", "other", "space"])
def test_a_destination_that_cannot_work_is_refused_before_planning(src, tmp_path, embpack_command, monkeypatch, case):
    monkeypatch.setattr("embpack.cli.plans.plan_checkpoint", lambda *_, **__: pytest.fail("it plans"))
    dst, plan = tmp_path / "p.safetensors", tmp_path / "plan.json"
    if case == "folder":
        dst, said = tmp_path / "no" / "p.safetensors", "does not exist; create it first"
    elif case == "read-only":
        (tmp_path / "closed").mkdir(mode=0o500)
        dst, said = tmp_path / "closed" / "p.safetensors", "no permission to write in"
        if os.access(tmp_path / "closed", os.W_OK):
            pytest.skip("root may write anywhere")
    elif case == "plan":
        plan, said = tmp_path / "no" / "plan.json", "does not exist; create it first"
    elif case == "other":
        plan.write_text("{}")
        said = "exists and is no plan, so it is not replaced"
    else:
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr("embpack.formats.atomic.shutil.disk_usage", lambda folder: usage)
        said = "but 1000 bytes are free in"
    code, _, err = embpack_command("quantize", src, dst, *AUTO, "--save-plan", plan)
    assert code == 1 and said in err and not dst.exists()


def test_a_plan_counts_the_bytes_of_files_in_shards_and_of_odd_names(tmp_path, rng):
    names = ["wte", 'é"\\\n' * 5 + ".weight", "x" * 300 + "_emb", "emb"]
    tables = {name: rng.standard_normal((40 + 7 * i, 24), dtype=np.float32) for i, name in enumerate(names)}
    others = {f"layers.{i}.bias": np.ones(3, np.float32) for i in range(20)}
    folder = tmp_path / "model"
    folder.mkdir()
    files = {}
    for i, name in enumerate(names):
        own = {name: tables[name], **dict(list(others.items())[5 * i : 5 * i + 5])}
        save_file(own, folder / f"model-{i}.safetensors", {"format": "pt"})
        files |= dict.fromkeys(own, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    variants = [embpack.Variant("optimal", 4), embpack.Variant("trellis", 2.5), embpack.Variant("kmeans-cls", 4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = embpack.plan(folder, variants=variants)
    report = embpack.quantize_file(folder, tmp_path / "packed", variants=plan.variants)
    # Each of 4 files is filled up to a multiple of 8, and each place in it has some digits less.
    assert report.file_bytes_after <= plan.file_bytes <= report.file_bytes_after + 4 * (8 + 8 * 2 * 4)
