"""embpack update."""

from pathlib import Path
from typing import Annotated

import typer

from embpack.cli import options, show
from embpack.cli.json_output import describe_updated
from embpack.deltas import ColumnNames
from embpack.file_updates import WARN_SHARE, FileUpdateReport, open_update
from embpack.threads import set_num_threads

_COLUMNS = "Columns"


def _column(help: str, default: str) -> object:
    return typer.Option(metavar="NAME", help=help, show_default=default, rich_help_panel=_COLUMNS)


def update(
    file: Annotated[
        Path,
        options.of_place("FILE", "What embpack quantize wrote: a file, a folder or an index."),
    ],
    deltas: Annotated[
        list[str],
        typer.Argument(
            metavar="DELTA",
            show_default=False,
            help="Rows that changed: .parquet, .npz with TABLE.indices and TABLE.rows, IDS.npy,ROWS.npy, or a folder "
            "of TorchEasyRec's; TABLE=DELTA where it names no table.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="NEW",
            help="Write this file or folder, and leave FILE as it is.",
            parser=options.path,
            show_default="FILE is replaced, at once and whole",
        ),
    ] = None,
    table_column: Annotated[
        str | None, _column("Which table a row is of, with or without .weight.", "table_fqn, if there is one")
    ] = None,
    id_column: Annotated[str, _column("Which row of the table it is.", "key_id")] = "key_id",
    row_column: Annotated[
        str, _column("Its values: a list of floats, or of FBGEMM's bytes.", "embedding")
    ] = "embedding",
    step_column: Annotated[
        str | None,
        _column("When it was written: of an id's rows the last counts.", "global_step, if there is one; else in order"),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help="What packs rows of a table whose file does not say how it was packed.",
            show_default=False,
            callback=options.check_methods,
            autocompletion=options.complete_methods,
            rich_help_panel=options.HOW,
        ),
    ] = None,
    warn_share: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            metavar="SHARE",
            help="Warn to pack a table anew if more of its changed rows do not fit what its rows share, such as the "
            "levels of trellis.",
            rich_help_panel=options.LIMITS,
        ),
    ] = WARN_SHARE,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Read the ids, say what would change, and write nothing.", rich_help_panel=options.OUTPUT
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Replace what is at NEW though embpack did not write it.", rich_help_panel=options.OUTPUT
        ),
    ] = False,
    as_json: options.AsJson = False,
    threads: options.Threads = None,
) -> None:
    """Pack rows that changed, and leave all other bytes of a packed file as they are.

    Rows are packed as their table was, and may name it with or without .weight; where FILE has but one, they need not.
    FILE is replaced whole or not at all. Processes that have the old one loaded go on with it until they load again.

    [dim]embpack update model-4bit.safetensors model_dir/delta_embedding_dump[/]

    [dim]embpack update model-4bit.safetensors user_emb=ids.npy,rows.npy --out newer.safetensors[/]
    """
    if not dry_run:
        show.go_on_unread()
    if threads is not None:
        set_num_threads(threads)
    names = ColumnNames(table_column, id_column, row_column, step_column)
    with open_update(file, deltas, names) as opened:
        if dry_run:
            report = opened.foresee()
        else:
            with show.row_progress(opened.totals, shown=not as_json) as progress:
                report = opened.write(out, method=method, warn_share=warn_share, force=force, progress=progress)
    if as_json:
        show.print_json(describe_updated(file, out, report, dry_run=dry_run))
    else:
        _print(str(out or file), report, dry_run=dry_run)


def _print(path: str, report: FileUpdateReport, *, dry_run: bool) -> None:
    measured = ("misfits", "l2 before", "of changed", "l2 after")
    columns = ["table", "rows", "changed", "share", "written", "overwritten", *(() if dry_run else measured)]
    drop = ("rows", "overwritten", "written", "misfits", "share")
    title = f"Plan for {path}" if dry_run else f"Updated {path}"
    shown = show.start_table(title, columns, things="tables", drop=drop)
    for table in report.tables:
        losses = (table.loss_before, table.loss_changed, table.loss_after)
        shown.add_row(
            table.name,
            f"{table.num_embeddings:,}",
            f"{table.rows_changed:,}",
            show.share(table.rows_changed, table.num_embeddings),
            f"{table.ids_seen:,}",
            f"{table.duplicates:,}",
            *(() if dry_run else (f"{table.num_misfits:,}", *map(show.loss_text, losses))),
        )
    show.output.print(shown)
    for table in report.tables:
        if table.warning is not None:
            show.output.print(f"{table.name}: {table.warning}", style="yellow")
    num_changed = sum(table.rows_changed for table in report.tables)
    changed = f"{show.count(num_changed, 'row')} of {show.count(len(report.files), 'file')}"
    said = f"{changed} would change; nothing was written" if dry_run else f"{changed} in {report.seconds:.1f} s"
    show.output.print(said, style="bold")
