"""embpack quantize."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from embpack.cli import options, show
from embpack.cli.json_output import describe_quantized
from embpack.convert import check_destination, check_max_loss, count_file_bytes, pack_checkpoint
from embpack.formats import Checkpoint, open_checkpoint
from embpack.methods import DEFAULT_METHOD, METHODS
from embpack.planning import Plan, check_counts, count_work, plan_checkpoint
from embpack.readers import READERS
from embpack.rules import Decision, Rules, decide_all
from embpack.sizes import parse_size
from embpack.threads import set_num_threads
from embpack.variant import Variant


def _check_max_bytes(max_bytes: str | None) -> str | None:
    if max_bytes is not None:
        try:
            parse_size(max_bytes, 1)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return max_bytes


def _check_max_loss(max_loss: float | None) -> float | None:
    if max_loss is not None:
        try:
            check_max_loss(max_loss)
        except ValueError:
            raise typer.BadParameter(f"{max_loss}; give a positive, finite number") from None
    return max_loss


_METHOD_HELP = (
    "What chooses each row's scale and bias, its codebook, or what all rows share; with parameters after a colon "
    "(greedy:b=1000,r=0.5). " + " ".join(f"[bold]{name}[/]: {method.summary}." for name, method in METHODS.items())
)


def quantize(
    src: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint: .safetensors, an index of sharded ones, a model's folder, .pt/.pth/.bin/.ckpt, .npy, "
            ".npz or .parquet.",
            show_default=False,
        ),
    ],
    dst: Annotated[
        Path | None,
        typer.Argument(
            help="A .safetensors file; for a folder or an index as SRC a folder, with the model's small files, too. It "
            "replaces what embpack wrote there, once it is whole.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help=_METHOD_HELP,
            show_default=f"{DEFAULT_METHOD}; with --auto also kmeans and trellis",
            callback=options.check_methods,
        ),
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            help="Bits a value: 2, 4 or 8; with --method trellis any number from 2 to 7, such as 3.5.",
            show_default="4; with --auto all that methods have",
            callback=options.check_bits,
            metavar="NUMBER",
        ),
    ] = None,
    param_dtype: Annotated[
        str | None,
        typer.Option(
            help="Type of scales and biases, or of codebooks: float16 or float32.",
            show_default="float16; float32 for uniform rows at 8 bits, and for trellis",
            callback=options.check_param_dtype,
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Also pack tensors whose name matches this glob; may be repeated."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Never pack tensors whose name matches this glob; may be repeated."),
    ] = None,
    chosen: Annotated[
        list[Any] | None,
        typer.Option(
            "--set",
            help="Pack the tables whose names match a glob in a way of their own, 'user_*=trellis:bits=3.5': a method; "
            "after a colon bits, rotate, param_dtype and its parameters. Of several that match, the last counts.",
            parser=options.read_setting,
            metavar="GLOB=METHOD",
            show_default=False,
        ),
    ] = None,
    readable_by: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Refuse, or with --auto do not choose, rows that {', '.join(READERS[:-1])} or {READERS[-1]} cannot "
            "read as they are; may be repeated.",
            callback=options.check_readers,
            metavar="READER",
            show_default=False,
        ),
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            help="Write nothing, and exit with 3, if a table's normalized l2 loss is larger. With --auto: the largest "
            "loss of all tables together; they get the fewest bytes that keep it.",
            show_default="no limit",
            callback=_check_max_loss,
        ),
    ] = None,
    auto: Annotated[
        bool,
        typer.Option(
            "--auto",
            help="Choose method, bits and rotation of each table by the loss on a sample; without a limit, the least "
            "loss in the bytes of 4 bits. --method, --bits, --rotate and --param-dtype restrict what it chooses from; "
            "the first three may name several, with commas between.",
        ),
    ] = False,
    max_bytes: Annotated[
        str | None,
        typer.Option(
            help="With --auto: spread this size over the tables, '2 GB' or '12.5 %' of float32, for the least error.",
            show_default="no limit",
            callback=_check_max_bytes,
        ),
    ] = None,
    access_counts: Annotated[
        Path | None,
        typer.Option(
            help="With --auto: a JSON file that says, by a table's name, how often its rows are looked up.",
            show_default="each row counts the same",
        ),
    ] = None,
    rotate: Annotated[
        str | None,
        typer.Option(
            help="Multiply rows by an orthogonal matrix before packing: hadamard, or none. Lookups undo it. Less loss "
            "where values are heavy-tailed.",
            show_default="none; with --auto both",
            callback=options.check_rotations,
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Write to DST though embpack did not write what is there; a folder keeps files of other names.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show which tensors would be packed, and why.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads to use.", show_default="all CPUs, or OMP_NUM_THREADS")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Pack the embedding tables of a checkpoint; everything else is copied as it is.

    [dim]embpack quantize model.safetensors model-4bit.safetensors[/]
    """
    if dst is None and not dry_run:
        raise typer.BadParameter("give a destination, or --dry-run", param_hint="DST")
    _check_together(auto, max_bytes, max_loss, access_counts)
    ways = options.Ways(method, bits, param_dtype, rotate)
    # The readers restrict what --auto chooses from: whether they take what is tried before it chooses is no matter.
    readers, variants = readable_by or [], ways.all() if auto else []
    rules = Rules(
        include=include or (),
        exclude=exclude or (),
        variant=Variant() if auto else ways.only(),
        variants=dict(chosen or ()),
        readable_by=() if auto else readers,
    )
    if not dry_run:
        show.go_on_unread()
    if threads is not None:
        set_num_threads(threads)
    with open_checkpoint(src) as checkpoint:
        if dst is not None and not dry_run:
            check_destination(checkpoint, dst, force=force)
        decisions, plan = decide_all(checkpoint, rules), None
        if auto:
            limits = max_bytes, max_loss, access_counts
            plan = _plan_tables(checkpoint, decisions, *limits, variants, readers, quiet=as_json)
            # A table stays as it is, still, if its own way makes no row smaller.
            decisions = decide_all(checkpoint, replace(rules, variants=plan.variants, readable_by=readers))
        if dst is None or dry_run:
            if as_json:
                show.print_json(describe_quantized(src, dst, checkpoint, decisions, plan, None))
            else:
                sizes = sum(shard.num_bytes for shard in checkpoint.shards), count_file_bytes(checkpoint, decisions)
                show.print_decisions(str(src), decisions, checkpoint.left_out, plan, sizes)
            return
        if not as_json:
            show.print_decisions(str(src), decisions, checkpoint.left_out, plan)
        totals = {each.tensor.name: each.tensor.shape[0] for each in decisions if each.variant}
        limit = None if auto else max_loss
        with show.row_progress(totals, shown=not as_json) as progress:
            report = pack_checkpoint(checkpoint, decisions, dst, max_loss=limit, force=force, progress=progress)
    if as_json:
        show.print_json(describe_quantized(src, dst, checkpoint, decisions, plan, report))
    else:
        show.output.print()
        show.print_report(str(dst), report)


