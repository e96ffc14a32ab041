"""ModelReport: what packing a model came to."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, float64, linalg

from embpack.shard_writer import TableReport
from embpack.table import PackedTable
from embpack.tables import find_terminal_width, fit_table
from embpack.text import printable

COLUMNS = ("module", "rows", "dim", "before", "after", "ratio", "l2 loss")


@dataclass(frozen=True)
class ModelReport:
    """What packing a model came to; print shows it as a table.

    Attributes:
        tables: one for each module that was packed, in the model's order, output layers last. One that shares its rows
            with one before has 0 bytes.
        left_alone: name and reason of each embedding that was not.
        became: name of each module that was replaced, and what it is now; a TorchRec collection counts as one, with
            its tables and what those that stay float cost.
        untied: names of the weights that stay float beside the rows of an embedding that had them, too.
        bytes_before: of the whole model, parameters and buffers, each memory counted once.
        bytes_after: the same when it was packed.
    """

    tables: tuple[TableReport, ...]
    left_alone: tuple[tuple[str, str], ...]
    became: tuple[tuple[str, str], ...] = ()
    untied: tuple[str, ...] = ()
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        rows = list(map(_describe, self.tables))
        drop = ("dim", "before", "rows")
        width = find_terminal_width()
        lines = fit_table(COLUMNS, rows, width, left=COLUMNS[:1], drop=drop, has_names=True).write("modules")
        before, after = (sum(getattr(table, name) for table in self.tables) for name in ("bytes_before", "bytes_after"))
        lines += _count_alike(self.became)
        lines.append(f"tables: {_compare(before, after)}")
        larger = ", larger than before" if self.bytes_after > self.bytes_before else ""
        lines.append(f"whole model: {_compare(self.bytes_before, self.bytes_after)}{larger}")
        lines += [
            f"untied: {printable(name)} stays float beside the packed rows; tied='share' has output layers use those"
            for name in self.untied
        ]
        lines += [f"{printable(table.name)}: {printable(table.warning)}" for table in self.tables if table.warning]
        lines += [f"left alone: {printable(name)}, {printable(reason)}" for name, reason in self.left_alone]
        return "\n".join(lines)


def describe_table(name: str, weight: Tensor, table: PackedTable, seconds: float, warning: str | None) -> TableReport:
    """Say what packing a module's weight came to."""
    return TableReport(
        name=name,
        num_embeddings=table.num_embeddings,
        embedding_dim=table.embedding_dim,
        dtype=table.dtype,
        method=table.method,
        bytes_before=weight.numel() * weight.element_size(),
        bytes_after=table.nbytes,
        loss=table.loss or 0.0,
        square_norm=float(linalg.vector_norm(weight.detach(), dtype=float64)) ** 2,
        seconds=seconds,
        warning=warning,
    )


def _compare(before: int, after: int) -> str:
    return f"{before:,} -> {after:,} bytes" + (f" ({after / before:.2%})" if before else "")


def _count_alike(became: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each kind of module: its name, or how many there are."""
    names_of: dict[str, list[str]] = {}
    for name, kind in became:
        names_of.setdefault(kind, []).append(name)
    return [
        f"{printable(names[0]) if len(names) == 1 else f'{len(names)} modules'}: {kind}"
        for kind, names in names_of.items()
    ]


def _describe(table: TableReport) -> tuple[str, ...]:
    before, after = table.bytes_before, table.bytes_after
    shares = before == 0 and table.num_embeddings > 0
    ratio = f"{after / before:.2%}" if before else "shared" if shares else "-"
    shape = (f"{table.num_embeddings:,}", str(table.embedding_dim))
    return (table.name, *shape, f"{before:,}", f"{after:,}", ratio, f"{table.loss:.5f}")
