"""embpack inspect."""

from pathlib import Path
from typing import Annotated, Any

import typer

from embpack.cli import show
from embpack.files import PackedFile, open_packed
from embpack.rows import ROW_DTYPES


def inspect(
    file: Annotated[
        Path,
        typer.Argument(help="What embpack quantize wrote: a file, or a folder of shards.", show_default=False),
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every table through and compare its checksum.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what is in a packed file: tables, layout, bytes and loss.

    [dim]embpack inspect model-4bit.safetensors --verify[/]
    """
    files = open_packed(file)
    if verify:
        for packed in files:
            for name in packed.entries:
                packed.verify(name)
    if as_json:
        show.print_json({"verified": verify, **_as_json(files)})
    else:
        _print(str(file), files, verified=verify)


def _as_json(files: list[PackedFile]) -> dict[str, Any]:
    tables = {
        name: {**entry.as_json(), "row_bytes": entry.row_format.row_bytes, "file": packed.path.name}
        for packed in files
        for name, entry in packed.entries.items()
    }
    return {"tables": tables, "other_tensors": _others(files)}


def _others(files: list[PackedFile]) -> list[str]:
    return [name for packed in files for name in packed.others]


def _print(path: str, files: list[PackedFile], *, verified: bool) -> None:
    columns = ["table", "layout", "method", "rows", "dim", "bytes", "ratio", "l2 loss"]
    table = show.start_table(path, columns, text_columns=3)
    for packed in files:
        for name, entry in packed.entries.items():
            nbytes = packed.table(name).nbytes
            original = entry.num_embeddings * entry.embedding_dim * ROW_DTYPES[entry.dtype].itemsize
            table.add_row(
                name,
                f"{entry.layout}, {entry.bits} bits, {entry.param_dtype}"
                + (f", {entry.rotation}" if entry.rotation else ""),
                entry.method or "unknown",
                f"{entry.num_embeddings:,}",
                str(entry.embedding_dim),
                show.size(nbytes),
                f"{show.share(nbytes, original)} of {entry.dtype}",
                show.loss_text(entry.loss),
            )
    show.output.print(table)
    others = _others(files)
    if others:
        show.output.print(f"{len(others)} other tensors, as they were", style="dim")
    if verified:
        show.output.print("every checksum agrees", style="green")
