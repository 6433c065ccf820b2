"""Screening trials in order, and the best of `tune` at every point of the space.

In: the rows of a sweep and its configuration. Out: rankings by the primary objective, one an arm, and for every tuned key where
its best value lies on the grid. The trade-off: a trial that the scheduler stopped has its last value at an earlier step, which
says little about its end, so it stands after every finished trial however good it looks. Validation losses are ranked only
where they answer the same question (see `runs.loss_target`); other objectives across all trials of an arm.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from crate_ray.config import Domain, SweepConfig, is_exploratory, order_key
from crate_ray.runs import TrialRow

Position = Literal["lower edge", "upper edge", "inside", "single value", "no order"]
_EDGE_SHARE = 0.1  # of a continuous range: nearer to an end than this counts as on it


class HasLossTarget(Protocol):
    """Whatever has a validation loss: a trial, or the mean of several."""

    @property
    def loss_target(self) -> Mapping[str, Any]:
        """What its loss asks (see `runs.loss_target`)."""
        ...


Asked = TypeVar("Asked", bound=HasLossTarget)


@dataclass(frozen=True)
class Ranked:
    """A trial in its place, from 1; equal values share one. `step` is set where it was stopped there."""

    place: int
    row: TrialRow
    value: float
    step: int | None = None


@dataclass(frozen=True)
class TunedKey:
    """The best value of a tuned key and where it lies among those that were asked for."""

    key: str
    best: Any
    position: Position


@dataclass(frozen=True)
class PointBest:
    """The best of `tune` at one point of the space: `values` are the point's keys, `tuned` the others."""

    values: Mapping[str, Any]
    best: Ranked
    tuned: tuple[TunedKey, ...]
    num_finished: int


@dataclass(frozen=True)
class ArmRanking:
    """The trials of one arm whose values mean the same.

    Attributes:
        arm: The arm.
        target: The loss's question, where the arm has several and the loss is ranked; else empty.
        trials: In order; finished ones first.
        points: The best finished trial at every point of the space, best first.
        unranked: Why a trial that is over has no place, with the number of such trials.
    """

    arm: str
    target: Mapping[str, Any]
    trials: tuple[Ranked, ...]
    points: tuple[PointBest, ...]
    unranked: Mapping[str, int]

    @property
    def best(self) -> PointBest | None:
        """The best point; None where nothing finished."""
        return self.points[0] if self.points else None


@dataclass(frozen=True)
class Ranking:
    """All arms by one objective.

    Attributes:
        objective: The primary one.
        arms: One an arm, or several where an arm's losses ask different questions.
        exploratory: Why this ranks no points of the space yet, such as one fixed learning rate for all; else None.
    """

    objective: str
    arms: tuple[ArmRanking, ...]
    exploratory: str | None

    def positions(self) -> dict[str, Counter[Position]]:
        """For every tuned key, at how many points of all arms the best value lies where."""
        counts: dict[str, Counter[Position]] = {}
        for arm in self.arms:
            for point in arm.points:
                for tuned in point.tuned:
                    counts.setdefault(tuned.key, Counter())[tuned.position] += 1
        return counts


def rank(rows: Sequence[TrialRow], sweep: SweepConfig) -> Ranking:
    """Ranks the screening trials of each arm by the sweep's first objective.

    Args:
        rows: Of any stage; only those of the screening count.
        sweep: What was swept.
    """
    objective = sweep.objective[0]
    screened = [row for row in rows if row.stage == "screen"]
    arms = [
        _rank_arm(arm, target, group, sweep)
        for arm in dict.fromkeys(row.arm for row in screened)
        for target, group in same_question([row for row in screened if row.arm == arm], [objective])
    ]
    return Ranking(objective, tuple(arms), is_exploratory(sweep))


def same_question(candidates: Sequence[Asked], objectives: Iterable[str]) -> list[tuple[dict[str, Any], list[Asked]]]:
    """Groups whose objectives may be compared, each with the parts of the loss's question in which groups differ.

    One group where the loss is not among the objectives.
    """
    if "eval_loss" not in objectives:
        return [({}, list(candidates))] if candidates else []
    groups: dict[tuple[Any, ...], list[Asked]] = {}
    keys = sorted({key for item in candidates for key in item.loss_target})
    for item in candidates:
        groups.setdefault(tuple(item.loss_target.get(key) for key in keys), []).append(item)
    differing = [i for i in range(len(keys)) if len({question[i] for question in groups}) > 1]
    return [({keys[i]: question[i] for i in differing}, group) for question, group in groups.items()]


