"""Everything that the analysis makes of a sweep's rows, made once: the report and the screens show the same findings.

In: the sweep and its rows. Out: ranking, confirmed means and differences, Pareto fronts, importance.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from crate_ray.analysis.confirmed import ArmDifference, Confirmed, confirmed, differences
from crate_ray.analysis.importance import Importance, importances
from crate_ray.analysis.pareto import front
from crate_ray.analysis.ranking import Ranking, rank, same_question
from crate_ray.config import SweepConfig
from crate_ray.runs import TrialRow

_COSTS = ("encoder_params_m", "gflops")


@dataclass(frozen=True)
class Front:
    """The candidates on a Pareto front: confirmed configurations where the sweep confirms, else finished screening trials.

    Where losses are among the objectives, candidates are from one question; `target` says which, where there are several.
    """

    objectives: tuple[str, ...]
    target: dict[str, object]
    members: Sequence[TrialRow | Confirmed]
    num_candidates: int


@dataclass(frozen=True)
class SweepFindings:
    """What a sweep found. `arms` are those with trials, in the sweep's order."""

    sweep: SweepConfig
    rows: Sequence[TrialRow]
    arms: tuple[str, ...]
    ranking: Ranking
    confirmed: Sequence[Confirmed]
    differences: Sequence[ArmDifference]
    fronts: Sequence[Front]
    importances: Sequence[Importance]

    @property
    def num_open(self) -> int:
        """Trials that have not ended."""
        return sum(row.state in ("RUNNING", "KILLED") for row in self.rows)

    @property
    def has_confirmed(self) -> bool:
        """Whether there is a confirmed run with a value."""
        return any(item.by_seed for item in self.confirmed)

    def is_over(self, planned: int | None) -> bool:
        """Whether every trial has ended, and as many of the screening have started as were planned."""
        screened = sum(row.stage == "screen" for row in self.rows)
        return self.num_open == 0 and (planned is None or screened >= planned)


def sweep_findings(sweep: SweepConfig, rows: Sequence[TrialRow]) -> SweepFindings:
    """Makes the findings; rows may be of a sweep that is still going on."""
    present = dict.fromkeys(row.arm for row in rows)
    arms = tuple(dict.fromkeys([*(arm for arm in sweep.arms if arm in present), *present]))
    ranking = rank(rows, sweep)
    found = confirmed(rows, sweep, ranking)
    return SweepFindings(
        sweep,
        rows,
        arms,
        ranking,
        found,
        differences(found, sweep),
        [item for objectives in _fronts_of(sweep) for item in _fronts(rows, found, sweep, objectives)],
        [importances(rows, sweep, arm) for arm in arms],
    )


def _fronts_of(sweep: SweepConfig) -> list[tuple[str, ...]]:
    """The sweep's own objectives where it has several; the first one against size and against cost in any case."""
    against = [(sweep.objective[0], cost) for cost in _COSTS if cost != sweep.objective[0]]
    own = [sweep.objective] if len(sweep.objective) > 1 else []
    return list(dict.fromkeys([*own, *against]))


def _fronts(
    rows: Sequence[TrialRow], found: Sequence[Confirmed], sweep: SweepConfig, objectives: tuple[str, ...]
) -> list[Front]:
    """One front, or one for each question that the losses answer."""
    finished = [row for row in rows if row.stage == "screen" and row.state == "FINISHED"]
    candidates: list[TrialRow | Confirmed] = [*finished] if sweep.confirm is None else [item for item in found if item.rows]
    return [
        Front(objectives, target, front(group, objectives), len(group))
        for target, group in same_question(candidates, objectives)
    ]
