"""Figure 2: time a row, of the NumPy references (the paper's are plain Python too) and of the kernels."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
from rich.progress import track

import embpack
from embpack import reference
from embpack.layouts import RowFormat
from embpack.methods import UniformMethod
from experiments.guan2019.figure1 import DIMS
from experiments.guan2019.report import Entry, Result
from experiments.guan2019.series import OUR_GREEDY, SERIES, Series

# log10 of milliseconds a row at d = 8 and at d = 16384, read off the plot.
PAPER: dict[str, tuple[float, float]] = {
    "HIST-BRUTE": (4.8, 4.8),
    "GREEDY (opt)": (1.6, 2.4),
    "HIST-APPRX": (0.6, 1.7),
    "GREEDY": (0.45, 1.1),
    "GSS": (0.0, 0.6),
    "ACIQ": (-0.8, -0.4),
    "ASYM": (-1.2, -0.6),
}

NUMPY, KERNEL = "NumPy", "kernel"
# A kernel takes rows in blocks; calls grow until waking it up does not count.
FIRST_ROWS, MOST_VALUES, KERNEL_SECONDS = 16, 1 << 20, 0.02


@dataclass(frozen=True)
class Sizes:
    """How much to measure.

    Attributes:
        dims: embedding_dim of each point.
        point_seconds: a reference is called again until a point took that long.
        series_seconds: wider rows are left out once a series took that long.
    """

    dims: Sequence[int] = DIMS
    point_seconds: float = 0.3
    series_seconds: float = 60.0


def run(sizes: Sizes) -> Result:
    """Time every series at every width, on one thread."""
    chosen = [SERIES[name] for name in (*PAPER, OUR_GREEDY)]
    entries: list[Entry] = []
    with _one_thread():
        for series in track(chosen, "Figure 2", transient=True):
            entries += _time_references(series, sizes)
            entries += [_make_entry(series, KERNEL, d, _time_kernel(series, d)) for d in sizes.dims]
    title = "Figure 2: log10 of milliseconds a row, by embedding_dim, one thread"
    settings = {"point_seconds": sizes.point_seconds, "series_seconds": sizes.series_seconds}
    notes = [
        "The paper's times are of its Python on an old Xeon, at the two ends of its plot; ours are the fastest call.",
        *(
            f"{entry.series} at d = {entry.column} is left out: its series took {sizes.series_seconds:g} s"
            for entry in entries
            if entry.ours is None
        ),
    ]
    return Result("fig2", title, settings, entries, notes, digits=2)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = embpack.get_num_threads()
    embpack.set_num_threads(1)
    try:
        yield
    finally:
        embpack.set_num_threads(before)


def _make_entry(series: Series, kind: str, d: int, seconds: float | None) -> Entry:
    ends = PAPER.get(series.name)
    paper = None
    if kind == NUMPY and ends and d in (DIMS[0], DIMS[-1]):
        paper = ends[d == DIMS[-1]]
    ours = None if seconds is None else math.log10(seconds * 1e3)
    return Entry(f"{series.name}, {kind}", d, paper, ours, details={"milliseconds": seconds and seconds * 1e3})


def _time_references(series: Series, sizes: Sizes) -> Iterator[Entry]:
    method, spent = _parse_uniform(series.method), 0.0
    for d in sizes.dims:
        if spent > sizes.series_seconds:
            yield _make_entry(series, NUMPY, d, None)
            continue
        row = _make_rows(1, d)
        row_format = RowFormat(d, series.bits, series.param_dtype)
        start = time.perf_counter()
        fastest = _time(partial(reference.quantize, row, method, row_format), sizes.point_seconds)
        spent += time.perf_counter() - start
        yield _make_entry(series, NUMPY, d, fastest)


def _parse_uniform(spec: str) -> UniformMethod:
    """Parse a method that chooses clipping ranges: all that the paper times."""
    method = embpack.parse_method(spec)
    if not isinstance(method, UniformMethod):
        raise TypeError(f"method {spec!r} chooses codebooks; figure 2 times searches for clipping ranges")
    return method


def _time_kernel(series: Series, d: int) -> float:
    """Seconds a row, of calls with enough rows."""
    rows = FIRST_ROWS
    while True:
        table = _make_rows(rows, d)
        call = partial(series.quantize, table)
        seconds = _time(call, 0.0)
        if seconds >= KERNEL_SECONDS or 2 * rows * d > MOST_VALUES:
            return min(seconds, _time(call, 4 * seconds)) / rows
        rows *= 2


def _make_rows(count: int, d: int) -> np.ndarray:
    return np.random.default_rng(d).standard_normal((count, d), dtype=np.float32)


def _time(call: Callable[[], object], budget: float) -> float:
    """Seconds of the fastest call; called once, then until the budget is used up."""
    fastest, spent = math.inf, 0.0
    while not spent or spent < budget:
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        fastest, spent = min(fastest, seconds), spent + seconds
    return fastest
