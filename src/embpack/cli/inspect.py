"""embpack inspect."""

from pathlib import Path
from typing import Annotated

import typer

from embpack.cli import options, show
from embpack.cli.json_output import describe_packed
from embpack.packed_files import PackedCheckpoint, open_packed
from embpack.rows import ROW_DTYPES


def inspect(
    file: Annotated[
        Path,
        options.of_place("FILE", "What embpack quantize wrote: a file, or a folder of shards, or its URI."),
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything through and compare all checksums.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what is in a packed file: tables, layout, bytes and loss.

    [dim]embpack inspect model-4bit.safetensors --verify[/]
    """
    with open_packed(file) as packed:
        if verify:
            packed.verify()
    if as_json:
        checked, unchecked = _count_checked(packed, verified=verify)
        show.print_json(describe_packed(file, packed, checked, unchecked, verified=verify))
    else:
        _print(str(file), packed, verified=verify)


def _print(path: str, packed: PackedCheckpoint, *, verified: bool) -> None:
    columns = ["table", "layout", "bits", "params", "method", "rows", "dim", "bytes", "ratio", "of", "l2 loss"]
    drop = ("params", "dim", "of", "rows", "method")
    shown = show.start_table(path, columns, text_columns=2, things="tables", left=("params", "method"), drop=drop)
    for name, table in packed.tables.items():
        entry = table.entry
        original = entry.num_embeddings * entry.embedding_dim * ROW_DTYPES[entry.dtype].itemsize
        shown.add_row(
            name,
            f"{entry.layout}, {entry.rotation}" if entry.rotation else entry.layout,
            str(entry.bits),
            entry.param_dtype,
            entry.method or "unknown",
            f"{entry.num_embeddings:,}",
            str(entry.embedding_dim),
            show.size(table.nbytes),
            show.share(table.nbytes, original),
            entry.dtype,
            show.loss_text(entry.loss),
        )
    show.output.print(shown)
    for name, table in packed.tables.items():
        if len(table.pieces) > 1:
            show.output.print(f"{name}: in {len(table.pieces):,} pieces", style="dim")
    keeping = sum(table.keeps_checksums for table in packed.tables.values())
    if keeping:
        show.output.print(
            f"{show.count(keeping, 'table')} with checksums of the source's rows, for --since", style="dim"
        )
    if packed.others:
        show.output.print(f"{show.count(len(packed.others), 'other tensor')}, not packed", style="dim")
    if verified:
        show.output.print(_say_checked(packed), style="green")


def _count_checked(packed: PackedCheckpoint, *, verified: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Count what was compared with its checksum, headers at each opening, and what was not."""
    newer = [file for file in packed.files if file.contents.others is not None]
    checked = {
        "tables": len(packed.tables) if verified else 0,
        "other_tensors": sum(len(file.others) for file in newer) if verified else 0,
        "headers": len(newer),
    }
    everything = {"tables": len(packed.tables), "other_tensors": len(packed.others), "headers": len(packed.files)}
    return checked, {what: number - checked[what] for what, number in everything.items()}


def _say_checked(packed: PackedCheckpoint) -> str:
    """Say what was verified, and what a file of version 1 has no checksums of."""
    checked, unchecked = _count_checked(packed, verified=True)
    said = f"checksums of {_list_counted(checked, len(packed.files))} agree"
    without = _list_counted(unchecked, len(packed.files))
    return f"{said}; version 1 has none for {without}" if without else said


def _list_counted(counts: dict[str, int], num_files: int) -> str:
    """Name what there is some of, "3 tables, 41 other tensors and the header"."""
    headers = "the header" if num_files == 1 else show.count(counts["headers"], "header")
    parts = [
        show.count(counts["tables"], "table") if counts["tables"] else "",
        show.count(counts["other_tensors"], "other tensor") if counts["other_tensors"] else "",
        headers if counts["headers"] else "",
    ]
    *first, last = [part for part in parts if part] or [""]
    return f"{', '.join(first)} and {last}" if first else last
