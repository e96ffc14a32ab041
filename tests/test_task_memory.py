"""What tasks of workers take of memory, by what is declared for them."""

import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

VALUES = 1 << 24

# Prints what a task takes at its peak beside what is in memory before, and what is declared.
TASK = """
import sys
from pathlib import Path

import embpack
from embpack import distribution, ranges
from embpack.formats import open_checkpoint
from embpack.methods import row_clusters, trellis_search
from embpack.rules import Rules, decide_all
from embpack.shard_writer import TableWriter

# Once is enough, for memory.
trellis_search.NUM_ROUNDS = row_clusters.ITERATIONS = 1
embpack.set_num_threads(1)
src, method, rotation, task = sys.argv[1:]
with open_checkpoint(src) as checkpoint:
    rules = Rules((), (), embpack.Variant(method, rotate=rotation or None), {}, ())
    [decision] = [each for each in decide_all(checkpoint, rules) if each.variant]
table = TableWriter(decision)
packer = ranges.fit_table(decision) if task == "pack" else None
start, stop = ranges.list_ranges(table.whole())[0]


def read(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
before = read("VmRSS")
if task == "pack":
    ranges.pack_range((decision, packer), 0, start, stop, Path(src).parent, "part")
    print(read("VmHWM") - before, distribution.bound_packing(table))
else:
    ranges.fit_table(decision)
    print(read("VmHWM") - before, distribution.bound_fitting(table))
"""


def make_table(dim, dtype):
    if dtype == "float8":
        return {"emb.weight": np.ones((VALUES // dim, dim), np.int8), "emb.weight_scale": np.float32([0.5])}
    return {"emb.weight": np.random.default_rng(0).standard_normal((VALUES // dim, dim), np.float32).astype(dtype)}


@pytest.mark.parametrize(
    ("method", "dim", "dtype", "rotation", "task"),
    [
        ("asym", 64, "float32", "", "pack"),
        ("asym", 64, "float16", "hadamard", "pack"),
        ("asym", 4096, "float32", "hadamard", "pack"),
        ("asym", 4096, "float8", "hadamard", "pack"),
        ("table", 1024, "float32", "hadamard", "fit"),
        ("trellis", 4096, "float32", "", "fit"),
        ("kmeans-cls:K=4", 1024, "float32", "", "fit"),
        ("kmeans-cls:K=4", 1024, "float16", "hadamard", "fit"),
        ("kmeans-cls:K=4", 64, "float16", "hadamard", "pack"),
    ],
)
def test_a_task_takes_no_more_than_is_declared(tmp_path, method, dim, dtype, rotation, task):
    save_file(make_table(dim, dtype), tmp_path / "model.safetensors")
    command = [sys.executable, "-c", TASK, tmp_path / "model.safetensors", method, rotation, task]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    taken, declared = map(int, done.stdout.split())
    assert 0 < taken <= declared
