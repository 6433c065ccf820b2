"""Which keys decided the objective: functional ANOVA over the finished screening trials of an arm.

In: rows. Out: the share of the objective's variance that each key explains alone. Optuna's evaluator (Hutter, Hoos and
Leyton-Brown 2014) fits a random forest to an in-memory study made of the rows. A number enters as its place among the values
that were tried, so that importance is over what was tried and not over a range that few trials lie in. It describes the
search, not the world: a key tried over a narrow range decides little.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from crate_ray.analysis.ranking import free_keys
from crate_ray.config import SweepConfig
from crate_ray.runs import TrialRow

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

MIN_TRIALS = 4
_SEED = 0


@dataclass(frozen=True)
class Importance:
    """Shares of variance by key, largest first; what is left to 1 is interaction. Or `why_not`, where nothing can be said."""

    arm: str
    num_trials: int
    shares: Mapping[str, float] = field(default_factory=dict)
    why_not: str | None = None


def importances(rows: Sequence[TrialRow], sweep: SweepConfig, arm: str) -> Importance:
    """Importance of every key that varies by itself in an arm, for the sweep's first objective.

    Keys that follow another one, or that a solver chose, say nothing of their own and are left out.
    """
    objective = sweep.objective[0]
    usable = [row for row in rows if row.arm == arm and row.stage == "screen" and row.state == "FINISHED"]
    usable = [row for row in usable if math.isfinite(_value(row, objective))]
    values = {key: [row.values.get(key) for row in usable] for key in free_keys(sweep, arm)}
    varying = {key: tried for key, tried in values.items() if len({repr(value) for value in tried}) > 1}
    distinct = {repr([tried[index] for tried in varying.values()]) for index in range(len(usable))}
    if len(distinct) < MIN_TRIALS:
        return Importance(arm, len(usable), why_not=f"{len(distinct)} distinct finished trials; it needs {MIN_TRIALS}")
    if len(varying) < 2:
        return Importance(arm, len(usable), why_not=f"only {', '.join(varying)} varies; it needs two keys")
    if objective == "eval_loss" and len({repr(sorted(row.loss_target.items())) for row in usable}) > 1:
        return Importance(arm, len(usable), why_not="its trials' losses answer different questions")
    measured = [_value(row, objective) for row in usable]
    if len(set(measured)) == 1:
        return Importance(arm, len(usable), why_not="every trial has the same value")
    return Importance(arm, len(usable), shares=_fanova(varying, measured))


def _value(row: TrialRow, objective: str) -> float:
    value = row.value_of(objective)
    return math.nan if value is None else value


def _fanova(values: Mapping[str, Sequence[Any]], measured: Sequence[float]) -> dict[str, float]:
    import optuna

    coded = {key: _coded(tried) for key, tried in values.items()}
    distributions = {key: distribution for key, (_, distribution) in coded.items()}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it announces every study
    try:
        study = optuna.create_study()
        for index, value in enumerate(measured):
            params = {key: codes[index] for key, (codes, _) in coded.items()}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
        found = optuna.importance.FanovaImportanceEvaluator(seed=_SEED).evaluate(study)
        return {key: float(share) for key, share in found.items()}
    finally:
        optuna.logging.set_verbosity(verbosity)


def _coded(values: Sequence[Any]) -> tuple[list[Any], "BaseDistribution"]:
    """Numbers by their place among those tried, anything else as a category."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        order = sorted(set(values))
        return [order.index(value) for value in values], IntDistribution(0, len(order) - 1)
    names = [repr(value) for value in values]
    return names, CategoricalDistribution(sorted(set(names)))
