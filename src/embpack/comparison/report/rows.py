"""All results as rows of a CSV file."""

import csv
import io
from typing import Any

from embpack.comparison.array import QUANTILES, Comparison
from embpack.comparison.checkpoint import FileComparison, TableComparison
from embpack.text import printable

COLUMNS = (
    *("table", "num_embeddings", "embedding_dim", "dtype", "rows_measured"),
    *("method", "bits", "param_dtype", "rotate", "layout"),
    *("loss", "bytes_per_row", "share_of_float32", "is_smaller", "is_best", "is_recommended"),
    *("metric", "metric_of_floats"),
    *("rows_per_second", "lookups_per_second", "readers", "worst_row", "worst_row_loss"),
    *(f"row_loss_{100 * share:g}" for share in QUANTILES),
)


def make_csv(comparison: FileComparison) -> str:
    """Write a row for each result of each table; docs/compare.md says what the columns are.

    The metric, of all tables packed in that way, stands in the rows of each.

    Returns:
        The whole file's text: comma-separated, with a line of column names first.
    """
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for table in comparison.tables:
        front = comparison.find_front(table.results)
        writer.writerows(_list_values(result, table, front, comparison) for result in table.results)
    return file.getvalue()


def _list_values(
    result: Comparison, table: TableComparison, front: list[Comparison], comparison: FileComparison
) -> dict[str, Any]:
    recommended, metrics = comparison.recommended, comparison.metrics
    own = {name: getattr(result, name) for name in COLUMNS if hasattr(result, name)}
    of_table = {name: getattr(table, name) for name in COLUMNS[1:5]}
    row_losses = dict(zip(COLUMNS[-len(QUANTILES) :], result.row_losses, strict=True))
    return {
        **own,
        **of_table,
        **row_losses,
        "table": printable(table.name),
        "readers": " ".join(result.readers),
        "metric": metrics and metrics.of_variants.get(result.variant),
        "metric_of_floats": metrics and metrics.of_floats,
        "is_best": result in front,
        "is_recommended": recommended is not None and result.variant == recommended.variant,
    }
