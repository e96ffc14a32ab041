"""Plans on the command line: made, saved, and used again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import typer

from embpack.cli import show
from embpack.convert import Report
from embpack.errors import FormatError, naming
from embpack.formats import Checkpoint
from embpack.formats.atomic import check_space
from embpack.formats.safetensors import parse_object
from embpack.planning import (
    Plan,
    check_counts,
    check_file_bytes,
    check_plan_path,
    count_least_bytes,
    count_work,
    decide_by_plan,
    plan_checkpoint,
)
from embpack.rules import Decision, Rules, decide_all
from embpack.variant import Variant


@dataclass(frozen=True)
class Planning:
    """What a user said of plans.

    Attributes:
        auto: to make one.
        used: the file of one to use.
        saved: the file to write it to.
        max_bytes, max_loss, access_counts: as --help says.
        variants: what --auto chooses from.
        readers: who is to read the rows.
        max_shard_size: of the files of a folder.
    """

    auto: bool
    used: Path | None
    saved: Path | None
    max_bytes: str | None
    max_loss: float | None
    access_counts: Path | None
    variants: Sequence[Variant]
    readers: Sequence[str]
    max_shard_size: str | None

    def check(self, ways: Mapping[str, object]) -> None:
        """Refuse options that do not go together, or would have no effect; ways: those that say how to pack."""
        if self.used is not None:
            others = {"--auto": self.auto, "--save-plan": self.saved, "--access-counts": self.access_counts, **ways}
            for option, value in others.items():
                if value:
                    raise typer.BadParameter("does not go with --plan, which says how to pack", param_hint=option)
        elif not self.auto:
            for option, value in (("--access-counts", self.access_counts), ("--save-plan", self.saved)):
                if value is not None:
                    raise typer.BadParameter("goes with --auto", param_hint=option)
            if self.max_bytes is not None:
                raise typer.BadParameter("goes with --auto or --plan", param_hint="--max-bytes")

    @property
    def max_table_loss(self) -> float | None:
        """What each table is judged by; a loss that --auto has to keep of all tables together is none."""
        return None if self.auto and self.max_bytes is None else self.max_loss

    def decide(
        self, checkpoint: Checkpoint, rules: Rules, dst: Path | None, *, quiet: bool
    ) -> tuple[list[Decision], Plan | None]:
        """Decide on all tensors of a checkpoint, by a plan if there is to be one.

        Args:
            checkpoint: which is open.
            rules: what the other options say.
            dst: there must be room for it; None if nothing is written.
            quiet: show no bars.

        Raises:
            OSError, FormatError: a file is none that can be read, or the plan could not be written.
            ValueError: as plan_checkpoint, decide_by_plan and check_file_bytes.
        """
        if self.used is not None:
            plan = Plan.load(self.used)
            with naming(str(self.used)):
                decisions = decide_by_plan(checkpoint, rules, plan)
            if self.max_bytes is not None:
                check_file_bytes(checkpoint, decisions, self.max_bytes, dst, self.max_shard_size)
            return decisions, plan
        decisions = decide_all(checkpoint, rules)
        if not self.auto:
            return decisions, None
        if self.saved is not None:
            check_plan_path(self.saved)
        plan = self._make(checkpoint, decisions, dst, quiet=quiet)
        # A table stays as it is, still, if its own way makes no row smaller.
        return decide_all(checkpoint, replace(rules, variants=plan.variants, readable_by=self.readers)), plan

    def _make(self, checkpoint: Checkpoint, decisions: Sequence[Decision], dst: Path | None, *, quiet: bool) -> Plan:
        decided = [each for each in decisions if each.variant]
        counts = None
        if self.access_counts is not None:
            counts = _read_counts(self.access_counts, [each.tensor.name for each in decided])
        if dst is not None:
            least = count_least_bytes(checkpoint, decisions, self.variants, self.readers, self.max_shard_size)
            check_space(dst, [least])
        work = sum(count_work(each, self.variants, self.readers) for each in decided)
        # One bar: tables are measured in turns, and are done all at once.
        what = f"measuring {show.count(len(decided), 'table')}"
        with show.row_progress({what: work}, shown=not quiet) as advance:
            return plan_checkpoint(
                checkpoint,
                decisions,
                max_bytes=self.max_bytes,
                # With max_bytes it judges each table that was packed.
                max_loss=self.max_loss if self.max_bytes is None else None,
                variants=self.variants,
                readable_by=self.readers,
                access_counts=counts,
                max_shard_size=self.max_shard_size,
                progress=lambda name, rows: advance(what, rows),
            )

    def finish(self, plan: Plan | None, report: Report | None) -> None:
        """Save a plan, or say of one that was used for which tables it should be made anew; no report is a dry run."""
        if plan is None:
            return
        if self.saved is not None:
            (plan if report is None else plan.measured(report.tables)).save(self.saved)
        changes = {} if self.used is None or report is None else plan.find_changes(report.tables)
        if changes:
            show.print_warning(
                f"{self.used}: tables that have changed since the plan was made, {len(changes)} of {len(plan.tables)}; "
                "make it anew with --auto --save-plan:"
            )
        for name, change in changes.items():
            show.print_warning(f"{name}: {change}")


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