def _check_together(auto: bool, max_bytes: str | None, max_loss: float | None, access_counts: Path | None) -> None:
    """Refuse options that would have no effect."""
    if not auto and (max_bytes is not None or access_counts is not None):
        raise typer.BadParameter(
            "goes with --auto", param_hint="--access-counts" if max_bytes is None else "--max-bytes"
        )
    if max_bytes is not None and max_loss is not None:
        raise typer.BadParameter("does not go with --max-loss; give one of them", param_hint="--max-bytes")


def _plan_tables(
    checkpoint: Checkpoint,
    decisions: Sequence[Decision],
    max_bytes: str | None,
    max_loss: float | None,
    access_counts: Path | None,
    variants: Sequence[Variant],
    readers: Sequence[str],
    *,
    quiet: bool,
) -> Plan:
    rows = {each.tensor.name: count_work(each, len(variants)) for each in decisions if each.variant}
    counts = None if access_counts is None else _read_counts(access_counts, list(rows))
    with show.row_progress(rows, shown=not quiet) as progress:
        return plan_checkpoint(
            checkpoint,
            decisions,
            max_bytes=max_bytes,
            max_loss=max_loss,
            variants=variants,
            readable_by=readers,
            access_counts=counts,
            progress=progress,
        )


def _read_counts(path: Path, tables: Sequence[str]) -> dict[str, float]:
    """Read how often tables are looked up.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON object of counts of these tables.
    """
    example = '{"user_embedding.weight": 1200}'
    try:
        counts = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; --access-counts takes counts by table: {example}") from None
    except OSError as error:
        raise type(error)(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(counts, dict):
        raise ValueError(f"{path}: it must be an object of counts by table: {example}")
    try:
        check_counts(counts, tables)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return counts