def point_of(values: Mapping[str, Any], sweep: SweepConfig, arm: str) -> dict[str, Any]:
    """The keys of a point of the space: all that are not tuned and do not follow a tuned one."""
    tuned = sweep.tuned_in(arm)
    return {key: value for key, value in values.items() if key not in tuned}


def spelling(values: Mapping[str, Any]) -> str:
    """One spelling of values, whether or not they went through a file."""
    return json.dumps(values, sort_keys=True)


def own_values(values: Mapping[str, Any], sweep: SweepConfig, arm: str) -> dict[str, Any]:
    """The values that tell a configuration apart: without keys that have one value, or merely follow another one."""
    domains = sweep.domains_of(arm)
    idle = {key for key, domain in domains.items() if domain.of is not None or len(domain.grid or domain.choice or "..") == 1}
    return {key: value for key, value in values.items() if key not in idle}


def free_keys(sweep: SweepConfig, arm: str) -> list[str]:
    """The keys that vary by themselves in an arm: those that follow another key or that a solver chose are left out."""
    solved = sweep.match.over if sweep.match is not None and sweep.match.to != arm else {}
    return [key for key, domain in sweep.domains_of(arm).items() if not domain.is_dependent and key not in solved]


def _rank_arm(arm: str, target: Mapping[str, Any], rows: Sequence[TrialRow], sweep: SweepConfig) -> ArmRanking:
    keys = {row.id: key for row in rows if (key := order_key(sweep, row)) is not None}
    finished = sorted((row for row in rows if row.state == "FINISHED" and row.id in keys), key=lambda row: keys[row.id])
    stopped = [row for row in rows if row.state == "STOPPED" and row.id in keys]
    stopped.sort(key=lambda row: (-row.step, keys[row.id]))
    trials: list[Ranked] = []
    for row in [*finished, *stopped]:
        step = row.step if row.state == "STOPPED" else None
        value = row.value_of(sweep.objective[0])
        assert value is not None
        ranked = Ranked(len(trials) + 1, row, value, step)
        if trials and (trials[-1].value, trials[-1].step) == (ranked.value, ranked.step):
            ranked = Ranked(trials[-1].place, row, ranked.value, step)
        trials.append(ranked)
    placed = {trial.row.id for trial in trials}
    unranked = Counter(_why_unranked(row) for row in rows if row.state != "RUNNING" and row.id not in placed)
    return ArmRanking(arm, target, tuple(trials), tuple(_points(trials, sweep)), unranked)


def _why_unranked(row: TrialRow) -> str:
    return "no finite value" if row.state in ("FINISHED", "STOPPED") else row.state.lower()


def _points(trials: Sequence[Ranked], sweep: SweepConfig) -> list[PointBest]:
    """In the order of the ranking: the first trial of a point is its best."""
    groups: dict[str, list[Ranked]] = {}
    for trial in trials:
        if trial.step is None:
            groups.setdefault(spelling(point_of(trial.row.values, sweep, trial.row.arm)), []).append(trial)
    return [
        PointBest(point_of(group[0].row.values, sweep, group[0].row.arm), group[0], tuned_keys(group[0].row, sweep), len(group))
        for group in groups.values()
    ]


def tuned_keys(row: TrialRow, sweep: SweepConfig) -> tuple[TunedKey, ...]:
    """Where the row's values of `tune` lie; keys that follow another one are left out."""
    return tuple(
        TunedKey(key, row.values[key], _position(row.values[key], domain))
        for key, domain in sweep.tune.items()
        if key in row.values and not domain.is_dependent
    )


def _position(value: Any, domain: Domain) -> Position:
    listed = domain.grid or domain.choice
    if listed is not None:
        if len(listed) == 1:
            return "single value"
        if not all(isinstance(item, int | float) and not isinstance(item, bool) for item in listed):
            return "no order"
        return "lower edge" if value <= min(listed) else "upper edge" if value >= max(listed) else "inside"
    limits = domain.uniform or domain.loguniform or domain.quantized
    assert limits is not None  # the other kinds follow another key
    scale = math.log if domain.loguniform else float
    low, high = scale(limits[0]), scale(limits[1])
    share = (scale(value) - low) / (high - low)
    margin = domain.quantized[2] / (2 * (high - low)) if domain.quantized else _EDGE_SHARE
    return "lower edge" if share <= margin else "upper edge" if share >= 1 - margin else "inside"
