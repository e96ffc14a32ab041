"""The benchmarks run, and refuse to time answers that differ."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import embpack
from benchmarks.harness import AnswersDifferError, Contestant, Timing, Workload, measure_spread, race
from benchmarks.races import find_other_bytes, find_worse_row

pytest.importorskip("torch")

ROOT = Path(__file__).parent.parent


def make_workload(ours, theirs, disagreement=find_other_bytes):
    def contestant(name, answer):
        return Contestant(name, lambda: answer, len(answer), lambda: None)

    others = [contestant("theirs", theirs)]
    return Workload({"method": "asym"}, contestant("ours", ours), others, disagreement, lambda _: 0.0)


def test_quick_run_writes_its_figures(tmp_path):
    path = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.quantize", "--quick", "--no-stream", "--json", str(path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120, capture_output=True)
    report = json.loads(path.read_text())
    assert set(report) == {"machine", "left_out", "races", "streaming"}
    assert set(report["machine"]) == {"cpu", "isa", "threads_available", "python", "versions"}
    assert report["streaming"] == []
    kinds = {(race["settings"]["method"], race["settings"]["threads"]) for race in report["races"]}
    assert kinds == {("asym", 1), ("greedy", 1), ("kmeans", 1), ("asym", 2), ("greedy", 2)}
    for race_found in report["races"]:
        assert set(race_found["settings"]) == {"method", "embedding_dim", "table_bytes", "threads"}
        ours, *others = race_found["standings"]
        assert ours["ratio"] is None and others
        for other in others:
            assert 0 < other["ratio"]["low"] <= other["ratio"]["median"] <= other["ratio"]["high"]
            assert other["rows_per_second"] > 0 and 0 <= ours["loss"] <= other["loss"] * 1.0001
        method, embedding_dim = race_found["settings"]["method"], race_found["settings"]["embedding_dim"]
        assert (ours["loss"] == 0) == (method == "kmeans" and embedding_dim <= 16)


def test_answers_that_differ_do_not_race():
    ours = np.zeros((3, 8), np.uint8)
    theirs = ours.copy()
    theirs[1, 2] = 1
    with pytest.raises(AnswersDifferError, match="ours and theirs differ: 1 of 3 rows, the first is row 1"):
        race(make_workload(ours, theirs), Timing(1, 0.0))


def test_a_search_may_be_better_but_not_worse():
    weight = np.random.default_rng(0).standard_normal((40, 32), dtype=np.float32)
    better, worse = (embpack.quantize(weight, method).packed for method in ("greedy", "asym"))
    assert find_worse_row(better, worse, weight) is None
    assert "rows lose more" in find_worse_row(worse, better, weight)
    assert find_worse_row(better, worse[:, :-1], weight) == "20 and 19 bytes a row"


def test_ratios_are_paired_within_a_round():
    answer = np.zeros((5, 8), np.uint8)
    ours, theirs = race(make_workload(answer, answer), Timing(3, 0.001))
    assert ours.ratio is None and theirs.ratio.median > 0
    assert (ours.name, theirs.name, ours.rows) == ("ours", "theirs", 5)


def test_spread_is_median_and_quartiles():
    spread = measure_spread([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (spread.low, spread.median, spread.high) == (2.0, 3.0, 4.0)
    spread = measure_spread([2.0, 1.0])
    assert (spread.low, spread.median, spread.high) == (1.0, 1.5, 2.0)
