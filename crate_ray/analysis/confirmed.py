"""Confirmed configurations: means over fresh seeds, and differences between arms paired by seed.

In: the rows of a sweep's second stage. Out: intervals over seeds, and by name every seed that is missing. The configurations
that are compared are chosen on the screening alone: to choose the best of several confirmed ones and then to quote its mean
would favour the arm with more of them. A difference drops a seed that either side lacks, and says which and why.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

from crate_ray.analysis.objectives import MEASURES
from crate_ray.analysis.ranking import Ranking, own_values, point_of, spelling
from crate_ray.analysis.statistics import PairedInterval, paired_t_interval
from crate_ray.config import SweepConfig
from crate_ray.runs import TrialRow
from crate_ray.runs.screening import point_identity


@dataclass(frozen=True)
class Confirmed:
    """One configuration of an arm over its seeds.

    Attributes:
        arm: The arm.
        values: Its keys of `space` and `tune`.
        objective: The one that `by_seed` and `interval` are of.
        by_seed: Finite values of finished runs.
        missing: Why a planned seed has no value.
        interval: Mean over the seeds and its 95% interval; None with fewer than two.
        rows: The finished runs.
        place: Of its screening trial in the ranking of its arm; None where that is not known.
    """

    arm: str
    values: Mapping[str, Any]
    objective: str
    by_seed: Mapping[int, float]
    missing: Mapping[int, str]
    interval: PairedInterval | None
    rows: tuple[TrialRow, ...]
    place: int | None

    @property
    def loss_target(self) -> Mapping[str, Any]:
        """What its loss asks; the same in every seed."""
        return self.rows[0].loss_target if self.rows else {}

    def value_of(self, objective: str) -> float | None:
        """Mean of any objective over the finished seeds; None where a seed lacks it."""
        values = [row.value_of(objective) for row in self.rows]
        return fmean(measured) if values and len(measured := [v for v in values if v is not None]) == len(values) else None


@dataclass(frozen=True)
class ArmDifference:
    """`first` minus `second`, paired by seed.

    Attributes:
        first: A configuration of one arm.
        second: A configuration of another arm.
        point: Keys of the space that both share, where points are confirmed one by one; else empty.
        interval: Over the seeds that both have; None where they are fewer than two or the losses do not compare.
        dropped: Why a planned seed is not among the pairs.
        why_not: Why there is no interval.
    """

    first: Confirmed
    second: Confirmed
    point: Mapping[str, Any]
    interval: PairedInterval | None
    dropped: Mapping[int, str]
    why_not: str | None = None

    @property
    def excludes_zero(self) -> bool:
        """Whether the data tell the two apart."""
        return self.interval is not None and (self.interval.low > 0 or self.interval.high < 0)

    def sentence(self) -> str:
        """The finding: 'crate minus mae: +1.2 [0.3, 2.1] points over 5 paired seeds', and what it means."""
        names = f"{self.first.arm} minus {self.second.arm}"
        if self.interval is None:
            return f"{names}: no interval, {self.why_not}."
        measure = MEASURES[self.first.objective]
        low, high = measure.text(self.interval.low), measure.text(self.interval.high)
        unit = f" {measure.difference_unit}" if measure.difference_unit else f" of {measure.label}"
        head = (
            f"{names}: {measure.difference_text(self.interval.mean)} [{low}, {high}]{unit} over {self.interval.n} paired seeds"
        )
        return f"{head}; {self._verdict(is_larger_better=measure.is_larger_better)}."

    def _verdict(self, *, is_larger_better: bool) -> str:
        assert self.interval is not None
        if not self.excludes_zero:
            return "the interval holds 0, so these seeds do not tell them apart"
        better = self.first if (self.interval.mean > 0) == is_larger_better else self.second
        return f"{better.arm} is better"


def confirmed(rows: Sequence[TrialRow], sweep: SweepConfig, ranking: Ranking) -> list[Confirmed]:
    """The confirmed configurations of every arm, in the order of their screening.

    Args:
        rows: Of any stage; only those of the second count.
        sweep: What was swept; its `confirm` says which seeds were planned.
        ranking: Of the screening.
    """
    if sweep.confirm is None:
        return []
    places = {point_identity(trial.row, sweep): trial.place for arm in ranking.arms for trial in arm.trials}
    groups: dict[tuple[str, str], list[TrialRow]] = {}
    for row in rows:
        if row.stage == "confirm":
            groups.setdefault(point_identity(row, sweep), []).append(row)
    seeds = range(sweep.confirm.first_seed, sweep.confirm.first_seed + sweep.confirm.seeds)
    found = [_summary(group, seeds, sweep.objective[0], places.get(identity)) for identity, group in groups.items()]
    arms = list(dict.fromkeys(arm.arm for arm in ranking.arms))
    return sorted(found, key=lambda c: (arms.index(c.arm) if c.arm in arms else len(arms), c.place or math.inf))


def differences(configurations: Sequence[Confirmed], sweep: SweepConfig) -> list[ArmDifference]:
    """Every two arms, each with its best configuration of the screening; at every shared point where points are confirmed."""
    chosen: dict[str, dict[str, Confirmed]] = {}
    points: dict[str, dict[str, Any]] = {}
    for item in configurations:
        point = _shared_point(_anchor(item, configurations, sweep), sweep)
        points.setdefault(spelling(point), point)
        chosen.setdefault(spelling(point), {}).setdefault(item.arm, item)  # the first of an arm is its best
    return [_difference(a, b, points[name]) for name, of_arm in chosen.items() for a, b in combinations(of_arm.values(), 2)]


def _summary(group: Sequence[TrialRow], seeds: Sequence[int], objective: str, place: int | None) -> Confirmed:
    by_seed, missing, kept = {}, dict.fromkeys(seeds, "never started"), []
    for row in sorted(group, key=lambda row: row.seed):
        value = row.value_of(objective)
        if row.state == "FINISHED" and value is not None and math.isfinite(value):
            by_seed[row.seed] = value
            kept.append(row)
            missing.pop(row.seed, None)
        elif row.seed not in by_seed:
            missing[row.seed] = _why_missing(row, objective)
    interval = paired_t_interval(list(by_seed.values())) if len(by_seed) > 1 else None
    return Confirmed(group[0].arm, group[0].values, objective, by_seed, missing, interval, tuple(kept), place)


def _why_missing(row: TrialRow, objective: str) -> str:
    if row.state == "FINISHED":
        return f"finished without a finite {objective}"
    return row.state.lower() + (f" ({row.reason})" if row.reason else "")


def _shared_point(item: Confirmed, sweep: SweepConfig) -> dict[str, Any]:
    """What arms share of a point: keys of the space that no arm has its own of; the whole point where arms are matched."""
    if sweep.confirm is None or sweep.confirm.per == "arm":
        return {}
    point = point_of(item.values, sweep, item.arm)
    if sweep.match is not None:
        return own_values(point, sweep, sweep.match.to)
    own = {key for arm in sweep.arms.values() for key in arm.space}
    followers = {key for key, domain in sweep.space.items() if domain.is_dependent}
    shared = sweep.space.keys() - own - followers
    return {key: value for key, value in sorted(point.items()) if key in shared}


def _anchor(item: Confirmed, configurations: Sequence[Confirmed], sweep: SweepConfig) -> Confirmed:
    """What a configuration was solved to match: that of the target arm with the nearest quantity; itself without a match."""
    if sweep.match is None:
        return item
    quantity = sweep.match.quantity
    wanted = item.value_of(quantity) or 0.0
    targets = [other for other in configurations if other.arm == sweep.match.to and other.rows]
    return min(targets, key=lambda other: abs((other.value_of(quantity) or math.inf) - wanted), default=item)


def _difference(a: Confirmed, b: Confirmed, point: Mapping[str, Any]) -> ArmDifference:
    both = sorted(a.by_seed.keys() & b.by_seed.keys())
    reasons = [(seed, f"{item.arm} {why}") for item in (a, b) for seed, why in item.missing.items()]
    dropped = {seed: ", ".join(why for other, why in reasons if other == seed) for seed in sorted(dict(reasons))}
    targets = {repr(sorted(row.loss_target.items())) for row in (*a.rows, *b.rows)}
    if a.objective == "eval_loss" and len(targets) > 1:
        return ArmDifference(a, b, point, None, dropped, "their losses answer different questions")
    if len(both) < 2:
        return ArmDifference(a, b, point, None, dropped, f"{len(both)} paired seed(s), and it needs at least 2")
    interval = paired_t_interval([a.by_seed[seed] - b.by_seed[seed] for seed in both])
    return ArmDifference(a, b, point, interval, dropped)
