"""How long packing will take: by tables, ways to pack them, and what is copied."""

import json

import numpy as np
import pytest
from checkpoints import Arrays, write_safetensors

from embpack import estimate
from embpack.cli import show
from embpack.estimate import estimate_seconds
from embpack.formats import open_checkpoint
from embpack.rules import Rules, decide_all


def make_source(folder, **tables):
    rng = np.random.default_rng(0)
    arrays = {f"{name}_emb.weight": rng.standard_normal(shape, np.float32) for name, shape in tables.items()}
    return write_safetensors(folder, Arrays(arrays, {"top.weight": np.ones((300, 400), np.float32)}))


@pytest.fixture
def timed(monkeypatch):
    """Each row takes a microsecond a column, and copies take none; lists the tables that are timed."""
    seen = []

    def time_rows(table, count):
        seen.append((table.decision.tensor.name, count))
        return 1e-6 * count * table.decision.tensor.shape[1]

    monkeypatch.setattr(estimate, "_time_rows", time_rows)
    monkeypatch.setattr(estimate, "_time_copies", lambda tensors: 0.0)
    return seen


def estimate_of(src):
    with open_checkpoint(src) as checkpoint:
        return estimate_seconds(decide_all(checkpoint, Rules()))


def test_rows_of_one_width_are_timed_once_and_count_all(tmp_path, timed):
    src = make_source(tmp_path, a=(5000, 16), b=(300, 16), c=(200, 64))
    assert estimate_of(src) == pytest.approx(1e-6 * (5300 * 16 + 200 * 64))
    assert {name for name, _ in timed} == {"a_emb.weight", "c_emb.weight"}


def test_more_rows_are_packed_until_their_time_can_be_told(tmp_path, timed, monkeypatch):
    src = make_source(tmp_path, a=(40_000, 32))
    monkeypatch.setattr(estimate, "_SECONDS", 0.6)
    assert estimate_of(src) == pytest.approx(1e-6 * 40_000 * 32)
    assert [count for _, count in timed] == [8192, 16384, 32768]


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


def test_a_dry_run_says_how_long_and_how_much(embpack_command, tmp_path):
    src = make_source(tmp_path, a=(5000, 16))
    code, out, _ = embpack_command("quantize", src, tmp_path / "packed", "--dry-run")
    assert code == 0 and "packing takes about 1 s with " in out and " kB of disk" in out
    value = json.loads(embpack_command("quantize", src, tmp_path / "packed", "--dry-run", "--json")[1])
    assert 0 < value["totals"]["estimated_seconds"] < 10


def test_a_long_run_says_so_before_it_begins(embpack_command, tmp_path, monkeypatch):
    src = make_source(tmp_path, a=(5000, 16))
    for from_bytes, is_said in ((1, True), (1 << 28, False)):
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
