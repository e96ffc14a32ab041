"""What becomes of all tables: made by embpack.plan, used by quantize_file, kept in a file (docs/plans.md)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from embpack.errors import FormatError
from embpack.formats.atomic import check_new, new_file
from embpack.formats.base import find_repeated
from embpack.formats.safetensors import parse_object
from embpack.layouts import LAYOUTS
from embpack.planning.planned import PlannedTable, is_measure
from embpack.shard_writer import TableReport
from embpack.tables import find_terminal_width, fit_table
from embpack.text import quote
from embpack.variant import Variant

_FORMAT, FORMAT_VERSION = "embpack plan", 1
# Plans of half a million tables are smaller.
_MOST_FILE_BYTES = 1 << 28
_KEYS = {"format", "version", "loss", "file_bytes", "tables"}


@dataclass(frozen=True)
class Plan:
    """What becomes of all tables; print shows it as a table.

    Attributes:
        tables: in the model's order.
        loss: normalized l2 loss over all tables; each row counts as often as it is looked up, where that is known.
        file_bytes: of the packed file, or of all files of a checkpoint in shards; some bytes more than it takes.
    """

    tables: tuple[PlannedTable, ...]
    loss: float
    file_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all packed tables."""
        return sum(table.num_bytes for table in self.tables)

    @property
    def float32_bytes(self) -> int:
        """Bytes of all tables in float32."""
        return sum(4 * table.num_embeddings * table.embedding_dim for table in self.tables)

    @property
    def variants(self) -> dict[str, Variant]:
        """How each table is packed, by name: what quantize_file takes."""
        return {table.name: table.variant for table in self.tables}

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan to a file, all or nothing; a plan that is there is replaced, any other file is not.

        Raises:
            ValueError: the path does not end in .json.
            OSError: what is there is no plan, or the place cannot be written.
        """
        check_plan_path(Path(path))
        value = {
            "format": _FORMAT,
            "version": FORMAT_VERSION,
            "loss": self.loss,
            "file_bytes": self.file_bytes,
            "tables": [table.as_json() for table in self.tables],
        }
        with new_file(path) as file:
            file.write(json.dumps(value, indent=2, allow_nan=False).encode() + b"\n")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Plan":
        """Read a plan that save wrote.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: it cannot be read.
            FormatError: it is damaged, no plan, or of a future version.
        """
        path = Path(path)
        value = _read_value(path)
        if value.get("format") != _FORMAT:
            raise FormatError(
                f"{path}: is no plan; make one: embpack quantize SRC --auto --save-plan {quote(str(path))}"
            )
        if value.get("version") != FORMAT_VERSION:
            raise FormatError(
                f"{path}: plan version {value.get('version')!r:.20}, but this embpack reads version {FORMAT_VERSION}; "
                "update embpack, or make the plan anew"
            )
        if value.keys() != _KEYS or not isinstance(value["tables"], list) or not value["tables"]:
            raise FormatError(f"{path}: the plan is damaged (it has {sorted(value)!r:.200}); make it anew")
        for key in ("loss", "file_bytes"):
            if not is_measure(value[key]):
                raise FormatError(f"{path}: the plan is damaged ({key} is {value[key]!r:.80}); make it anew")
        tables = tuple(PlannedTable.from_json(f"{path}: tables[{i}]", raw) for i, raw in enumerate(value["tables"]))
        repeated = find_repeated(table.name for table in tables)
        if repeated is not None:
            raise FormatError(f"{path}: has table {repeated!r} twice; make the plan anew")
        return cls(tables, float(value["loss"]), int(value["file_bytes"]))

    def find_changes(self, reports: Sequence[TableReport]) -> dict[str, str]:
        """Find the tables for which the plan should be made anew.

        A table has changed if it has 1.25 times as many rows as planned or more, or as few, or if its loss, or the root
        mean square of its values, has moved so far; or if the plan does not have it.

        Args:
            reports: what packing came to: quantize_file(...).tables.

        Returns:
            By a table's name, what has changed, in words.
        """
        planned, changes = {table.name: table for table in self.tables}, {}
        for report in reports:
            table = planned.get(report.name)
            found = ["not in the plan"] if table is None else table.find_changes(report)
            if found:
                changes[report.name] = ", ".join(found)
        return changes

    def measured(self, reports: Sequence[TableReport]) -> "Plan":
        """Return the plan with what packing came to in place of what was measured on samples."""
        found = {report.name: report for report in reports}
        return replace(
            self,
            tables=tuple(table.measured(found[table.name]) if table.name in found else table for table in self.tables),
        )

    def __str__(self) -> str:
        return self.describe(find_terminal_width())

    def describe(self, width: int | None = None) -> str:
        """Write the plan as a table of one line a table, which is cut to the width of a terminal; None cuts nothing."""
        rows = [
            (
                table.name,
                f"{table.num_embeddings:,}",
                str(table.embedding_dim),
                table.variant.name,
                str(table.variant.bits),
                f"{table.num_bytes:,}",
                f"{table.loss:.5f}",
                _write_share(table.error_share),
                table.reason,
            )
            for table in self.tables
        ]
        columns = ("table", "rows", "dim", "method", "bits", "bytes", "l2 loss", "error", "why")
        drop = ("dim", "rows", "error", "why")
        fitted = fit_table(columns, rows, width, left=("table", "method", "why"), drop=drop, has_names=True)
        lines = fitted.write("tables")
        share = self.num_bytes / self.float32_bytes
        lines.append(
            f"{self.num_bytes:,} bytes, {100 * share:.2f} % of float32, in a file of at most {self.file_bytes:,}; "
            f"l2 loss {self.loss:.5f}"
        )
        layouts = dict.fromkeys(table.variant.parsed_method.layout for table in self.tables)
        lines += [f"{name}: {LAYOUTS[name].caution}" for name in layouts if LAYOUTS[name].caution]
        return "\n".join(lines)


def check_plan_path(path: Path) -> None:
    """Refuse to write a plan over anything else, or where nothing can be written.

    Raises:
        ValueError: the path does not end in .json.
        FileExistsError: what is there is no plan.
        OSError: the folder is missing or cannot be written.
    """
    if path.suffix.lower() != ".json":
        raise ValueError(f"{path}: a plan ends in .json")
    if path.is_file():
        try:
            is_plan = _read_value(path).get("format") == _FORMAT
        except FormatError:
            is_plan = False
        if not is_plan:
            raise FileExistsError(f"{path}: exists and is no plan, so it is not replaced; choose another name")
    check_new(path)


def _read_value(path: Path) -> dict[str, Any]:
    """Read a file that must be a JSON object."""
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_FILE_BYTES + 1)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; make a plan: embpack quantize SRC --auto --save-plan") from None
    except OSError as error:
        raise type(error)(f"{path}: cannot be read: {error.strerror}") from None
    if len(text) > _MOST_FILE_BYTES:
        raise FormatError(f"{path}: has more than {_MOST_FILE_BYTES:,} bytes, which no plan has")
    return parse_object(path, text)


def _write_share(share: float) -> str:
    """A share of all error: "12.00 %", "0.31 %"."""
    return f"{share:.2%}".replace("%", " %") if share >= 1e-4 or not share else "<0.01 %"
