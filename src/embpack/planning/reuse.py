"""A plan used again, for a checkpoint that has been trained on."""

from collections.abc import Sequence
from dataclasses import replace
from glob import escape

from embpack.composites import list_units
from embpack.formats import Checkpoint, SourceTensor
from embpack.planning.plans import Plan
from embpack.rules import Decision, Rules, decide_all, list_names

_ANEW = "make the plan anew with --auto --save-plan"


def decide_by_plan(checkpoint: Checkpoint, rules: Rules, plan: Plan) -> list[Decision]:
    """Decide on every tensor of a checkpoint as a plan has it, in file order, before anything is packed.

    Args:
        checkpoint: which is open.
        rules: which tensors are tables; those of the plan are, too, unless they are excluded.
        plan: made for an earlier state of the checkpoint.

    Raises:
        ValueError: a table of the plan is not there, or has longer or shorter rows; a table is not in the plan; or as
            decide_all.
    """
    tensors = {unit.tensor.name: unit.tensor for unit in list_units(checkpoint.tensors)}
    _refuse_others(plan, tensors)
    # What was a table only because its user named it is named by the plan.
    unsaid = [table.name for table in plan.tables if rules.why_no_table(tensors[table.name]) not in (None, "excluded")]
    rules = replace(rules, include=(*rules.include, *map(escape, unsaid)), variants={})
    _refuse_new(plan, decide_all(checkpoint, rules))
    return decide_all(checkpoint, replace(rules, variants=plan.variants))


def _refuse_others(plan: Plan, tensors: dict[str, SourceTensor]) -> None:
    missing = [table.name for table in plan.tables if table.name not in tensors]
    if missing:
        raise ValueError(f"the plan has {list_names(missing)}, but the checkpoint has no such tensor; {_ANEW}")
    for table in plan.tables:
        shape = tensors[table.name].shape
        if len(shape) != 2 or shape[1] != table.embedding_dim:
            raise ValueError(
                f"the plan has {table.name!r} with rows of {table.embedding_dim} values, but its shape is "
                f"{list(shape)}; {_ANEW}"
            )


def _refuse_new(plan: Plan, decisions: Sequence[Decision]) -> None:
    planned = {table.name for table in plan.tables}
    new = [each.tensor.name for each in decisions if each.variant and each.tensor.name not in planned]
    if new:
        raise ValueError(
            f"the plan does not have {list_names(new)}, which would be packed; {_ANEW}, or leave new tables as they "
            "are with --exclude"
        )
