"""Who says which point a sweep tries next: a fixed list, or a search that learns from what was measured.

In: a SweepConfig. Out: a Planner; `ask` and `tell` are all that the launcher knows of it.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from crate_ray.config import SweepConfig
from crate_ray.space.listed import ListedPlanner
from crate_ray.space.matching import Match
from crate_ray.space.plan import make_plan
from crate_ray.space.point import Point
from crate_ray.space.study import StudyPlanner


class Planner(Protocol):
    """Hands out screening points, arms in turns, so that a sweep cut short has as many trials of each."""

    @property
    def total(self) -> int | None:
        """Screening trials that are planned."""

    @property
    def refused(self) -> Mapping[str, int]:
        """Points refused before they cost anything: reason and count."""

    @property
    def matches(self) -> Sequence[Match]:
        """Pairs that the solver made or missed, with how near they came."""

    @property
    def is_exhausted(self) -> bool:
        """Whether no further point will ever come."""

    def ask(self) -> Point | None:
        """The next point; None when there is none."""

    def tell(self, point: Point, values: Mapping[str, float]) -> None:
        """A trial finished, or was stopped with these last values, by the names of objectives."""

    def tell_infeasible(self, point: Point, reason: str) -> None:
        """A trial cannot be run to its end: out of memory, or not a number."""

    def restore(self, done: Sequence[tuple[Point, Mapping[str, float] | None]]) -> None:
        """Takes in what earlier sessions ended; None for the infeasible. To be called once, before the first `ask`."""


def make_planner(sweep: SweepConfig, num_samples: int | None = None, *, study_path: str | None = None) -> Planner:
    """The planner of a sweep's screening.

    Args:
        sweep: The sweep, checked by `check_sweep`.
        num_samples: Images of the training data; None where they are not known.
        study_path: Of tpe and nsga2: a local file for Optuna's study, which later sessions go on with. None: in memory.

    Raises:
        ConfigError: No point of an arm is feasible.
    """
    if sweep.search.method in ("tpe", "nsga2"):
        make_plan(sweep, num_samples)  # refuses a space in which nothing is feasible
        return StudyPlanner(sweep, num_samples, study_path=study_path)
    plan = make_plan(sweep, num_samples)
    return ListedPlanner(plan.in_turns(_most_trials(sweep)), refused=plan.refused, matches=plan.matches)


def _most_trials(sweep: SweepConfig) -> int | None:
    return None if sweep.scheduler.type == "pbt" else sweep.budget.trials
