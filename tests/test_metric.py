"""A figure of the user's own beside the loss: embpack.compare(metric=) and embpack compare --metric."""

import csv
import json
import re
import sys

import numpy as np
import pytest
import torch
from checkpoints import Arrays, write_safetensors

import embpack
from embpack import Variant
from embpack.comparison.metric import Metrics

RNG = np.random.default_rng(0)
USER = RNG.standard_normal((300, 16), np.float32)
ITEM = RNG.standard_normal((200, 8)).astype(np.float16)
TABLES = {"user_emb.weight": USER, "item_emb.weight": ITEM}


def sum_all(tables) -> float:
    return sum(float(table.sum(dtype=np.float64)) for table in tables.values())


def test_it_gets_all_rows_as_lookups_return_them():
    seen = []

    def metric(tables):
        seen.append(tables)
        return len(seen)

    ways = [Variant("asym"), Variant("kmeans"), Variant("trellis", 3.5, rotate="hadamard")]
    results = embpack.compare(TABLES, ["asym", "kmeans"], metric=metric)
    results += embpack.compare(TABLES, "trellis", 3.5, rotate="hadamard", metric=metric)
    assert [(result.metric, result.metric_of_floats) for result in results] == [(2, 1), (3, 1), (5, 4)]
    floats, *packed = [seen[i] for i in (0, 1, 2, 4)]
    for tables in seen:
        assert [(name, table.dtype, table.shape) for name, table in tables.items()] == [
            ("user_emb.weight", np.float32, (300, 16)),
            ("item_emb.weight", np.float32, (200, 8)),
        ]
    for name, weight in TABLES.items():
        assert np.array_equal(floats[name], weight.astype(np.float32))
        for way, tables in zip(ways, packed, strict=True):
            table = embpack.quantize(weight, way.method, bits=way.bits, rotate=way.rotate)
            assert np.array_equal(tables[name], table.dequantize())


def test_of_several_tables_results_are_of_all_together():
    asym, greedy = embpack.compare(TABLES, ["asym", "greedy"])
    assert (asym.table, asym.method, greedy.method, asym.metric, asym.metric_of_floats) == (
        *("total", "asym", "greedy"),
        *(None, None),
    )
    [alone] = embpack.compare({"user": USER}, "asym", metric=sum_all)
    assert alone.table == "user" and alone.metric_of_floats == sum_all({"user": USER})
    [unnamed] = embpack.compare(USER, "asym", metric=lambda tables: tables["weight"][0, 0])
    assert unnamed.metric_of_floats == USER[0, 0]


def test_what_a_metric_does_to_its_tables_stays_there():
    def clear(tables) -> float:
        found = sum_all(tables)
        for table in tables.values():
            table[:] = 0
        return found

    before = USER.copy()
    results = embpack.compare({"user": USER, "item": ITEM}, ["asym", "greedy"], metric=clear)
    again = embpack.compare({"user": USER, "item": ITEM}, ["asym", "greedy"], metric=sum_all)
    assert [result.metric for result in results] == [result.metric for result in again]
    assert np.array_equal(USER, before) and results[0].metric_of_floats == again[0].metric_of_floats


@pytest.mark.parametrize("value", [1, 1.5, np.float32(1.5), np.array(1.5), torch.tensor(1.5)])
def test_numbers_of_any_kind_are_one(value):
    [result] = embpack.compare(USER, "asym", metric=lambda tables: value)
    assert type(result.metric) is float and result.metric == float(value)


@pytest.mark.parametrize("value", [None, "high", True, [0.5], np.ones(1), torch.ones(2), 1j])
def test_what_is_no_number_is_named(value):
    def auc(tables):
        return value

    with pytest.raises(
        TypeError, match=re.escape(f"auc returned {value!r} for float tables; a metric returns one num")
    ):
        embpack.compare(USER, "asym", metric=auc)


def test_mistakes_are_named():
    calls = iter([0.5, float("nan")])
    with pytest.raises(ValueError, match=r"returned nan for tables packed by asym at 4 bits.*must be finite"):
        embpack.compare(USER, "asym", metric=lambda tables: next(calls))
    with pytest.raises(TypeError, match="metric is a str; it must be a function of tables by name"):
        embpack.compare(USER, "asym", metric="auc")
    with pytest.raises(ValueError, match="there are no tables"):
        embpack.compare({})
    with pytest.raises(ZeroDivisionError):
        embpack.compare(USER, "asym", metric=lambda tables: 1 / 0)
    with pytest.raises(TypeError, match="user: weight is int64"):
        embpack.compare({"user": np.ones((20, 4), np.int64)}, "asym")


def test_a_way_that_one_table_cannot_be_packed_in_is_not_measured():
    tables = {"user": USER, "large": 1e6 * USER}
    with pytest.warns(UserWarning, match=r"left out asym at 4 bits with float16 parameters of large: "):
        results = embpack.compare(tables, "asym", param_dtype=["float16", "float32"], metric=sum_all)
    assert [result.param_dtype for result in results] == ["float32"]


# The command line

CODE = """
import numpy as np

def total(tables):
    return sum(table.sum(dtype=np.float64) for table in tables.values())

class Recall:
    @staticmethod
    def at_10(tables):
        return np.float32(len(tables["user_emb.weight"]))

def wrong(tables):
    user = tables["user_emb.weight"]
    return np.dot(user, user)

def text(tables):
    return "high"

number = 3
"""


