"""embpack quantize."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from embpack.cli import show
from embpack.comparison.checkpoint import count_rows
from embpack.convert import Report, check_destination, check_max_loss, pack_checkpoint
from embpack.formats import open_checkpoint
from embpack.layouts import PARAM_BYTES, ROTATIONS
from embpack.methods import DEFAULT_METHOD, METHODS, parse_method
from embpack.planning import SAMPLE_ROWS, VARIANTS, Plan, check_counts, plan_decided
from embpack.rules import Decision, Rules, decide_all
from embpack.sizes import parse_size
from embpack.threads import set_num_threads
from embpack.variant import Variant, parse_bits


def _check_method(spec: str) -> str:
    try:
        parse_method(spec)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return spec


def _read_bits(text: str) -> float:
    try:
        return parse_bits(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _check_param_dtype(param_dtype: str | None) -> str | None:
    if param_dtype is not None and param_dtype not in PARAM_BYTES:
        raise typer.BadParameter(f"{param_dtype!r}; choose float16 or float32")
    return param_dtype


def _check_rotate(rotate: str | None) -> str | None:
    if rotate not in (None, *ROTATIONS):
        raise typer.BadParameter(f"{rotate!r}; choose {', '.join(ROTATIONS)}")
    return rotate


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
    method: Annotated[str, typer.Option(help=_METHOD_HELP, callback=_check_method)] = DEFAULT_METHOD,
    bits: Annotated[
        Any,
        typer.Option(
            help="Bits a value: 2, 4 or 8; with --method trellis any number from 2 to 7, such as 3.5.",
            parser=_read_bits,
            metavar="NUMBER",
        ),
    ] = "4",
    param_dtype: Annotated[
        str | None,
        typer.Option(
            help="Type of scales and biases, or of codebooks: float16 or float32.",
            show_default="float16; float32 for uniform rows at 8 bits, and for trellis",
            callback=_check_param_dtype,
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
            "loss in the bytes of 4 bits. Ignores --method, --bits and --param-dtype.",
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
            help="Multiply rows by an orthogonal matrix before packing: hadamard. Lookups undo it. Less loss where "
            "values are heavy-tailed.",
            show_default="none",
            callback=_check_rotate,
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
    _check_together(auto, rotate, max_bytes, max_loss, access_counts)
    variant = Variant() if auto else _make_variant(method, bits, param_dtype, rotate)
    rules = Rules(include or (), exclude or (), variant)
    if not dry_run:
        show.go_on_unread()
    if threads is not None:
        set_num_threads(threads)
    with open_checkpoint(src) as checkpoint:
        if dst is not None and not dry_run:
            check_destination(checkpoint, dst, force=force)
        decisions, plan = decide_all(checkpoint, rules), None
        if auto:
            plan = _plan_tables(decisions, max_bytes, max_loss, access_counts, quiet=as_json)
            # A table stays as it is, still, if its own way makes no row smaller.
            decisions = decide_all(checkpoint, replace(rules, variants=plan.variants))
        if not as_json:
            show.print_decisions(str(src), decisions, checkpoint.left_out, plan)
        elif dry_run:
            show.print_json({"plan": list(map(_decision_json, decisions)), "left_out": checkpoint.left_out})
        if dst is None or dry_run:
            return
        totals = {each.tensor.name: each.tensor.shape[0] for each in decisions if each.variant}
        limit = None if auto else max_loss
        with show.row_progress(totals, shown=not as_json) as progress:
            report = pack_checkpoint(checkpoint, decisions, dst, max_loss=limit, force=force, progress=progress)
    if as_json:
        show.print_json(_report_json(report))
    else:
        show.output.print()
        show.print_report(str(dst), report)


def _make_variant(method: str, bits: float, param_dtype: str | None, rotate: str | None) -> Variant:
    """Put together how tables are packed, and refuse what does not go together, whatever the tables."""
    variant = Variant(method, bits, param_dtype, rotate)
    for option, part in (("--bits", Variant(method, bits)), ("--param-dtype", variant)):
        refusal = part.find_refusal()
        if refusal is not None:
            raise typer.BadParameter(refusal, param_hint=option)
    return variant


def _check_together(
    auto: bool, rotate: str | None, max_bytes: str | None, max_loss: float | None, access_counts: Path | None
) -> None:
    if auto and rotate is not None:
        raise typer.BadParameter("does not go with --auto, which measures both", param_hint="--rotate")
    if not auto and (max_bytes is not None or access_counts is not None):
        raise typer.BadParameter(
            "goes with --auto", param_hint="--access-counts" if max_bytes is None else "--max-bytes"
        )
    if max_bytes is not None and max_loss is not None:
        raise typer.BadParameter("does not go with --max-loss; give one of them", param_hint="--max-bytes")


def _plan_tables(
    decisions: Sequence[Decision],
    max_bytes: str | None,
    max_loss: float | None,
    access_counts: Path | None,
    *,
    quiet: bool,
) -> Plan:
    rows = {d.tensor.name: len(VARIANTS) * count_rows(d, SAMPLE_ROWS) for d in decisions if d.variant}
    counts = {} if access_counts is None else _read_counts(access_counts, list(rows))
    with show.row_progress(rows, shown=not quiet) as progress:
        return plan_decided(decisions, max_bytes, max_loss, access_counts=counts, progress=progress)


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


def _decision_json(decision: Decision) -> dict[str, Any]:
    variant, row_format = decision.variant, decision.row_format
    return {
        "name": decision.tensor.name,
        "shape": decision.tensor.shape,
        "dtype": decision.tensor.dtype,
        "pack": variant is not None,
        "reason": decision.reason,
        "method": None if variant is None else variant.parsed_method.spec,
        "bits": None if row_format is None else row_format.bits,
        "bytes_before": decision.bytes_before,
        "bytes_after": decision.bytes_after,
    }


def _report_json(report: Report) -> dict[str, Any]:
    value = dataclasses.asdict(report)
    for table, item in zip(value["tables"], report.tables, strict=True):
        table["rows_per_second"] = item.rows_per_second
    return value
