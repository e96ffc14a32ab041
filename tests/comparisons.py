"""Comparisons: of a file, with figures as one likes them, of many tables; and a browser to look at their pages."""

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import embpack
from embpack.comparison.array import QUANTILES, Comparison
from embpack.comparison.checkpoint import FileComparison, TableComparison, compare_sample, read_sample
from embpack.comparison.variants import make_variants
from embpack.formats import open_checkpoint
from embpack.readers import READERS
from embpack.rules import Rules, decide_all
from embpack.samples import make_table

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = (390, 1280)
SCHEMES = ("light", "dark")


def make_result(bytes_per_row=36.0, loss=0.1, table="emb", **values):
    """A result with round figures."""
    whole = {
        "table": table,
        "method": "greedy",
        "bits": 4,
        "param_dtype": "float16",
        "rotate": None,
        "layout": "uniform",
        "loss": loss,
        "bytes_per_row": bytes_per_row,
        "share_of_float32": bytes_per_row / 256,
        "is_smaller": bytes_per_row < 256,
        "worst_row": 3,
        "worst_row_loss": 2 * loss,
        "row_losses": tuple(loss * (0.5 + 1.5 * share) for share in QUANTILES),
        "rows_per_second": 1e6,
        "lookups_per_second": 1e8,
        "readers": READERS,
    }
    return Comparison(**{**whole, **values})


def make_file(*results, name="model.safetensors", **values):
    table = make_table_comparison(results)
    return FileComparison(Path(name), (table,), **{"include": (), "exclude": (), "threads": 2, **values})


def make_table_comparison(results, name="emb", rows=100):
    return TableComparison(name, rows, 64, "float32", rows, 1.0, tuple(results), (), 4 * 64 * rows)


def compare_file(src: Path, variants=None, most_rows=None, include=(), exclude=()) -> FileComparison:
    rules = Rules(tuple(include), tuple(exclude))
    with open_checkpoint(src) as checkpoint:
        decisions = [decision for decision in decide_all(checkpoint, rules) if decision.row_format]
        tables = tuple(
            compare_sample(read_sample(decision, most_rows), variants or make_variants()) for decision in decisions
        )
    return FileComparison(src, tables, tuple(include), tuple(exclude), 2)


@cache
def measure() -> list[Comparison]:
    return embpack.compare(make_table(np.random.default_rng(0), 500, 64))


def make_comparison(num_tables: int, num_results: int | None = None, **values: Any) -> FileComparison:
    """Disturb what was measured on one table, so that all figures of all tables differ, as those of real ones do.

    With a number of results only the last of those that compare measures by default.
    """
    rng = np.random.default_rng(num_tables)
    tables = []
    for i in range(num_tables):
        name = f"model.embedding_bags.user_history_feature_{i:03d}_last_30_days.weight"
        rows = int(10 ** rng.uniform(2, 7))
        results = tuple(_disturb(result, name, rows, rng) for result in measure()[-(num_results or 0) :])
        tables.append(
            TableComparison(
                name, rows, 64, "float32", min(rows, 20_000), rng.uniform(1, 1e4), results, (), 4 * 64 * rows
            )
        )
    return FileComparison(Path("model.safetensors"), tuple(tables), (), (), 2, **values)


def _disturb(result: Comparison, name: str, rows: int, rng: np.random.Generator) -> Comparison:
    losses = np.sort(np.array(result.row_losses) * rng.uniform(0.9, 1.1, len(result.row_losses)))
    return dataclasses.replace(
        result,
        table=name,
        loss=result.loss * rng.uniform(0.9, 1.1),
        worst_row=int(rng.integers(rows)),
        worst_row_loss=float(losses[-1]),
        row_losses=tuple(map(float, losses)),
        rows_per_second=result.rows_per_second * rng.uniform(0.8, 1.2),
        lookups_per_second=result.lookups_per_second * rng.uniform(0.8, 1.2),
    )


def find_browser() -> str | None:
    return next((found for found in map(shutil.which, BROWSERS) if found), None)


@contextmanager
def open_browser() -> Iterator[Any]:
    """Open Chromium without a window, by playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # A container's root has no rights to make a sandbox, and these pages are our own.
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()
