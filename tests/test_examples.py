"""The examples run, and show what they say they show."""

import importlib.util
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import embpack
from embpack.layouts import RowFormat
from embpack.torch import quantize_

FOLDER = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(FOLDER.glob("*.py"))


class Example(NamedTuple):
    """Arguments for a short run, what is needed for it, and what it prints."""

    arguments: tuple[str, ...]
    needs: str
    printed: tuple[str, ...]


EXAMPLES = {
    "dlrm.py": Example(("--steps", "20"), "torch", ("log loss", "asym", "greedy", "kmeans", "the planted model")),
    "language_model.py": Example(
        (), "transformers", ('tied="untie"', 'tied="share"', "the same", "opened again, it generates the same tokens")
    ),
    "sharded_tables.py": Example(("--rows", "20000"), "torchrec", ("bytes of its own", "greatest difference")),
    "static_encoder.py": Example((), "sentence_transformers", ("mean cosine", "asym", "optimal", "trellis", "kmeans")),
    "torchrec_model.py": Example(
        ("--steps", "20"),
        "torchrec",
        ("error of pooled values", "TorchRec's own", "embpack, asym", "embpack, greedy", "embpack's own module"),
    ),
}


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what TorchRec and FBGEMM say while they are imported is not ours
        spec.loader.exec_module(module)
    return module


def test_each_script_has_an_entry():
    assert [script.name for script in SCRIPTS] == sorted(EXAMPLES)


@pytest.fixture(scope="module")
def run_example(tmp_path_factory):
    """Runs a script as a user does, each one once; returns what came of it and the folder that it ran in."""
    known = {}

    def run(name):
        example = EXAMPLES[name]
        if importlib.util.find_spec(example.needs) is None:
            pytest.skip(f"needs {example.needs}")
        if name not in known:
            command, folder = (
                [sys.executable, str(FOLDER / name), *example.arguments],
                tmp_path_factory.mktemp("example"),
            )
            known[name] = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300), folder
        return known[name]

    return run


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_it_runs(run_example, script):
    done, folder = run_example(script.name)
    assert done.returncode == 0, done.stderr
    assert [words for words in EXAMPLES[script.name].printed if words not in done.stdout] == []
    assert "warn" not in done.stderr.lower()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_the_page_shows_it(script):
    assert f"python examples/{script.name}\n" in (FOLDER / "README.md").read_text()


# DLRM


@pytest.fixture(scope="module")
def dlrm():
    return load("dlrm")


@pytest.fixture(scope="module")
def clicks(dlrm):
    """Rows of a model that was trained for a tenth of the default."""
    return {row.name: row for row in dlrm.run(500)}


def test_the_tables_learn(clicks):
    """At least a tenth of what there is to learn: in 500 steps it is 0.22 to 0.36 of it, by eight seeds."""
    base_rate, without, floats, planted = (
        clicks[name].log_loss
        for name in ("always the base rate", "without tables", "float32 tables", "the planted model")
    )
    assert planted < floats < without < base_rate
    assert without - floats > 0.1 * (base_rate - planted)


def test_packing_takes_little_of_what_was_learned(clicks):
    """Little by the errors of the rows.

    If rows have independent errors of relative size e, the inner product of two has a relative squared error of about
    2 e^2. For small logits, what they gain in log loss is quadratic in them, and what errors take is in the errors: it
    is this share of the gain, or less, as what was learned has few directions and errors have all. With eight seeds it
    was at most 0.61 of the bound.
    """
    gain = clicks["always the base rate"].log_loss - clicks["float32 tables"].log_loss
    packed = [row for row in clicks.values() if row.added is not None]
    assert len(packed) == 4
    for row in packed:
        assert abs(row.added) < 2 * row.l2_loss**2 * gain, row
    assert 2 * clicks["greedy, 4 bits"].l2_loss ** 2 < 0.01


def test_smaller_errors_of_the_rows(clicks):
    losses = [clicks[f"{name} bits"].l2_loss for name in ("kmeans, 4", "greedy, 4", "asym, 4", "greedy, 2")]
    assert losses == sorted(losses) and losses[0] > 0
    assert clicks["greedy, 4 bits"].added < clicks["greedy, 2 bits"].added


