"""The planner of TPE and NSGA-II: Optuna suggests, each arm has a study of its own, all in one database beside the sweep.

In: a SweepConfig and the path of the database. Out: points, asked and told. Optuna sees independent keys only; dependents
follow, and suggestions that a constraint refuses are told as failed before they cost anything. A sampler is seeded by the
number of its trial, so that a later session does not repeat the first draws of an earlier one; the price is a new sampler for
each suggestion.
"""

import json
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from crate_ray.config import LARGER_IS_BETTER, ConfigError, Domain, SweepConfig
from crate_ray.space.arms import ArmSpace, arms
from crate_ray.space.constraints import parse_constraint
from crate_ray.space.costs import quantities
from crate_ray.space.domains import list_values, uniform_number
from crate_ray.space.matching import Match
from crate_ray.space.plan import Gate, draw, trials_per_arm
from crate_ray.space.point import Point, canonical

if TYPE_CHECKING:
    import optuna

_SUGGESTED_TRIES, _TRIES = 20, 100
"""Suggestions for one point that may be refused or known already: after the first number draws stand in for the search, which
may be sure of a point that it has; after the second the arm counts as used up."""
_LARGEST_POPULATION = 50
_SMALLEST_POPULATION = 4
_GENERATIONS = 5


class StudyPlanner:
    """Asks Optuna; see `Planner`."""

    def __init__(self, sweep: SweepConfig, num_samples: int | None, *, study_path: str | None) -> None:
        names = list(arms(sweep))
        limits = trials_per_arm(sweep, names)
        with _quiet():
            storage = _open_storage(study_path)
            self._arms = {name: _ArmStudy(sweep, name, num_samples, storage, limits[name] or 0) for name in names}
        self.total: int | None = sweep.budget.trials
        self.refused: Counter[str] = Counter()
        self.matches: Sequence[Match] = ()

    @property
    def is_exhausted(self) -> bool:
        """See Planner."""
        return all(arm.is_exhausted for arm in self._arms.values())

    def ask(self) -> Point | None:
        """See Planner."""
        with _quiet():
            for arm in sorted(self._arms.values(), key=lambda arm: arm.num_asked):
                point = arm.ask(self.refused)
                if point is not None:
                    return point
        return None

    def tell(self, point: Point, values: Mapping[str, float]) -> None:
        """See Planner. A trial without one of the objectives teaches nothing and is told as failed."""
        with _quiet():
            self._arms[point.arm].tell(point, values)

    def tell_infeasible(self, point: Point, reason: str) -> None:
        """See Planner."""
        with _quiet():
            self._arms[point.arm].tell(point, None)

    def restore(self, done: Sequence[tuple[Point, Mapping[str, float] | None]]) -> None:
        """See Planner. What was asked and never ended is marked failed, and asked again before anything new."""
        with _quiet():
            for name, arm in self._arms.items():
                arm.restore([(point, values) for point, values in done if point.arm == name])


