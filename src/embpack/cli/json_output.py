"""What --json prints: schema.json says what each value is, docs/json.md says it to people."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embpack import _native
from embpack.comparison.array import QUANTILES, Comparison, Skipped
from embpack.comparison.checkpoint import FileComparison
from embpack.convert import Report
from embpack.estimate import Expectation
from embpack.file_updates import FileUpdateReport
from embpack.formats import Checkpoint, SourceTensor
from embpack.layouts import RowFormat
from embpack.methods import parse_method
from embpack.packed_files import PackedCheckpoint, StoredTable, TablePiece
from embpack.planning import Plan, PlannedTable
from embpack.readers import find_readers
from embpack.rows import ROW_DTYPES
from embpack.rules import Decision, list_left_out
from embpack.shard_writer import TableReport
from embpack.threads import get_num_threads
from embpack.unpacking import UnpackedTable

# Raised when a value changes its name or its meaning, or goes; new ones may come at any time.
SCHEMA = 1

Record = dict[str, Any]


def describe_quantized(
    src: Path,
    dst: Path | None,
    checkpoint: Checkpoint,
    decisions: Sequence[Decision],
    plan: Plan | None,
    outcome: Report | Expectation,
    reused: Mapping[str, int] | None = None,
) -> Record:
    """Describe what quantize did, or what it would do.

    Args:
        src: what was read.
        dst: what was written, or would be.
        checkpoint: src, open.
        decisions: on all its tensors.
        plan: what chose among the ways to pack the tables; None if nothing did.
        outcome: what packing came to, or of a dry run what it would come to.
        reused: of a dry run how many rows of tables would be copied from an earlier run, by name.
    """
    report = outcome if isinstance(outcome, Report) else None
    planned = {} if plan is None else {table.name: table for table in plan.tables}
    reports = {} if report is None else {table.name: table for table in report.tables}
    tables = [
        _describe_decision(
            each, planned.get(each.tensor.name), reports.get(each.tensor.name), (reused or {}).get(each.tensor.name)
        )
        for each in decisions
        if each.variant
    ]
    return {
        **_start("quantize", src),
        "destination": None if dst is None else str(dst),
        "dry_run": report is None,
        "tables": tables,
        "other_tensors": [
            {**_describe_tensor(d.tensor), "reason": d.reason} for d in decisions if not d.variant and not d.is_left_out
        ],
        "left_out": list(list_left_out(checkpoint, decisions)),
        "copied_files": list(checkpoint.companions),
        "totals": {
            **_sum(tables),
            "source_bytes": sum(shard.num_bytes for shard in checkpoint.shards),
            "destination_bytes": outcome.file_bytes_after if isinstance(outcome, Report) else outcome.file_bytes,
            "loss": None if report is None else report.loss,
            "sample_loss": None if plan is None else plan.loss,
            "seconds": None if report is None else report.seconds,
            "estimated_seconds": outcome.seconds if isinstance(outcome, Expectation) else None,
        },
    }


def _describe_decision(
    decision: Decision, planned: PlannedTable | None, report: TableReport | None, reused: int | None
) -> Record:
    assert decision.variant is not None and decision.row_format is not None  # it is packed
    return {
        "name": decision.tensor.name,
        "num_embeddings": decision.tensor.shape[0],
        "embedding_dim": decision.tensor.shape[1],
        "dtype": decision.dtype,
        "method": decision.variant.parsed_method.spec if report is None else report.method,
        **_describe_rows(decision.row_format),
        "weight_bytes": decision.bytes_before,
        "packed_bytes": decision.bytes_after,
        "loss": None if report is None else report.loss,
        "sample_loss": None if planned is None else planned.loss,
        "stored_as": decision.tensor.stored_as or decision.tensor.dtype,
        "num_pieces": decision.tensor.num_pieces,
        "reason": decision.reason,
        "plan_reason": None if planned is None else planned.reason,
        "plan_change": None if planned is None or report is None else ", ".join(planned.find_changes(report)) or None,
        "warning": None if report is None else report.warning,
        "reused_rows": reused if report is None else report.reused_rows,
        "packed_anew": None if report is None else report.packed_anew,
        "seconds": None if report is None else report.seconds,
        "rows_per_second": None if report is None else report.rows_per_second,
    }


def describe_unpacked(src: Path, dst: Path, packed: PackedCheckpoint, unpacked: Sequence[UnpackedTable]) -> Record:
    """Describe what dequantize made of a packed checkpoint."""
    written = {table.name: {"dtype": table.dtype, "weight_bytes": table.bytes_after} for table in unpacked}
    tables = [{**_describe_stored(table), **written[name]} for name, table in packed.tables.items()]
    return {
        **_start("dequantize", src),
        "destination": str(dst),
        "tables": tables,
        "other_tensors": list(map(_describe_tensor, packed.others.values())),
        "totals": _sum(tables),
    }


def describe_updated(src: Path, dst: Path | None, report: FileUpdateReport, *, dry_run: bool) -> Record:
    """Describe what update did, or what it would do."""
    return {
        **_start("update", src),
        "destination": str(src if dst is None else dst),
        "dry_run": dry_run,
        "files": list(report.files),
        "tables": [{**dataclasses.asdict(table), "duplicates": table.duplicates} for table in report.tables],
        "totals": {
            "num_tables": len(report.tables),
            "ids_seen": sum(table.ids_seen for table in report.tables),
            "rows_changed": sum(table.rows_changed for table in report.tables),
            "seconds": report.seconds,
        },
    }


def describe_packed(
    src: Path, packed: PackedCheckpoint, checked: Mapping[str, int], unchecked: Mapping[str, int], *, verified: bool
) -> Record:
    """Describe what inspect found in a packed checkpoint."""
    tables = []
    for table in packed.tables.values():
        first, *others = table.pieces
        own = (
            {"checksum": None, "file": None}
            if others
            else {"checksum": table.entry.checksum, "file": first.file.path.name}
        )
        tables.append(
            {
                **_describe_stored(table),
                "row_bytes": table.entry.row_format.row_bytes,
                "keeps_checksums": table.keeps_checksums,
                **own,
                "pieces": list(map(_describe_piece, table.pieces)) if others else [],
            }
        )
    return {
        **_start("inspect", src),
        "verified": verified,
        "checked": dict(checked),
        "unchecked": dict(unchecked),
        "tables": tables,
        "other_tensors": list(map(_describe_tensor, packed.others.values())),
        "totals": {**_sum(tables), "source_bytes": sum(file.path.stat().st_size for file in packed.files)},
    }


def _describe_stored(table: StoredTable) -> Record:
    entry = table.entry
    return {
        "name": table.name,
        "num_embeddings": entry.num_embeddings,
        "embedding_dim": entry.embedding_dim,
        "dtype": entry.dtype,
        "method": entry.method,
        **_describe_rows(entry.row_format),
        "weight_bytes": entry.num_embeddings * entry.embedding_dim * ROW_DTYPES[entry.dtype].itemsize,
        "packed_bytes": table.nbytes,
        "loss": entry.loss,
    }


def _describe_piece(piece: TablePiece) -> Record:
    return {
        "file": piece.file.path.name,
        "first_row": piece.first_row,
        "num_embeddings": piece.entry.num_embeddings,
        "checksum": piece.entry.checksum,
    }


def describe_comparison(report: FileComparison) -> Record:
    """Describe what compare measured."""
    recommended = report.recommendation
    return {
        **_start("compare", report.src),
        "threads": report.threads,
        "quantiles": list(QUANTILES),
        "tables": [
            {
                "name": table.name,
                "num_embeddings": table.num_embeddings,
                "embedding_dim": table.embedding_dim,
                "dtype": table.dtype,
                "rows_measured": table.rows_measured,
            }
            for table in report.tables
        ],
        "results": [_describe_result(result) for table in report.tables for result in table.results],
        "overall": list(map(_describe_result, report.overall)),
        "skipped": [_describe_skipped(item) for table in report.tables for item in table.skipped],
        "front": [_describe_choice(report, result) for result in report.front],
        "readers": list(report.readers),
        "prefer": report.prefer,
        "metric": report.metrics and report.metrics.name,
        "recommended": recommended and {**_describe_choice(report, recommended.result), "reason": recommended.reason},
    }


def _describe_result(result: Comparison) -> Record:
    return _rename(dataclasses.asdict(result))


def _describe_skipped(item: Skipped) -> Record:
    return {"table": item.table, **_describe_variant(item), "reason": item.reason}


def _describe_choice(report: FileComparison, result: Comparison) -> Record:
    return {**_describe_variant(result), "command": report.write_command(result)}


def _describe_variant(measured: Comparison | Skipped) -> Record:
    return _rename(dataclasses.asdict(measured.variant))


def describe_methods(
    rows: int, embedding_dim: int, results: Sequence[Comparison], parameters: Sequence[Record]
) -> Record:
    """Describe methods by what they came to on a sample.

    Args:
        rows: of the sample.
        embedding_dim: values of a row.
        results: one for each method, or for each number of bits of one method.
        parameters: of each result's method, by name.
    """
    measured = ("loss", "bytes_per_row", "rows_per_second", "lookups_per_second")
    return {
        "schema": SCHEMA,
        "command": "methods",
        "rows_measured": rows,
        "embedding_dim": embedding_dim,
        "threads": get_num_threads(),
        "isa": _native.isa(),
        "methods": [
            {
                "name": parse_method(result.method).name,
                "summary": parse_method(result.method).summary,
                "parameters": own,
                **_describe_rows(result.variant.make_row_format(embedding_dim)),
                **{key: getattr(result, key) for key in measured},
            }
            for result, own in zip(results, parameters, strict=True)
        ],
    }


def _rename(record: Record) -> Record:
    """Call a rotation what row formats call it, not what the option that asks for it is called."""
    return {"rotation" if key == "rotate" else key: value for key, value in record.items()}


def _start(command: str, src: Path) -> Record:
    return {"schema": SCHEMA, "command": command, "source": str(src)}


def _describe_rows(row_format: RowFormat) -> Record:
    return {
        "bits": row_format.bits,
        "param_dtype": row_format.param_dtype,
        "layout": row_format.layout,
        "rotation": row_format.rotation,
        "readers": list(find_readers(row_format)),
    }


def _describe_tensor(tensor: SourceTensor) -> Record:
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "safetensors_dtype": tensor.dtype,
        "bytes": tensor.nbytes,
    }


def _sum(tables: Sequence[Record]) -> Record:
    return {
        "num_tables": len(tables),
        "weight_bytes": sum(table["weight_bytes"] for table in tables),
        "packed_bytes": sum(table["packed_bytes"] for table in tables),
    }
