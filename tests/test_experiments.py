"""The experiments run, write finite numbers, and read what they write."""

import json
import math
import re

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

from experiments.guan2019 import criteo, training
from experiments.guan2019.__main__ import main
from experiments.guan2019.criteo import NO_CATEGORY, NO_INTEGER, PlantedClicks, read_clicks, write_clicks


@pytest.mark.parametrize("what", ["fig1", "fig2", "table1"])
def test_small_run_writes_finite_numbers(what, tmp_path):
    assert main([what, "--small", "--dims", "64", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / f"{what}.json").read_text())
    assert report["entries"] and all(math.isfinite(entry["ours"]) for entry in report["entries"])


@pytest.fixture(scope="module")
def table3(tmp_path_factory):
    """Entries of each result of table3 at d = 8, by its name; trained once."""
    folder = tmp_path_factory.mktemp("table3")
    sizes = ["--dims", "8", "--rows", "500", "--examples", "10000", "--held-out", "5000"]
    assert main(["table3", *sizes, "--out", str(folder)]) == 0
    return {path.stem: json.loads(path.read_text())["entries"] for path in folder.iterdir()}


def test_training_beats_the_base_rate(table3):
    labels = next(iter(PlantedClicks())).labels.mean()
    entropy = -(labels * math.log(labels) + (1 - labels) * math.log(1 - labels))
    fp32 = table3["table3"][0]
    assert fp32["series"] == "FP32" and fp32["ours"] < entropy


def test_sizes_are_the_papers(table3):
    # The paper prints 37.49 where the bytes of rows give 37.50.
    differences = [entry["difference"] for entry in table3["table3-sizes"] if entry["difference"] is not None]
    assert differences and all(abs(difference) < 0.025 for difference in differences)


def test_smaller_errors_cost_less(table3):
    costs = {entry["series"]: entry["ours"] for entry in table3["table3-quadratic"]}
    # Eight values have a codebook of sixteen: all that is lost is what float16 rounds off. In 1e-5 of log loss.
    assert abs(costs["KMEANS (FP16)"]) < 0.1
    assert costs["ASYM-8BITS"] < costs["ASYM"]


@pytest.mark.parametrize("name", ["day_0", "day_0.gz"])
def test_a_written_log_reads_back(name, tmp_path):
    clicks = next(iter(PlantedClicks())).first(300)
    assert (clicks.integers == NO_INTEGER).any() and (clicks.categories == NO_CATEGORY).any()
    write_clicks(tmp_path / name, [clicks])
    (read,) = read_clicks(tmp_path / name)
    for field in ("labels", "integers", "categories"):
        np.testing.assert_array_equal(getattr(read, field), getattr(clicks, field))


def write_log(path, lines):
    """Write a log of generated clicks; returns its lines, each a list of fields."""
    write_clicks(path, [next(iter(PlantedClicks())).first(lines)])
    return [line.split("\t") for line in path.read_text().splitlines()]


def damage_log(path, *, line, replace):
    """Put other fields, ``replace(fields)``, into one line of a written log, counted from 1."""
    rows = write_log(path, 25)
    rows[line - 1] = replace(rows[line - 1])
    path.write_text("".join("\t".join(fields) + "\n" for fields in rows))
    return path


# What a line is replaced by, and what is said of it. Fields are a label, 13 integers and 26 hashes.
DAMAGES = {
    "a field is missing": (lambda fields: fields[:-1], " has 39 fields between tabs, not 40"),
    "a field too many": (lambda fields: [*fields, "0"], " has 41 fields between tabs, not 40"),
    "empty": (lambda fields: [], " has 1 fields between tabs, not 40"),
    "label is 2": (lambda fields: ["2", *fields[1:]], ": "),
    "no label": (lambda fields: ["", *fields[1:]], ": "),
    "integer is a word": (lambda fields: [*fields[:13], "seven", *fields[14:]], ": .*'seven'"),
    "integer is a fraction": (lambda fields: [fields[0], "1.5", *fields[2:]], ": .*'1.5'"),
    "hash is not hexadecimal": (lambda fields: [*fields[:14], "68fd1e6g", *fields[15:]], ": .*'68fd1e6g'"),
    "last hash is not hexadecimal": (lambda fields: [*fields[:39], "-"], ": .*'-'"),
}


@pytest.mark.parametrize("line", [3, 10, 11, 25])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_malformed_line_is_named(damage, line, tmp_path, monkeypatch):
    replace, message = DAMAGES[damage]
    path = damage_log(tmp_path / "day_0", line=line, replace=replace)
    monkeypatch.setattr(criteo, "CHUNK_EXAMPLES", 10)
    chunks = read_clicks(path)
    for _ in range((line - 1) // 10):
        assert len(next(chunks)) == 10
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}, line {line}{message}"):
        next(chunks)


def test_a_malformed_line_stops_the_command(tmp_path, capsys):
    path = damage_log(tmp_path / "day_0", line=3, replace=lambda fields: fields[1:])
    sizes = ["--dims", "8", "--rows", "100", "--examples", "10", "--held-out", "10"]
    assert main(["table3", "--data", str(path), *sizes, "--out", str(tmp_path / "out")]) == 1
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"{path}, line 3 has 39 fields between tabs, not 40 ")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("examples", "held_out"), [(20, 6), (26, 2), (1000, 1000)])
def test_a_log_that_ends_too_early_stops_the_command(examples, held_out, tmp_path, capsys):
    path = tmp_path / "day_0"
    write_log(path, 25)
    sizes = ["--dims", "8", "--rows", "100", "--examples", str(examples), "--held-out", str(held_out)]
    assert main(["table3", "--data", str(path), *sizes, "--out", str(tmp_path / "out")]) == 1
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"{path} ends before {examples:,} examples to train on and {held_out:,} to hold out")
    assert "--examples and --held-out" in message


@pytest.mark.parametrize("what", ["table2", "table3"])
def test_without_pytorch_training_names_the_extra(what, tmp_path, capsys, monkeypatch, hide_package):
    # Past the cache, which may know the models of these settings.
    monkeypatch.setattr(training, "measure", training.measure.__wrapped__)
    hide_package("torch", "experiments.guan2019.model")
    assert main([what, "--small", "--dims", "8", "--out", str(tmp_path)]) == 1
    (message,) = capsys.readouterr().err.splitlines()
    assert "PyTorch" in message and re.search(r"pip install '.*torch.*'", message)
    assert not list(tmp_path.iterdir())
