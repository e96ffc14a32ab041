"""How long packing will take: by tables, ways to pack them, and what is copied."""

import json
from dataclasses import replace

import numpy as np
import pytest
from checkpoints import Arrays, write_safetensors

from embpack import estimate
from embpack.cli import show
from embpack.estimate import estimate_seconds
from embpack.formats import open_checkpoint
from embpack.rules import Rules, decide_all
from embpack.variant import Variant


def make_source(folder, **tables):
    rng = np.random.default_rng(0)
    arrays = {f"{name}_emb.weight": rng.standard_normal(shape, np.float32) for name, shape in tables.items()}
    return write_safetensors(folder, Arrays(arrays, {"top.weight": np.ones((300, 400), np.float32)}))


@pytest.fixture
def timed(monkeypatch):
    """Each row takes a microsecond a column, and a millisecond to learn from; lists the tables that are timed."""
    seen = []

    def time_table(decision):
        seen.append(decision.tensor.name)
        return estimate._Timing(1e-3, 1e-6 * decision.tensor.shape[1])

    monkeypatch.setattr(estimate, "_time_table", time_table)
    monkeypatch.setattr(estimate, "_time_copies", lambda tensors: 0.0)
    return seen


def estimate_of(src, method="optimal"):
    with open_checkpoint(src) as checkpoint:
        return estimate_seconds(decide_all(checkpoint, Rules(variant=Variant(method))))


def test_rows_of_one_width_are_timed_once_and_count_all(tmp_path, timed):
    src = make_source(tmp_path, a=(5000, 16), b=(500, 16), c=(200, 64))
    by_rows = 1e-6 * (5500 * 16 + 200 * 64)
    assert estimate_of(src) == pytest.approx(by_rows)
    assert estimate_of(src, "trellis") == pytest.approx(by_rows + 1e-3 * (4096 + 500 + 200))
    assert estimate_of(src, "kmeans-cls") == pytest.approx(by_rows + 1e-3 * (5000 + 500 + 200))
    assert set(timed) == {"a_emb.weight", "c_emb.weight"}


@pytest.mark.parametrize("method", ["asym", "trellis", "table", "kmeans-cls"])
@pytest.mark.parametrize("rows", [200, 8192, 150_000])
def test_any_method_and_size_has_an_estimate(tmp_path, method, rows):
    src = make_source(tmp_path, a=(rows, 16))
    assert 0 < estimate_of(src, method) < 600


def test_rows_that_cannot_be_packed_have_no_estimate(embpack_command, tmp_path):
    weight = np.ones((100, 16), np.float32)
    weight[3, 4] = np.nan
    src = write_safetensors(tmp_path, Arrays({"a_emb.weight": weight}))
    assert estimate_of(src) is None
    code, out, _ = embpack_command("quantize", src, "--dry-run")
    assert code == 0 and "packing takes" not in out
    assert json.loads(embpack_command("quantize", src, "--dry-run", "--json")[1])["totals"]["estimated_seconds"] is None


def test_copies_take_time_too(tmp_path):
    src = make_source(tmp_path, a=(16, 16))
    with open_checkpoint(src) as checkpoint:
        copied = [tensor for tensor in checkpoint.tensors if tensor.name == "top.weight"]
        assert estimate._time_copies(copied) > 0 and estimate._time_copies([]) == 0


def test_what_is_left_out_takes_no_time(tmp_path, monkeypatch):
    src, copied = make_source(tmp_path, a=(16, 16)), []
    monkeypatch.setattr(estimate, "_time_copies", lambda tensors: copied.extend(tensors) or 0.0)
    with open_checkpoint(src) as checkpoint:
        decisions = decide_all(checkpoint, Rules())
        for can_be_copied in (True, False):
            changed = [replace(each, tensor=replace(each.tensor, can_be_copied=can_be_copied)) for each in decisions]
            copied.clear()
            estimate_seconds(changed)
            assert [tensor.name for tensor in copied] == (["top.weight"] if can_be_copied else [])


def test_a_dry_run_says_how_long_and_how_much(embpack_command, tmp_path):
    src = make_source(tmp_path, a=(5000, 16))
    code, out, _ = embpack_command("quantize", src, tmp_path / "packed", "--dry-run")
    assert code == 0 and "packing takes about 1 s with " in out and " kB of disk" in out
    value = json.loads(embpack_command("quantize", src, tmp_path / "packed", "--dry-run", "--json")[1])
    assert 0 < value["totals"]["estimated_seconds"] < 10


def test_a_long_run_says_so_before_it_begins(embpack_command, tmp_path, monkeypatch):
    src = make_source(tmp_path, a=(5000, 16))
    for seconds, from_bytes, is_said in ((0, 1, True), (30, 1, False), (0, 1 << 28, False)):
        monkeypatch.setattr("embpack.cli.quantize._LONG_SECONDS", seconds)
        monkeypatch.setattr("embpack.cli.quantize._LONG_BYTES", from_bytes)
        code, out, _ = embpack_command("quantize", src, tmp_path / "packed")
        assert code == 0 and ("packing takes about" in out) is is_said


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.01, "1 s"),
        (59, "59 s"),
        (119, "2 min"),
        (3590, "1 h 0 min"),
        (7800, "2 h 10 min"),
        (172_700, "2 days 0 h"),
        (5e5, "5 days 19 h"),
    ],
)
def test_durations_as_people_say_them(seconds, text):
    assert show.duration(seconds) == text
