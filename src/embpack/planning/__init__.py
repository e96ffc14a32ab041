"""Which method and how many bits each table of a model gets: the least error in the bytes that there are."""

from embpack.planning.budget import check_file_bytes
from embpack.planning.counts import check_counts
from embpack.planning.planned import Better, PlannedTable
from embpack.planning.planner import VARIANTS, count_least_bytes, count_work, plan, plan_checkpoint
from embpack.planning.plans import Plan, check_plan_path
from embpack.planning.reuse import decide_by_plan

__all__ = [
    "VARIANTS",
    "Better",
    "Plan",
    "PlannedTable",
    "check_counts",
    "check_file_bytes",
    "check_plan_path",
    "count_least_bytes",
    "count_work",
    "decide_by_plan",
    "plan",
    "plan_checkpoint",
]
