"""Plans on the command line: made, saved, and used again."""

from collections.abc import Sequence
from pathlib import Path

import typer

from embpack.cli import show
from embpack.errors import FormatError, naming
from embpack.formats import Checkpoint
from embpack.formats.safetensors import parse_object
from embpack.planning import Plan, check_counts, check_file_bytes, count_work, decide_by_plan, plan_checkpoint
from embpack.rules import Decision, Rules
from embpack.variant import Variant


def check_together(
    *,
    auto: bool,
    plan: Path | None,
    save_plan: Path | None,
    max_bytes: str | None,
    access_counts: Path | None,
    ways: Sequence[str],
) -> None:
    """Refuse options that do not go together, or would have no effect.

    Args:
        auto, plan, save_plan, max_bytes, access_counts: what the user gave.
        ways: those that say how tables are packed and were given, "--method".
    """
    if plan is not None:
        given = ["--auto"] * auto + ["--save-plan"] * (save_plan is not None)
        given += ["--access-counts"] * (access_counts is not None)
        for option in [*given, *ways]:
            raise typer.BadParameter("does not go with --plan, which says how tables are packed", param_hint=option)
        return
    for option, value in (("--access-counts", access_counts), ("--save-plan", save_plan)):
        if value is not None and not auto:
            raise typer.BadParameter("goes with --auto", param_hint=option)
    if max_bytes is not None and not auto:
        raise typer.BadParameter("goes with --auto or --plan", param_hint="--max-bytes")


def make_plan(
    checkpoint: Checkpoint,
    decisions: Sequence[Decision],
    *,
    max_bytes: str | None,
    max_loss: float | None,
    access_counts: Path | None,
    variants: Sequence[Variant],
    readers: Sequence[str],
    quiet: bool,
) -> Plan:
    """Choose how tables are packed, and show how far that is."""
    work = {d.tensor.name: count_work(d, variants, readers) for d in decisions if d.variant}
    counts = None if access_counts is None else _read_counts(access_counts, list(work))
    with show.row_progress(work, shown=not quiet) as progress:
        return plan_checkpoint(
            checkpoint,
            decisions,
            max_bytes=max_bytes,
            # With max_bytes it judges each table that was packed.
            max_loss=max_loss if max_bytes is None else None,
            variants=variants,
            readable_by=readers,
            access_counts=counts,
            progress=progress,
        )


def use_plan(path: Path, checkpoint: Checkpoint, rules: Rules, max_bytes: str | None) -> tuple[Plan, list[Decision]]:
    """Read a plan, and decide by it on all tensors of a checkpoint.

    Raises:
        OSError, FormatError: the file is none that can be read.
        ValueError: tables are no longer those of the plan, or the file would take more than max_bytes.
    """
    plan = Plan.load(path)
    with naming(str(path)):
        decisions = decide_by_plan(checkpoint, rules, plan)
    if max_bytes is not None:
        check_file_bytes(checkpoint, decisions, max_bytes)
    return plan, decisions


def _read_counts(path: Path, tables: Sequence[str]) -> dict[str, float]:
    """Read how often tables are looked up.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON object of counts of these tables.
    """
    example = '{"user_embedding.weight": 1200, "item_embedding.weight": 90}'
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such file; --access-counts takes a number for each table: {example}"
        ) from None
    except OSError as error:
        raise type(error)(f"{path}: cannot be read: {error.strerror}") from None
    try:
        counts = parse_object(path, text)
    except FormatError as error:
        raise FormatError(f"{error}; it must be an object with a number for each table: {example}") from None
    with naming(str(path)):
        check_counts(counts, tables)
    return counts
