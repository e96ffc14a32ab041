"""A small part of what ``python -m tests.kill_workers`` kills, and a driver; docs/scale.md has the figures of all."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest

pytest.importorskip("ray")

import embpack
from embpack.ranges import list_ranges
from embpack.ray import Engine
from embpack.resuming import Unfinished
from tests.kill_runs import read_tree
from tests.kill_workers import TABLES, Deaths, run_with_deaths, start_cluster, write_source

ROWS = 60_000
# Ranges of some thousand rows, as many as there are files.
WAY = {"method": "optimal", "max_shard_size": "300 kB"}


@pytest.fixture(scope="module")
def cluster():
    with start_cluster(3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source") / "source.safetensors", ROWS)


@pytest.mark.parametrize("is_removing", [False, True])
def test_a_cluster_packs_what_one_machine_would_though_some_of_it_dies(cluster, src, tmp_path, is_removing):
    rng = np.random.default_rng(int(is_removing))
    # All of them long before the end.
    deaths = Deaths(cluster, rng, ROWS * len(TABLES) // 3, 2, is_removing=is_removing)
    assert run_with_deaths(src, tmp_path, WAY, deaths) == "same bytes"
    assert deaths.removed == is_removing
    assert deaths.working + deaths.idle > 0


DRIVER = """
import sys
import embpack
from embpack.ray import Engine

embpack.quantize_file(sys.argv[2], sys.argv[3], engine=Engine(sys.argv[1]), method="optimal", max_shard_size="300 kB")
"""


class Counting:
    """An engine that counts the ranges which are packed."""

    def __init__(self, engine):
        self.engine, self.packed = engine, 0

    @contextmanager
    def connect(self):
        with self.engine.connect() as workers:
            submit = workers.submit

            def count(function, *args, memory):
                self.packed += function.__name__ == "pack_range"
                return submit(function, *args, memory=memory)

            workers.submit = count
            yield workers


def test_parts_that_were_done_when_the_driver_died_are_not_made_again(cluster, src, tmp_path, monkeypatch):
    embpack.quantize_file(src, tmp_path / "whole", **WAY)
    packed, work = tmp_path / "packed", tmp_path / ".packed.embpack-unfinished"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, cluster.address, src, packed], env=environment)
    until = time.monotonic() + 120
    while len(list((work / "new").glob("*"))) < 3:
        assert driver.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not packed.exists()
    kept = []

    def start(self, folder):
        begin(self, folder)
        kept.append((self, len(self.parts), set(self.files)))

    begin = Unfinished.start
    monkeypatch.setattr(Unfinished, "start", start)
    engine = Counting(Engine())
    embpack.quantize_file(src, packed, engine=engine, resume=True, **WAY)
    assert read_tree(packed) == read_tree(tmp_path / "whole")
    [(keeper, num_parts, files)] = kept
    ranges = {
        name: sum(len(list_ranges(piece)) for piece in writer.pieces)
        for name, writer in zip(keeper.sizes, keeper.writers, strict=True)
    }
    assert len(files) >= 2
    assert engine.packed == sum(ranges[name] for name in ranges.keys() - files) - num_parts
