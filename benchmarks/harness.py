"""Races: contestants answer first, and only those that agree are timed, in turns.

A shared machine slows down for seconds at a time, but then all contestants of a round are slowed down alike.
So what counts is the ratio within a round; a report gives its median over the rounds and its quartiles.
"""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, TypeVar

import embpack
from embpack import _native

Answer = TypeVar("Answer")

PACKAGES = ("embpack", "numpy", "torch", "fbgemm-gpu-cpu")


class AnswersDifferError(ValueError):
    """Contestants that do not answer alike cannot race."""


@dataclass(frozen=True)
class Contestant(Generic[Answer]):
    """One side of a race.

    Attributes:
        name: unique in its workload.
        call: what is timed; its output is allocated inside.
        rows: rows that a call packs or looks up.
        make_ready: called before each sample, untimed: the number of threads.
        isa: the instruction set that its kernels are for, as reports call it; "" where they do not say.
        goal: what our rate by its rate should be; None for none. It is reported beside the ratio, never enforced.
    """

    name: str
    call: Callable[[], Answer]
    rows: int
    make_ready: Callable[[], None]
    isa: str = ""
    goal: float | None = None


@dataclass(frozen=True)
class Workload(Generic[Answer]):
    """One race.

    Attributes:
        settings: what a report says of it: method or case, embedding_dim, table_bytes, threads.
        ours: the contestant that ratios are of.
        others: the contestants that ours is divided by.
        disagreement: of our answer and another: what is wrong, None if nothing is.
        loss: normalized l2 loss of an answer; None where all answers are the same.
    """

    settings: dict[str, Any]
    ours: Contestant[Answer]
    others: Sequence[Contestant[Answer]]
    disagreement: Callable[[Answer, Answer], str | None]
    loss: Callable[[Answer], float] | None = None


@dataclass(frozen=True)
class Timing:
    """How long to measure.

    Attributes:
        rounds: samples a contestant.
        sample_seconds: a call is repeated for at least that long.
    """

    rounds: int
    sample_seconds: float


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over the rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Standing:
    """What a race found of one contestant.

    Attributes:
        isa: the instruction set of its kernels.
        rows_per_second: in its fastest round, the least disturbed one.
        loss: of its answer; None where the workload measures none.
        ratio: our rate by its rate; None for ours.
        goal: of the median ratio; None for none.
    """

    name: str
    rows: int
    isa: str
    rows_per_second: float
    loss: float | None
    ratio: Spread | None
    goal: float | None


def measure_spread(values: Sequence[float]) -> Spread:
    """Return the median and the quartiles; for fewer than four values, the extremes."""
    if len(values) < 4:
        return Spread(statistics.median(values), min(values), max(values))
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def race(workload: Workload[Answer], timing: Timing) -> list[Standing]:
    """Compare answers, then time the contestants round by round.

    Args:
        workload: one or more contestants beside ours.
        timing: how long.

    Returns:
        What was found of each contestant, ours first.

    Raises:
        AnswersDifferError: an answer is not ours.
    """
    losses = _compare_answers(workload)
    contestants = [workload.ours, *workload.others]
    rates: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for turn in range(timing.rounds):
        first = turn % len(contestants)  # Nobody always runs after the same one.
        for contestant in contestants[first:] + contestants[:first]:
            rates[contestant.name].append(_sample_rate(contestant, timing.sample_seconds))
    return [_judge(contestant, rates, workload.ours.name, losses) for contestant in contestants]


def _compare_answers(workload: Workload[Answer]) -> dict[str, float | None]:
    """Return the loss of each answer."""

    def measure(answer: Answer) -> float | None:
        return workload.loss(answer) if workload.loss else None

    ours = _answer(workload.ours)
    losses = {workload.ours.name: measure(ours)}
    for other in workload.others:
        answer = _answer(other)
        wrong = workload.disagreement(ours, answer)
        if wrong:
            names = f"{workload.ours.name} and {other.name}"
            raise AnswersDifferError(f"{workload.settings}: {names} differ: {wrong}")
        losses[other.name] = measure(answer)
    return losses


def _answer(contestant: Contestant[Answer]) -> Answer:
    contestant.make_ready()
    return contestant.call()


def _sample_rate(contestant: Contestant[Any], sample_seconds: float) -> float:
    """Rows a second over repeated calls."""
    contestant.make_ready()
    calls, elapsed, start = 0, 0.0, time.perf_counter()
    while elapsed < sample_seconds:
        contestant.call()
        calls += 1
        elapsed = time.perf_counter() - start
    return calls * contestant.rows / elapsed


def _judge(
    contestant: Contestant[Any], rates: dict[str, list[float]], ours: str, losses: dict[str, float | None]
) -> Standing:
    name, own = contestant.name, rates[contestant.name]
    ratio = None
    if name != ours:
        ratio = measure_spread([our_rate / rate for our_rate, rate in zip(rates[ours], own, strict=True)])
    return Standing(name, contestant.rows, contestant.isa, max(own), losses[name], ratio, contestant.goal)


def describe_machine(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Return what figures depend on: CPU, instruction sets (ours, and the best of the CPU's), threads, versions."""
    return {
        "cpu": _cpu_model(),
        "isa": _native.isa(),
        "best_isa": _native.available_isas()[0],
        "threads_available": embpack.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
