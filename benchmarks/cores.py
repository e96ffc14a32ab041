"""How busy the CPUs are: the share of its time that each loses to other processes, and to other machines of its host.

A loop of fixed work runs on one CPU after the other, for a while before the races and a while after. Its shortest turn
is what the work takes undisturbed: it is shorter than the time that Linux gives one process before the next, so some
turns are whole even where another process always waits. What the turns take longer is lost. A CPU that one other
process keeps busy loses half of its time; one whose core another thread uses loses up to half, too.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Found = TypeVar("Found")

# Of each CPU, before and after; a CPU that has slept runs for a while before it is as fast as it gets.
WARMING_SECONDS, WATCHED_SECONDS = 0.05, 0.25
# A turn of the loop multiplies so many values so often: about half a millisecond, from the first-level cache.
VALUES, REPETITIONS = 4096, 500
# Figures of a machine that loses more are not worth quoting.
MOST_LOST = 0.1


@dataclass(frozen=True)
class Turns:
    """How long turns of the loop took on a CPU, in seconds."""

    shortest: float
    mean: float


@dataclass(frozen=True)
class CpuLoss:
    """The shares of its time that a CPU lost before the races and after."""

    cpu: int
    before: float
    after: float


@dataclass(frozen=True)
class Busyness:
    """How busy the CPUs that we may run on were.

    Attributes:
        cpus: each of them.
        worth_quoting: whether none lost more than MOST_LOST.
    """

    cpus: list[CpuLoss]
    worth_quoting: bool


def watch(run: Callable[[], Found]) -> tuple[Found, Busyness]:
    """Run something, and say how busy the CPUs were before and after."""
    before = time_cpus()
    found = run()
    return found, judge(before, time_cpus())


def time_cpus(seconds: float = WATCHED_SECONDS) -> dict[int, Turns]:
    """Run the loop on each CPU that this thread may run on, for so long each."""
    allowed = os.sched_getaffinity(0)
    try:
        return {cpu: _time_cpu(cpu, seconds) for cpu in sorted(allowed)}
    finally:
        os.sched_setaffinity(0, allowed)


def _time_cpu(cpu: int, seconds: float) -> Turns:
    os.sched_setaffinity(0, {cpu})
    _run_loop(WARMING_SECONDS)
    return _run_loop(seconds)


def _run_loop(seconds: float) -> Turns:
    values = np.arange(VALUES, dtype=np.uint32)
    turns, shortest = 0, float("inf")
    first = start = time.perf_counter()
    while start - first < seconds:
        for _ in range(REPETITIONS):
            np.multiply(values, values, out=values)
        end = time.perf_counter()
        turns, shortest, start = turns + 1, min(shortest, end - start), end
    return Turns(shortest, (start - first) / turns)


def judge(before: Mapping[int, Turns], after: Mapping[int, Turns]) -> Busyness:
    """Say what CPUs lost by turns of both times; a CPU is measured by its own shortest one, for not all are alike."""
    cpus = []
    for cpu in sorted(before.keys() & after.keys()):
        undisturbed = min(before[cpu].shortest, after[cpu].shortest)
        cpus.append(CpuLoss(cpu, 1 - undisturbed / before[cpu].mean, 1 - undisturbed / after[cpu].mean))
    return Busyness(cpus, all(max(loss.before, loss.after) <= MOST_LOST for loss in cpus))
