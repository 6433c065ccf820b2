"""The second stage: which points are trained again with fresh seeds.

In: a SweepConfig and the rows of its screening. Out: points. Every arm gets the same number of them and the same seeds, so that
differences between arms are paired; a row that a scheduler stopped is no candidate, for its value is of another length.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from crate_ray.config import ConfigError, SweepConfig, order_key
from crate_ray.space.arms import ArmSpace, arms
from crate_ray.space.point import Point, canonical


class ScreenedTrial(Protocol):
    """What is asked of a row."""

    @property
    def id(self) -> str:
        """Its name; equal trials stand in the order of their names."""

    @property
    def arm(self) -> str:
        """Its side of the comparison."""

    @property
    def stage(self) -> str:
        """Only rows of "screen" are looked at."""

    @property
    def state(self) -> str:
        """Only FINISHED rows are candidates."""

    @property
    def values(self) -> Mapping[str, Any]:
        """Resolved values of its point."""

    def value_of(self, objective: str) -> float | None:
        """What it measured."""


def confirm_points(sweep: SweepConfig, rows: Sequence[ScreenedTrial], num_samples: int | None = None) -> list[Point]:
    """The best points of every arm by the first objective, each with every seed; none where nothing is to be confirmed.

    Args:
        sweep: The sweep.
        rows: Its trials; those of other stages are passed over.
        num_samples: Images of the training data, where known.

    Returns:
        Points, seeds and arms in turns, so that a stage cut short leaves whole pairs.

    Raises:
        ConfigError: No trial of an arm was finished, or none measured the objective.
    """
    if sweep.confirm is None:
        return []
    best = {arm: _best(sweep, arm, rows, num_samples) for arm in arms(sweep)}
    seeds = range(sweep.confirm.first_seed, sweep.confirm.first_seed + sweep.confirm.seeds)
    most = max(len(chosen) for chosen in best.values())
    return [
        Point(arm, chosen[i], seed, "confirm")
        for i in range(most)
        for seed in seeds
        for arm, chosen in best.items()
        if i < len(chosen)
    ]


def _best(sweep: SweepConfig, arm: str, rows: Sequence[ScreenedTrial], num_samples: int | None) -> list[dict[str, Any]]:
    """Values of the arm's best points, resolved for the second stage, which may be longer."""
    assert sweep.confirm is not None
    space = ArmSpace(sweep, arm, stage="confirm", num_samples=num_samples)
    groups: dict[str, list[ScreenedTrial]] = {}
    for row in _ranked(sweep, arm, rows):
        groups.setdefault(_group(sweep, arm, row.values), []).append(row)
    chosen = [row for group in groups.values() for row in group[: sweep.confirm.top_k]]
    return [
        space.resolve({key: row.values[key] for key in space.independent}) | _perturbed(sweep, space, row) for row in chosen
    ]


def _perturbed(sweep: SweepConfig, space: ArmSpace, row: ScreenedTrial) -> dict[str, Any]:
    """What a population made of keys that are not in the space; not where the second stage sets them itself."""
    assert sweep.confirm is not None
    beside = sweep.scheduler.perturb.keys() - space.domains.keys() - sweep.confirm.set.keys()
    return {key: row.values[key] for key in sorted(beside) if key in row.values}


def _ranked(sweep: SweepConfig, arm: str, rows: Sequence[ScreenedTrial]) -> list[ScreenedTrial]:
    """The arm's finished screening trials in the order of the ranking."""
    screened = [row for row in rows if row.arm == arm and row.stage == "screen"]
    keys = {row.id: key for row in screened if row.state == "FINISHED" and (key := order_key(sweep, row)) is not None}
    if not keys:
        counts = Counter(row.state for row in screened)
        states = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
        raise ConfigError(
            f"arm '{arm}' has no finished screening trial with {sweep.objective[0]}, so there is nothing to confirm (its "
            f"trials: {states or 'none'}); start the sweep again for those that are left, or give it a larger budget, or a "
            "milder scheduler"
        )
    return sorted((row for row in screened if row.id in keys), key=lambda row: keys[row.id])


def _group(sweep: SweepConfig, arm: str, values: Mapping[str, Any]) -> str:
    """What rows compete within: the arm, or the point of the space whatever `tune` says."""
    assert sweep.confirm is not None
    if sweep.confirm.per == "arm":
        return ""
    tuned = sweep.tuned_in(arm)
    return canonical({key: value for key, value in values.items() if key not in tuned})
