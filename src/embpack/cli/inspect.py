"""embpack inspect."""

from pathlib import Path
from typing import Annotated

import typer

from embpack.cli import show
from embpack.cli.json_output import describe_packed
from embpack.files import PackedFile, open_packed
from embpack.rows import ROW_DTYPES


def inspect(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="What embpack quantize wrote: a file, or a folder of shards."),
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything through and compare all checksums.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what is in a packed file: tables, layout, bytes and loss.

    [dim]embpack inspect model-4bit.safetensors --verify[/]
    """
    with open_packed(file) as files:
        if verify:
            for packed in files:
                packed.verify_all()
    if as_json:
        checked, unchecked = _count_checked(files, verified=verify)
        show.print_json(describe_packed(file, files, checked, unchecked, verified=verify))
    else:
        _print(str(file), files, verified=verify)


def _others(files: list[PackedFile]) -> list[str]:
    return [name for packed in files for name in packed.others]


def _print(path: str, files: list[PackedFile], *, verified: bool) -> None:
    columns = ["table", "layout", "bits", "params", "method", "rows", "dim", "bytes", "ratio", "of", "l2 loss"]
    drop = ("params", "dim", "of", "rows", "method")
    table = show.start_table(path, columns, text_columns=2, things="tables", left=("params", "method"), drop=drop)
    for packed in files:
        for name, entry in packed.entries.items():
            nbytes = sum(tensor.nbytes for tensor in packed.parts[name])
            original = entry.num_embeddings * entry.embedding_dim * ROW_DTYPES[entry.dtype].itemsize
            table.add_row(
                name,
                f"{entry.layout}, {entry.rotation}" if entry.rotation else entry.layout,
                str(entry.bits),
                entry.param_dtype,
                entry.method or "unknown",
                f"{entry.num_embeddings:,}",
                str(entry.embedding_dim),
                show.size(nbytes),
                show.share(nbytes, original),
                entry.dtype,
                show.loss_text(entry.loss),
            )
    show.output.print(table)
    others = _others(files)
    if others:
        show.output.print(f"{show.count(len(others), 'other tensor')}, not packed", style="dim")
    if verified:
        show.output.print(_say_checked(files), style="green")


def _count_checked(files: list[PackedFile], *, verified: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Count what was compared with its checksum, headers at each opening, and what was not."""
    newer = [packed for packed in files if packed.contents.others is not None]
    tables, others = sum(len(packed.entries) for packed in files), len(_others(files))
    checked = {
        "tables": tables if verified else 0,
        "other_tensors": len(_others(newer)) if verified else 0,
        "headers": len(newer),
    }
    everything = {"tables": tables, "other_tensors": others, "headers": len(files)}
    return checked, {what: number - checked[what] for what, number in everything.items()}


def _say_checked(files: list[PackedFile]) -> str:
    """Say what was verified, and what a file of version 1 has no checksums of."""
    checked, unchecked = _count_checked(files, verified=True)
    said = f"checksums of {_list_counted(checked, len(files))} agree"
    without = _list_counted(unchecked, len(files))
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