def test_bytes_are_those_of_the_rows(clicks, dlrm):
    rows = sum(field.rows for field in dlrm.FIELDS)
    assert clicks["float32 tables"].nbytes == rows * dlrm.EMBEDDING_DIM * 4
    for method, bits in dlrm.METHODS:
        layout = "codebook" if method == "kmeans" else "uniform"
        row_bytes = RowFormat(dlrm.EMBEDDING_DIM, bits, "float16", layout).row_bytes
        assert clicks[f"{method}, {bits} bits"].nbytes == rows * row_bytes


@pytest.mark.parametrize(("method", "bits"), [("asym", 4), ("greedy", 4), ("kmeans", 4), ("greedy", 2)])
def test_a_saved_model_predicts_the_same(dlrm, method, bits):
    packed, clicks = dlrm.DLRM(), dlrm.PlantedClicks().draw(100)
    quantize_(packed, method, bits=bits)
    loaded = dlrm.save_and_load(packed, method, bits)
    assert torch.equal(loaded(clicks.dense, clicks.bags), packed(clicks.dense, clicks.bags))


# TorchRec


@pytest.fixture(scope="module")
def collections():
    if importlib.util.find_spec("torchrec") is None:
        pytest.skip("needs torchrec")
    return {row.name: row for row in load("torchrec_model").run(300)}


def test_asym_is_torchrecs_own(collections):
    assert collections["embpack, asym"][1:] == collections["TorchRec's own"][1:]


def test_greedy_errs_less_in_the_same_bytes(collections):
    """On normal values of d = 64 its rows err 0.915 times as much as those of minimum and maximum (.1018 by .1112)."""
    greedy, own = collections["embpack, greedy"], collections["TorchRec's own"]
    assert greedy.nbytes == own.nbytes < 0.2 * collections["float32"].nbytes
    assert greedy.pooled_error < 0.95 * own.pooled_error
    assert greedy.logit_error < own.logit_error


def test_our_module_has_no_gaps_between_rows(collections):
    ours, greedy = collections["embpack's own module"], collections["embpack, greedy"]
    assert ours.nbytes * 48 == greedy.nbytes * 36
    assert ours.pooled_error == pytest.approx(greedy.pooled_error, rel=1e-4)


# Sharded tables


def test_two_processes_that_torchrun_starts():
    if importlib.util.find_spec("torchrec") is None:
        pytest.skip("needs torchrec")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*start, str(FOLDER / "sharded_tables.py"), "--rows", "20001"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    processes = [line.split() for line in done.stdout.splitlines() if re.match(r" [01] ", line)]
    assert [cells[0] for cells in processes] == ["0", "1"]
    # Two float32 sums of twenty rows of normal values, in two orders: some units of 2e-6, the last place of 16 to 32.
    assert all(float(cells[-1]) < 1e-5 for cells in processes)


# The static encoder


def table_rows(text: str) -> list[list[str]]:
    """Cells of the lines that begin with a method."""
    lines = [re.sub(r"[`|%]", " ", line).split() for line in text.splitlines()]
    return [cells for cells in lines if len(cells) == 8 and cells[0] in embpack.METHODS]


def test_the_figures_on_the_page_are_what_the_example_prints(run_example):
    """Bytes exactly; the others may differ a little with the version of NumPy, whose documentation is searched."""
    page = (FOLDER.parent / "docs" / "static_encoders.md").read_text()
    done, _ = run_example("static_encoder.py")
    shown, written = table_rows(done.stdout), table_rows(page)
    assert [row[0] for row in written] == ["asym", "greedy", "optimal", "trellis", "kmeans", "optimal"]
    assert [row[:4] for row in shown] == [row[:4] for row in written]
    np.testing.assert_allclose(*[np.array([row[4:6] for row in rows], float) for rows in (shown, written)], atol=0.002)
    np.testing.assert_allclose(*[np.array([row[6:] for row in rows], float) for rows in (shown, written)], atol=2.5)
