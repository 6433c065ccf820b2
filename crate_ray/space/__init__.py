"""The space of a sweep: its points, what they may be, and which comes next. Arithmetic; neither Ray nor a run folder here."""

from crate_ray.space.arms import ArmSpace, arm_config, arms, point_config
from crate_ray.space.check import check_sweep, scheduler_metric
from crate_ray.space.confirm import confirm_points
from crate_ray.space.costs import quantities
from crate_ray.space.matching import Match
from crate_ray.space.plan import Plan, describe_refusals, feasible, make_plan
from crate_ray.space.planner import Planner, make_planner
from crate_ray.space.point import Point

__all__ = [
    "ArmSpace",
    "Match",
    "Plan",
    "Planner",
    "Point",
    "arm_config",
    "arms",
    "check_sweep",
    "confirm_points",
    "describe_refusals",
    "feasible",
    "make_plan",
    "make_planner",
    "point_config",
    "quantities",
    "scheduler_metric",
]