class _ArmStudy:
    """One arm: its study, and what is known of the points that it suggested."""

    def __init__(
        self, sweep: SweepConfig, arm: str, num_samples: int | None, storage: "optuna.storages.BaseStorage", limit: int
    ) -> None:
        import optuna

        self._sweep, self._limit = sweep, limit
        self._space = ArmSpace(sweep, arm, num_samples=num_samples)
        self._gate = Gate(self._space, [parse_constraint(text) for text in sweep.constraints])
        self._distributions = {key: _distribution(self._space.domains[key]) for key in self._space.independent}
        self._objectives = sweep.objective if sweep.search.method == "nsga2" else sweep.objective[:1]
        self._study = optuna.create_study(
            study_name=arm,
            storage=storage,
            directions=["maximize" if LARGER_IS_BETTER[name] else "minimize" for name in self._objectives],
            load_if_exists=True,
        )
        self._running: dict[str, int] = {}
        self._ended: dict[str, list[float] | None] = {}
        self._is_dry = False
        self.num_asked = 0

    @property
    def is_exhausted(self) -> bool:
        return self._is_dry or self.num_asked >= self._limit

    def ask(self, refused: Counter[str]) -> Point | None:
        """The next feasible point that was not tried yet."""
        for attempt in range(0 if self.is_exhausted else _TRIES):
            trial = self._suggest(at_random=attempt >= _SUGGESTED_TRIES)
            point, reason = self._point(trial.params)
            if reason is None and point.key not in self._ended and point.key not in self._running:
                self._running[point.key] = trial.number
                self.num_asked += 1
                return point
            refused.update([reason] if reason else [])
            self._tell_trial(trial.number, None)
        self._is_dry = True
        return None

    def tell(self, point: Point, values: Mapping[str, float] | None) -> None:
        numbers = self._numbers(point, values)
        self._ended[point.key] = numbers
        if point.key in self._running:
            self._tell_trial(self._running.pop(point.key), numbers)
        else:
            self._add(point, numbers)

    def restore(self, done: Sequence[tuple[Point, Mapping[str, float] | None]]) -> None:
        ended = {point.key: (point, values) for point, values in done}
        known: set[str] = set()
        for trial in self._study.get_trials(deepcopy=False):
            if self._distributions.keys() <= trial.params.keys():
                known.add(self._settle(trial, ended))
            elif trial.state.name == "RUNNING":  # killed before all of its values were drawn
                self._tell_trial(trial.number, None)
        for key, (point, values) in ended.items():
            self._ended[key] = self._numbers(point, values)
            if key not in known:
                self._add(point, self._ended[key])
        self.num_asked = len(ended)

    def _settle(self, trial: "optuna.trial.FrozenTrial", ended: Mapping[str, tuple[Point, Mapping[str, float] | None]]) -> str:
        """Ends what an earlier session left running: with its values, or failed and to be asked again. Returns its key."""
        point, reason = self._point(trial.params)
        if trial.state.name == "RUNNING":
            if point.key not in ended and reason is None:
                self._study.enqueue_trial(trial.params)
            self._tell_trial(trial.number, self._numbers(*ended[point.key]) if point.key in ended else None)
        return point.key

    def _suggest(self, *, at_random: bool) -> "optuna.Trial":
        number = len(self._study.get_trials(deepcopy=False))
        seed = int(uniform_number(self._sweep.search.seed, self._space.arm, number) * 2**32)
        if at_random:
            drawn = draw(self._sweep, self._space, number)
            self._study.enqueue_trial({key: _encoded(self._space.domains[key], value) for key, value in drawn.items()})
        self._study.sampler = _sampler(self._sweep.search.method, seed, self._limit)
        return self._study.ask(self._distributions)

    def _point(self, params: Mapping[str, Any]) -> tuple[Point, str | None]:
        """The point that Optuna's parameters stand for, and why it is refused."""
        chosen = {key: _decoded(self._space.domains[key], params[key]) for key in self._space.independent}
        seed = self._sweep.screen.seed
        try:
            point = Point(self._space.arm, self._space.resolve(chosen), seed)
        except ConfigError as error:
            return Point(self._space.arm, chosen, seed), str(error)
        refusal = self._gate.refusal(point)
        return point, refusal[0] if refusal else None

    def _numbers(self, point: Point, values: Mapping[str, float] | None) -> list[float] | None:
        """The objectives of a trial in order; None where one is missing or no number."""
        if values is None:
            return None
        known = {**quantities(self._space.config(point.values), num_samples=self._space.num_samples), **values}
        numbers = [known.get(name, math.nan) for name in self._objectives]
        return numbers if all(map(math.isfinite, numbers)) else None

    def _tell_trial(self, number: int, numbers: list[float] | None) -> None:
        from optuna.trial import TrialState

        if numbers is None:
            self._study.tell(number, state=TrialState.FAIL)
        else:
            self._study.tell(number, numbers)

    def _add(self, point: Point, numbers: list[float] | None) -> None:
        """A trial that the study has no record of: its database was lost, or is in memory."""
        from optuna.trial import TrialState, create_trial

        self._study.add_trial(
            create_trial(
                state=TrialState.FAIL if numbers is None else TrialState.COMPLETE,
                values=numbers,
                params={key: _encoded(self._space.domains[key], point.values[key]) for key in self._distributions},
                distributions=self._distributions,
            )
        )


def _open_storage(study_path: str | None) -> "optuna.storages.BaseStorage":
    import optuna
    from sqlalchemy.pool import NullPool

    if study_path is None:
        return optuna.storages.InMemoryStorage()
    # A connection for each statement: none is left open when the planner is dropped, or copied into another process.
    return optuna.storages.RDBStorage(f"sqlite:///{study_path}", engine_kwargs={"poolclass": NullPool})


def _sampler(method: str, seed: int, limit: int) -> "optuna.samplers.BaseSampler":
    """A sampler for one suggestion. NSGA-II gets a population small enough for several generations within the budget."""
    import optuna

    if method == "tpe":
        return optuna.samplers.TPESampler(multivariate=True, constant_liar=True, seed=seed)
    population = min(_LARGEST_POPULATION, max(_SMALLEST_POPULATION, limit // _GENERATIONS))
    return optuna.samplers.NSGAIISampler(population_size=population, seed=seed)


def _distribution(domain: Domain) -> "optuna.distributions.BaseDistribution":
    """What Optuna draws from; values of grid and choice as their JSON text, which keeps lists and types."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if domain.uniform is not None:
        return FloatDistribution(*domain.uniform)
    if domain.loguniform is not None:
        return FloatDistribution(*domain.loguniform, log=True)
    values = list_values(domain)
    if domain.quantized is None:
        return CategoricalDistribution([canonical(value) for value in values])
    if isinstance(values[0], int):
        return IntDistribution(values[0], values[-1], step=int(domain.quantized[2]))
    return IntDistribution(0, len(values) - 1) if len(values) > 1 else CategoricalDistribution([0])


def _decoded(domain: Domain, suggested: Any) -> Any:
    """The value of a key that a suggestion stands for."""
    if domain.grid is not None or domain.choice is not None:
        return json.loads(suggested)
    if domain.quantized is not None:
        values = list_values(domain)
        return suggested if isinstance(values[0], int) else values[suggested]
    return suggested


def _encoded(domain: Domain, value: Any) -> Any:
    """The inverse of `_decoded`."""
    if domain.grid is not None or domain.choice is not None:
        return canonical(value)
    if domain.quantized is not None:
        values = list_values(domain)
        return value if isinstance(values[0], int) else values.index(value)
    return value


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's log lines and its warnings about what is experimental."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
