"""embpack methods: what each method is, and what it measures here and now."""

import dataclasses
import json
import re

import numpy as np
import pytest
from rich.cells import cell_len

import embpack
from embpack.cli import methods, show
from embpack.cli.methods import explain_parameter
from embpack.methods import METHODS, parse_method
from embpack.readers import find_readers
from embpack.samples import make_table
from embpack.variant import Variant


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(methods, "_ROWS", 100)


def test_each_method_has_a_line_of_what_it_is_and_one_of_figures(embpack_command):
    code, out, err = embpack_command("methods")
    assert (code, err) == (0, "")
    weight = make_table(np.random.default_rng(0), 100, 64)
    for name, method in METHODS.items():
        assert len(re.findall(rf"^{name} +(the default; )?{re.escape(method.summary)}$", out, re.MULTILINE)) == 1
        table = embpack.quantize(weight, name)
        figures = rf"{table.nbytes / 100:.4g} +{table.loss:.5f} +[\d.]+( [kMG])? +[\d.]+( [kMG])? +[a-z, ]+"
        assert len(re.findall(rf"^\*? +{name} +{figures}$", out, re.MULTILINE)) == 1
    assert "100 rows of 64 values that look trained" in out


def test_the_least_loss_comes_first(embpack_command):
    _, out, _ = embpack_command("methods")
    order = [line.split()[0] for line in out.splitlines() if line.split() and line.split()[0] in METHODS]
    assert order[0] == "kmeans" and order[-1] == "table"
    marked = re.findall(r"^\* +(\S+) ", out, re.MULTILINE)
    assert "optimal" in marked and "asym" not in marked


@pytest.mark.parametrize("width", [60, 80])
def test_it_fits_a_terminal(embpack_command, monkeypatch, width):
    for arguments in ([], ["optimal"], ["trellis"]):
        monkeypatch.setattr(show, "output", show.Printer(width=width, force_terminal=True))
        _, out, _ = embpack_command("methods", *arguments)
        assert [line for line in out.splitlines() if cell_len(line) > width] == []
        if width == 80:
            assert "..." not in out and "no room for" not in out


def test_one_method_is_shown_with_its_parameters_at_each_number_of_bits(embpack_command):
    code, out, err = embpack_command("methods", "greedy:b=100")
    assert (code, err) == (0, "")
    assert "greedy: the paper's search, mended for wide rows" in out
    assert "with its two weaknesses mended" in out
    assert re.search(r"^b +100 +number of steps in the full range, at least 1\.$", out, re.MULTILINE)
    assert re.search(r"^r +0\.16 +the share of the range", out, re.MULTILINE)
    weight = make_table(np.random.default_rng(0), 100, 64)
    for bits in (2, 4, 8):
        table = embpack.quantize(weight, "greedy:b=100", bits=bits)
        assert re.search(rf"^\*? +{bits} +{table.nbytes // 100} +{table.loss:.5f} ", out, re.MULTILINE)
    assert "embpack quantize SRC DST --method greedy:b=100" in out
    _, out, _ = embpack_command("methods", "trellis")
    assert re.findall(r"^\* +(\d) +", out, re.MULTILINE) == ["2", "3", "4", "6"]
    assert "parameter" not in out and "docs/trellis.md" in out


def test_json(embpack_command):
    code, out, err = embpack_command("methods", "--json")
    value = json.loads(out)
    assert (code, err) == (0, "")
    assert (value["schema"], value["command"], value["rows_measured"], value["embedding_dim"]) == (
        1,
        "methods",
        100,
        64,
    )
    assert [each["name"] for each in value["methods"]] == list(METHODS)
    for each in value["methods"]:
        method = METHODS[each["name"]]
        assert (each["summary"], each["layout"], each["bits"]) == (method.summary, method.layout, 4)
        assert each["readers"] == list(find_readers(Variant(each["name"]).make_row_format(64)))
        assert each["rows_per_second"] > 0 and each["lookups_per_second"] > 0
    _, out, _ = embpack_command("methods", "greedy:b=7", "--json")
    found = json.loads(out)["methods"]
    assert [each["bits"] for each in found] == [2, 4, 8]
    assert found[0]["parameters"] == {"b": 7, "r": 0.16}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_and_parameter_is_explained(name):
    assert 20 < len(METHODS[name].summary) <= 57  # beside the longest name and a loss, a line has 80 columns
    for field in dataclasses.fields(METHODS[name]):
        assert len(explain_parameter(METHODS[name], field.name)) > 10, field.name


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("trelis", "trellis"), ("k-means", "kmeans"), ("Optimal", "optimal"), ("greedy_paper", "greedy-paper")],
)
def test_a_mistyped_method_gets_a_suggestion(embpack_command, wrong, meant):
    message = rf"there is no method '{wrong}'; did you mean '{meant}'\? Choose one of asym, "
    with pytest.raises(ValueError, match=message):
        parse_method(wrong)
    code, out, err = embpack_command("methods", wrong)
    assert (code, out) == (2, "") and f"did you mean '{meant}'?" in err
    with pytest.raises(ValueError, match=r"there is no method 'xyz'; choose one of asym, "):
        parse_method("xyz")


def test_a_mistyped_parameter_gets_a_suggestion():
    with pytest.raises(ValueError, match=r"method 'optimal' has no parameter 'efort'; it has: effort"):
        parse_method("optimal:efort=fast")


def test_a_parameter_that_is_found_in_each_table_has_no_value(embpack_command):
    _, out, _ = embpack_command("methods", "table")
    assert re.search(r"^xmin +- +the smallest value of the table", out, re.MULTILINE)
    _, out, _ = embpack_command("methods", "table", "--json")
    assert json.loads(out)["methods"][0]["parameters"] == {"xmin": None, "xmax": None}
