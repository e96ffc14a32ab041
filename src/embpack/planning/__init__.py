"""Which method and how many bits each table of a model gets: the least error in the bytes that there are."""

from embpack.planning.counts import check_counts
from embpack.planning.plan import Plan
from embpack.planning.planned import Better, PlannedTable
from embpack.planning.planner import VARIANTS, count_work, plan, plan_checkpoint

__all__ = [
    "VARIANTS",
    "Better",
    "Plan",
    "PlannedTable",
    "check_counts",
    "count_work",
    "plan",
    "plan_checkpoint",
]
