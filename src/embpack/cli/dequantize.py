"""embpack dequantize."""

from pathlib import Path
from typing import Annotated

import typer

from embpack.cli import options, show
from embpack.cli.json_output import describe_unpacked
from embpack.packed_files import open_packed
from embpack.unpacking import check_dtype, dequantize_file


def dequantize(
    src: Annotated[
        Path,
        options.of_place("SRC", "What embpack quantize wrote: a file or a folder, or its URI."),
    ],
    dst: Annotated[
        Path,
        options.of_place(
            "DST",
            "The plain checkpoint, its format by its suffix: .safetensors, .pt/.pth/.bin/.ckpt, .npy, .npz or "
            ".parquet; for a folder as SRC a folder, with the model's small files, too. Or a URI.",
        ),
    ],
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="Type of the tables: float32, float16 or bfloat16.",
            show_default="what they were packed from; bfloat16 for FP8 and INT8",
            callback=options.checking(check_dtype),
            autocompletion=options.complete_dtype,
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Write to DST though there is something; a folder keeps files of other names."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Write a packed checkpoint as a plain one that the original program can load.

    [dim]embpack dequantize model-4bit.safetensors model-restored.safetensors[/]
    """
    show.go_on_unread()
    with open_packed(src) as packed:
        totals = {name: table.entry.num_embeddings for name, table in packed.tables.items()}
    with show.row_progress(totals, shown=not as_json) as progress:
        tables = dequantize_file(src, dst, force=force, dtype=dtype, progress=progress)
    if as_json:
        show.print_json(describe_unpacked(src, dst, packed, tables))
        return
    columns = ["table", "type", "rows", "dim", "before", "after"]
    shown = show.start_table(
        f"Unpacked into {dst}", columns, text_columns=2, things="tables", drop=("dim", "type", "before")
    )
    for table in tables:
        shown.add_row(
            table.name,
            table.dtype,
            f"{table.num_embeddings:,}",
            str(table.embedding_dim),
            show.size(table.bytes_before),
            show.size(table.bytes_after),
        )
    show.output.print(shown)
