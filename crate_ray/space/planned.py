"""The runs that a sweep is expected to train, for its forecast: which, in which order, and which of them to time.

In: a SweepConfig and its plan. Out: PlannedTrials and the configurations of the extremes of every arm. Before the screening
nobody knows what it will choose, so every planned point is a candidate for the second stage.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crate_ray.config import RunConfig, SweepConfig
from crate_ray.space.arms import ArmSpace
from crate_ray.space.confirm import confirm_points
from crate_ray.space.forecast import PlannedTrial, extremes, planned_trial
from crate_ray.space.plan import Plan
from crate_ray.space.point import Point


@dataclass(frozen=True)
class PlannedSweep:
    """What a forecast is made of.

    Attributes:
        screen: Trials of the screening, in order.
        confirm: Candidates of the second stage; empty without one.
        num_confirm: How many trials the second stage will have.
        to_measure: Of every arm its smallest and its largest run; one where all cost the same.
    """

    screen: tuple[PlannedTrial, ...]
    confirm: tuple[PlannedTrial, ...]
    num_confirm: int
    to_measure: Mapping[str, tuple[RunConfig, ...]]


@dataclass(frozen=True)
class _AsIfFinished:
    """A planned point as a row of the screening: all equally good."""

    id: str
    arm: str
    values: Mapping[str, Any]
    stage: str = "screen"
    state: str = "FINISHED"

    def value_of(self, objective: str) -> float:
        """The same for every point."""
        return 0.0


def planned_sweep(sweep: SweepConfig, plan: Plan, num_samples: int | None = None) -> PlannedSweep:
    """The runs of both stages as far as their cost goes.

    Args:
        sweep: The sweep.
        plan: Its points; of a search that suggests them, draws that stand for what it will suggest.
        num_samples: Images of the training data, for a length in epochs.

    Raises:
        ConfigError: A point makes no run, or its number of steps is not known.
    """
    points = plan.in_turns(sweep.budget.trials)
    configs = _configs(sweep, points, num_samples)
    screen = [
        planned_trial(point.arm, config, scheduler=sweep.scheduler, num_samples=num_samples)
        for point, config in zip(points, configs, strict=True)
    ]
    confirm: list[PlannedTrial] = []
    num_confirm = 0
    if sweep.confirm is not None:
        num_confirm = len(
            confirm_points(sweep, [_AsIfFinished(point.key, point.arm, point.values) for point in points], num_samples)
        )
        longer = _configs(sweep, [Point(p.arm, p.values, p.seed, "confirm") for p in points], num_samples)
        confirm = [planned_trial(p.arm, config, num_samples=num_samples) for p, config in zip(points, longer, strict=True)]
    to_measure = {arm: tuple(configs[place] for place in places) for arm, places in extremes(screen).items()}
    return PlannedSweep(tuple(screen), tuple(confirm), num_confirm, to_measure)


def _configs(sweep: SweepConfig, points: list[Point], num_samples: int | None) -> list[RunConfig]:
    """Of points of one stage; those of the second are resolved anew, for they may be longer."""
    spaces: dict[str, ArmSpace] = {}
    configs = []
    for point in points:
        if point.arm not in spaces:
            spaces[point.arm] = ArmSpace(sweep, point.arm, stage=point.stage, num_samples=num_samples)
        space = spaces[point.arm]
        values = point.values
        if point.stage == "confirm":
            values = space.resolve({key: values[key] for key in space.independent})
        configs.append(space.config(values))
    return configs
