"""How far the trials of a sweep get on average, before any of them has started.

In: the scheduler, the steps of a whole trial, and how many trials compete. Out: mean steps a trial, the share that comes to the
end, and the least and most that the scheduler could train. Trials are taken to be judged in random order, good ones as likely
early as late, and to keep their rank at later rungs only by chance; a search that learns brings better trials late, which
then stop less often. With a median rule the number depends on the curves themselves, so a half that stops is assumed.
"""

import math
from dataclasses import dataclass

from crate_ray.config.sweep import SchedulerConfig

MEDIAN_STOPS = 0.5
"""Share of the trials that a median rule is assumed to stop, on average halfway between its grace period and the end."""


@dataclass(frozen=True)
class ExpectedSteps:
    """Steps of a trial, on average over the trials.

    Attributes:
        least: When all that can stop stop at their first rung.
        mean: On average over the order of the trials.
        most: When none stops.
        finished: Share of the trials that come to the end, on average.
        passed: Of each rung, lowest first, the share of the trials that go on from it, on average; empty but for asha.
    """

    least: float
    mean: float
    most: float
    finished: float
    passed: tuple[float, ...] = ()


def expected_steps(scheduler: SchedulerConfig, *, total_steps: int, trials: float, report_every: int) -> ExpectedSteps:
    """What a scheduler lets its trials train.

    Args:
        scheduler: Of the sweep.
        total_steps: Of a trial that is not stopped.
        trials: How many are compared with each other: of one class of size, where classes are.
        report_every: Steps between two reports; a rung between two reports is judged at the later one. 1 where every rung is
            judged at the end of a run of its own.
    """
    grace = scheduler.grace_steps or report_every
    if scheduler.type in ("none", "pbt") or grace >= total_steps or trials <= 1:
        return ExpectedSteps(total_steps, total_steps, total_steps, 1.0)
    if scheduler.type == "hyperband":
        return _hyperband(scheduler.reduction_factor, grace, total_steps)
    first = _reported(grace, report_every)
    least = (first * (trials - 1) + total_steps) / trials  # the first trial has no rival
    if scheduler.type == "median":
        mean = total_steps - MEDIAN_STOPS * (total_steps - first) / 2
        return ExpectedSteps(least, max(least, mean), total_steps, 1 - MEDIAN_STOPS)
    return _asha(scheduler.reduction_factor, grace, total_steps, trials, report_every, least)


def rungs(grace_steps: int, reduction_factor: float, total_steps: int) -> list[int]:
    """Steps at which trials are judged, ascending, without the end: grace x factor^k, rounded up to whole steps."""
    steps, number = set[int](), 0
    while (milestone := grace_steps * reduction_factor**number) < total_steps:
        steps.add(math.ceil(milestone))
        number += 1
    return sorted(steps - {total_steps})


def survivors(trials: float, reduction_factor: float) -> float:
    """How many of these trials pass a rung of ASHA, on average over their order.

    Each is compared with the m that were judged before it, and passes when it reaches their (1 - 1/factor) quantile, which lies
    at place q = (1 - 1/factor)(m - 1) of their order, counted from 0: of the m + 1 places that a newcomer takes with
    equal chance, m - q are above. The first passes always, so few trials are thinned out less than by the factor.

    Args:
        trials: Those that reach the rung; a fraction counts the next one in part.
        reduction_factor: One in so many goes on, in the long run.
    """
    whole = math.floor(trials)
    passed = sum(_passes(judged, reduction_factor) for judged in range(whole))
    return passed + (trials - whole) * _passes(whole, reduction_factor)


def _passes(judged: int, factor: float) -> float:
    return 1.0 if judged == 0 else (judged - (1 - 1 / factor) * (judged - 1)) / (judged + 1)


def _asha(factor: float, grace: int, total: int, trials: float, report_every: int, least: float) -> ExpectedSteps:
    judged_at = [step for rung in rungs(grace, factor, total) if (step := _reported(rung, report_every)) < total]
    left, reached, steps, passed = trials, 0, 0.0, []
    for rung in judged_at:
        steps += left * (rung - reached)
        left, reached = survivors(left, factor), rung
        passed.append(left / trials)
    steps += left * (total - reached)
    return ExpectedSteps(min(least, steps / trials), steps / trials, total, left / trials, tuple(passed))


def _hyperband(factor: float, grace: int, total: int) -> ExpectedSteps:
    """Mean over the brackets s, each as often as it has trials: n(s) = ceil((S + 1) / (s + 1) factor^s), first judged at
    total / factor^s, where one in `factor` goes on (Li et al. 2018, algorithm 1).
    """
    most_rungs = int(math.log(max(1, total // grace), factor) + 1e-9)
    share = [math.ceil((most_rungs + 1) / (s + 1) * factor**s) for s in range(most_rungs + 1)]
    steps = [_halving(factor, total, s) for s in range(most_rungs + 1)]
    weight = sum(share)
    mean = sum(n * mean_steps for n, (mean_steps, _) in zip(share, steps, strict=True)) / weight
    finished = sum(n * end for n, (_, end) in zip(share, steps, strict=True)) / weight
    return ExpectedSteps(steps[-1][0], mean, total, finished)


def _halving(factor: float, total: int, num_rungs: int) -> tuple[float, float]:
    """Mean steps of successive halving with so many rungs, and the share that comes to the end."""
    reached, left, steps = 0.0, 1.0, 0.0
    for k in range(num_rungs, 0, -1):
        rung = total / factor**k
        steps += left * (rung - reached)
        left, reached = left / factor, rung
    return steps + left * (total - reached), left


def _reported(step: float, report_every: int) -> int:
    return math.ceil(step / report_every - 1e-9) * report_every
