"""Plans: ways to pack measured on few rows, and then, of those that may be chosen, on more."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from embpack.composites import list_units
from embpack.convert import check_max_loss
from embpack.errors import naming
from embpack.formats import Checkpoint, Shard, SourceTensor, open_checkpoint
from embpack.planning.budget import Budget, read_max_bytes
from embpack.planning.candidates import LEVELS, Candidate, Candidates, count_rows, pick_first
from embpack.planning.counts import check_counts
from embpack.planning.planned import Better, PlannedTable
from embpack.planning.plans import Plan
from embpack.planning.rounds import Choice, Rounds
from embpack.rows import as_rows
from embpack.rules import PACKABLE_DTYPES, Decision, Rules, decide_all, name_variants
from embpack.selection import list_ways, select_variants
from embpack.sizes import write_size
from embpack.variant import Variant

# The variants that are measured by default.
VARIANTS = tuple(select_variants())
# How many variants of a table are expected to be measured on each level but the first.
_EXPECTED = (3, 1)

Progress = Callable[[str, int], None]


def plan(
    src: str | PathLike[str] | Mapping[str, Any],
    *,
    max_bytes: int | str | None = None,
    max_loss: float | None = None,
    variants: Sequence[Variant] = VARIANTS,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    chosen: Mapping[str, Variant] | None = None,
    readable_by: Sequence[str] = (),
    access_counts: Mapping[str, float] | None = None,
    progress: Progress = lambda name, rows: None,
) -> Plan:
    """Choose how to pack each table, by the loss measured on samples of its rows.

    Without a limit, each table gets the least loss in the bytes that its uniform rows take at 4 bits, or 1 % more. With
    max_bytes, bits are spread over the tables so that the sum of all squared errors is least; with max_loss, so that
    the file takes the fewest bytes. For models of few tables the choice is the best one there is, for models of many
    it is close to that.

    All variants are measured on few rows, those that may be chosen on more, and those that are chosen on at most 20,000
    (docs/plans.md). Up to 2 MB of each table are in memory meanwhile.

    Args:
        src: a checkpoint that quantize_file reads; or weights by name, as quantize takes them.
        max_bytes: of the packed file, everything in it, as parse_size reads it: a number, "2 GB", "100 KiB", or a share
            of what is read, "12.5 %". It is the file that quantize_file writes of src, of one in shards all of them
            together; of weights the file that save writes. A share is of the files of src, or of the weights.
        max_loss: the normalized l2 loss over all tables.
        variants: the ways to pack a table that are measured; embpack.select_variants lists some, such as
            those at 4 bits.
        include: globs of tensor names, as quantize_file takes them.
        exclude: the same, of those never to pack.
        chosen: by name or glob, as quantize_file takes variants, how tables are packed for which there is nothing to
            choose; their bytes and errors count.
        readable_by: names in embpack.readers.READERS: only ways are chosen that all of these read as they are.
        access_counts: how often rows of each table are looked up, by the table's name, in all of its rows and all in
            the same time: of every table, or of none. A row's error counts this divided by the table's number of rows.
            None: each row counts 1.
        progress: called with a table's name and a number of rows for what was measured; they sum up to count_work.

    Raises:
        FileNotFoundError: there is no src.
        FormatError: src is damaged.
        ValueError: no tensor is a table; a value is NaN or infinite; max_bytes or max_loss is no size or loss, or
            cannot be kept (the message says what can), or both are given; a glob matches nothing, or src is weights,
            among which they do not choose; there is no such reader, or a table in no way that all of them read;
            access_counts name something that is no table, or not every table, or are
            not finite, or are negative or all 0; there are no weights or no variants.
        TypeError: a weight, a glob or a count is of another type.
    """
    limits: dict[str, Any] = {"max_bytes": max_bytes, "max_loss": max_loss, "access_counts": access_counts}
    limits |= {"variants": variants, "readable_by": readable_by, "progress": progress}
    if not isinstance(src, Mapping):
        _check(max_bytes, max_loss, variants)
        with open_checkpoint(src) as checkpoint:
            return plan_checkpoint(
                checkpoint, decide_all(checkpoint, Rules(include, exclude, variants=chosen or {})), **limits
            )
    if include or exclude:
        raise ValueError("include and exclude choose among tensors of a checkpoint; leave weights out of src instead")
    if not src:
        raise ValueError("src has no weights; give at least one")
    tensors = tuple(_as_tensor(name, weight) for name, weight in src.items())
    shard = Shard("", sum(tensor.nbytes for tensor in tensors), tensors)
    checkpoint = Checkpoint(Path(), (shard,))
    own = name_variants("src", Rules(include=["*"], variants=chosen or {}), list_units(tensors))
    decisions = [Decision(each, own.get(each.name, Variant()), "given", is_chosen=each.name in own) for each in tensors]
    return plan_checkpoint(checkpoint, decisions, **limits)


def plan_checkpoint(
    checkpoint: Checkpoint,
    decisions: Sequence[Decision],
    *,
    max_bytes: int | str | None = None,
    max_loss: float | None = None,
    variants: Sequence[Variant] = VARIANTS,
    readable_by: Sequence[str] = (),
    access_counts: Mapping[str, float] | None = None,
    max_shard_size: int | str | None = None,
    progress: Progress = lambda name, rows: None,
) -> Plan:
    """Do what plan does, for an open checkpoint and what was decided on its tensors; is_chosen ones have one way.

    With max_shard_size, as quantize_file takes it, headers of more files count.
    """
    _check(max_bytes, max_loss, variants)
    decided = [each for each in decisions if each.variant]
    counts = access_counts or {}
    check_counts(counts, [each.tensor.name for each in decided])
    work = {each.tensor.name: count_work(each, variants, readable_by) for each in decided}
    with _metered(progress, work) as tell:
        budget, tables = _list_candidates(checkpoint, decisions, variants, readable_by, counts, max_shard_size, tell)
        room = None if max_bytes is None else _find_room(max_bytes, checkpoint, budget.fixed, tables)
        for table in tables:
            table.start()
        rounds = Rounds(tables, room, max_loss)
        choices, is_kept = rounds.settle()
    if not is_kept and max_bytes is not None:
        # The smallest way has turned out to be none.
        _find_room(max_bytes, checkpoint, budget.fixed, tables)
    if not is_kept:
        least_loss = math.ceil(1e5 * rounds.measure_loss(choices)) / 1e5
        raise ValueError(
            f"max_loss is {max_loss}, but the least loss is {least_loss:.5f}; allow that much, or exclude some"
        )
    return _make_plan(rounds, choices, budget.fixed)


def count_least_bytes(
    checkpoint: Checkpoint,
    decisions: Sequence[Decision],
    variants: Sequence[Variant] = VARIANTS,
    readable_by: Sequence[str] = (),
    max_shard_size: int | str | None = None,
) -> int:
    """Count the bytes of the smallest packed file that plan_checkpoint can plan, given what that takes.

    Raises:
        ValueError: there is no way to pack a table.
    """
    budget, tables = _list_candidates(
        checkpoint, decisions, variants, readable_by, {}, max_shard_size, lambda name, rows: None
    )
    return budget.fixed + sum(table.least_file_bytes for table in tables)


def _list_candidates(
    checkpoint: Checkpoint,
    decisions: Sequence[Decision],
    variants: Sequence[Variant],
    readable_by: Sequence[str],
    counts: Mapping[str, float],
    max_shard_size: int | str | None,
    progress: Progress,
) -> tuple[Budget, list[Candidates]]:
    """List the ways to pack each table, before any row is read."""
    budget, tables = Budget.make(checkpoint, decisions, max_shard_size), []
    for each in decisions:
        if each.variant:
            weight = counts[each.tensor.name] / each.tensor.shape[0] if counts else 1.0
            ways = _list_ways(each, variants, readable_by)
            tables.append(Candidates.make(each, weight, ways, budget, progress))
    return budget, tables


def _check(max_bytes: int | str | None, max_loss: float | None, variants: Sequence[Variant]) -> None:
    if max_bytes is not None and max_loss is not None:
        raise ValueError(
            "give max_bytes or max_loss, not both; max_loss of quantize_file refuses what packing makes of the plan"
        )
    if max_loss is not None:
        check_max_loss(max_loss)
    if not variants:
        raise ValueError("there are no variants to measure; give at least one")


def _as_tensor(name: str, weight: Any) -> SourceTensor:
    """Make what a checkpoint would have of a weight."""
    if not isinstance(name, str):
        raise TypeError(f"src has a weight named {name!r}; give weights by names, which are strings")
    with naming(name):
        rows, dtype = as_rows(weight)
    [stored] = [own for own, known in PACKABLE_DTYPES.items() if known == dtype]
    return SourceTensor(name, rows.shape, stored, partial(_iter_rows, rows), source=None)


def _iter_rows(rows: NDArray[Any], start: int, stop: int, n: int) -> Iterator[NDArray[Any]]:
    return (rows[at : min(at + n, stop)] for at in range(start, stop, n))


def _list_ways(decision: Decision, variants: Sequence[Variant], readers: Sequence[str]) -> Sequence[Variant]:
    with naming(decision.place):
        chosen = decision.variant if decision.is_chosen else None
        return list_ways(decision.tensor.shape[1], variants, chosen, readers)


def count_work(decision: Decision, variants: Sequence[Variant] = VARIANTS, readable_by: Sequence[str] = ()) -> int:
    """Count the rows of a table that plan_checkpoint tells progress of.

    Raises:
        ValueError: there is no way that all of the readers read.
    """
    shape = decision.tensor.shape[0], decision.tensor.shape[1]
    ways = pick_first(_list_ways(decision, variants, readable_by))
    first, *others = (count_rows(*shape, level) for level in range(len(LEVELS)))
    return len(ways) * first + sum(times * rows for times, rows in zip(_EXPECTED, others, strict=True))


@contextmanager
def _metered(progress: Progress, work: Mapping[str, int]) -> Iterator[Progress]:
    """Tell progress of no more rows than were promised, and of those that it took less at the end."""
    left = dict(work)

    def tell(name: str, rows: int) -> None:
        told = min(rows, left[name])
        left[name] -= told
        if told:
            progress(name, told)

    yield tell
    for name, rows in work.items():
        tell(name, rows)


def _find_room(max_bytes: int | str, checkpoint: Checkpoint, fixed: int, tables: Sequence[Candidates]) -> int:
    """Find how many bytes tables may add to a file.

    Raises:
        ValueError: there are too few; it says what can be kept, in the unit in which it was given.
    """
    least, most = fixed + sum(table.least_file_bytes for table in tables), read_max_bytes(checkpoint, max_bytes)
    if least > most:
        can, limit = f"{least:,} bytes", f"{max_bytes:,}" if isinstance(max_bytes, int) else str(max_bytes)
        if limit.rstrip().endswith("%"):
            # Rounded up, so that it can be kept.
            share = math.ceil(least * 10_000 / sum(shard.num_bytes for shard in checkpoint.shards)) / 100
            can += f", {share} % of what is read"
        raise ValueError(f"max_bytes is {limit}, but the packed file takes at least {can}; allow that much")
    return most - fixed


def _make_plan(rounds: Rounds, choices: Sequence[Choice], fixed: int) -> Plan:
    total = rounds.sum_errors(choices)
    return Plan(
        tables=tuple(_describe(table, choice, total) for table, choice in zip(rounds.tables, choices, strict=True)),
        loss=rounds.measure_loss(choices),
        file_bytes=fixed + sum(choice.candidate.file_bytes for choice in choices),
    )


def _describe(table: Candidates, choice: Choice, total: float) -> PlannedTable:
    candidate, better, error = choice.candidate, None, table.error(choice.candidate)
    if choice.better is not None:
        saved = max(error - table.error(choice.better), 0.0) / total if total else 0.0
        better = Better(choice.better.variant, choice.better.num_bytes, choice.better.loss, saved)
    if not table.weight:
        reason = "never looked up"
    elif not error:
        reason = "no error"
    elif table.decision.is_chosen:
        reason = "chosen beforehand"
    elif better is None:
        reason = "nothing measured loses less"
    else:
        reason = _write_step(candidate, better)
    return PlannedTable(
        name=table.name,
        num_embeddings=table.num_embeddings,
        embedding_dim=table.embedding_dim,
        variant=candidate.variant,
        loss=candidate.loss,
        square_norm=table.square_norm,
        error_share=error / total if total else 0.0,
        reason=reason,
        better=better,
    )


def _write_step(chosen: Candidate, better: Better) -> str:
    """Say in few words what more bytes would do; the method only if it is another."""
    bits = (
        f"{better.variant.bits} bits"
        if better.variant.spec == chosen.variant.spec
        else f"{better.variant.spec} {better.variant.bits}"
    )
    return f"{bits}: {better.loss:.3g}, +{write_size(better.num_bytes - chosen.num_bytes)}"