@pytest.fixture
def model(tmp_path, monkeypatch):
    (tmp_path / "my_metrics.py").write_text(CODE)
    (tmp_path / "broken.py").write_text("import numpy\n\nraise KeyError('no data')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("my_metrics", "broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return write_safetensors(tmp_path, Arrays(TABLES, {}))


def test_it_stands_in_table_json_csv_and_page(embpack_command, model, tmp_path):
    options = ("--methods", "asym,greedy", "--metric", "my_metrics:total")
    code, out, err = embpack_command("compare", model, *options, "--csv", "all.csv", "--html", "page.html")
    assert (code, err) == (0, "")
    expected = {result.method: result for result in embpack.compare(TABLES, ["asym", "greedy"], metric=sum_all)}
    overall = out[out.index("All 2 tables") :]
    assert "total" in overall.splitlines()[1] and "change" in overall.splitlines()[1]
    for method, result in expected.items():
        change = result.metric - result.metric_of_floats
        [line] = [line for line in overall.splitlines() if re.match(rf"[* ]\s+{method} ", line)]
        assert f"{result.metric:.6g}" in line and f"{change:+.3g}" in line
    floats = expected["asym"].metric_of_floats
    assert f"total of the float tables: {floats:.6g}" in overall
    page = (tmp_path / "page.html").read_text()
    assert f"total of the float tables: {floats:.6g}." in page and "<th>against float</th>" in page
    assert f"<td>{expected['greedy'].metric:.6g}</td>" in page
    for row in csv.DictReader((tmp_path / "all.csv").read_text().splitlines()):
        result = expected[row["method"]]
        assert (float(row["metric"]), float(row["metric_of_floats"])) == (result.metric, floats)
    code, out, _ = embpack_command("compare", model, *options, "--json")
    value = json.loads(out)
    assert (code, value["metric"]) == (0, "total")
    assert {each["method"]: each["metric"] for each in value["overall"]} == {
        method: result.metric for method, result in expected.items()
    }
    assert all(each["metric"] is None for each in value["results"])


def test_one_table_has_it_in_its_own(embpack_command, tmp_path, model):
    options = ("--methods", "asym", "--metric", "my_metrics:Recall.at_10", "--exclude", "item*")
    code, out, _ = embpack_command("compare", model, *options)
    assert code == 0 and "at_10 of the float tables: 300\n" in out
    assert re.search(r"asym .* 300 +\+0 ", out)


def test_all_rows_are_measured(embpack_command, tmp_path):
    (tmp_path / "my_metrics.py").write_text(CODE)
    large = {"user_emb.weight": RNG.standard_normal((20_001, 4), np.float32)}
    path = write_safetensors(tmp_path, Arrays(large, {}))
    sys.modules.pop("my_metrics", None)
    sys.path.insert(0, str(tmp_path))
    try:
        code, out, _ = embpack_command("compare", path, "--methods", "asym", "--metric", "my_metrics:total")
    finally:
        sys.path.remove(str(tmp_path))
        del sys.modules["my_metrics"]
    assert code == 0 and "20,001 rows of 4 float32 values, all measured" in out
    assert f"total of the float tables: {sum_all(large):.6g}" in out


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("my_metrics", 2, "give module:function, such as my_metrics:auc"),
        (":total", 2, "give module:function"),
        ("nowhere:total", 2, "there is no module 'nowhere', neither in "),
        ("my_metrics:nothing", 2, "my_metrics.py) has no 'nothing'"),
        ("my_metrics:number", 2, "my_metrics:number is 3; it must be a function of tables by name"),
        ("broken:total", 1, "importing broken failed: KeyError: 'no data' ({folder}/broken.py, line 3, in <module>)"),
        ("my_metrics:wrong", 1, "my_metrics:wrong failed: ValueError: shapes (300,16) and (300,16) not aligned"),
        ("my_metrics:wrong", 1, "({folder}/my_metrics.py, line 14, in wrong)"),
        ("my_metrics:text", 1, "text returned 'high' for float tables; a metric returns one number, such as an AUC"),
    ],
)
def test_mistakes_in_a_module_are_named(embpack_command, model, tmp_path, text, code, message):
    found, out, err = embpack_command("compare", model, "--methods", "asym", "--metric", text)
    said = " ".join(err.replace("│", " ").split())
    assert (found, out) == (code, "")
    assert message.format(folder=tmp_path) in said


def test_a_sample_is_refused(embpack_command, model):
    options = ("--metric", "my_metrics:total", "--rows", "100")
    code, _, err = embpack_command("compare", model, *options)
    assert code == 2 and "100 rows are a sample, but --metric takes whole tables" in " ".join(err.split())
    code, _, _ = embpack_command("compare", model, "--methods", "asym", "--metric", "my_metrics:total", "--rows", "all")
    assert code == 0


def test_metrics_go_to_results_by_their_way():
    [result] = embpack.compare(USER, "asym")
    metrics = Metrics("auc", 0.75, {result.variant: 0.5, Variant("greedy"): 0.25})
    [measured] = metrics.add_to([result])
    assert (measured.metric, measured.metric_of_floats) == (0.5, 0.75)
