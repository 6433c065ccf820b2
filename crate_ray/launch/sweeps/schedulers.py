"""Which trials stop early, or are replaced: Tune's own schedulers, each over trials that may be compared.

In: the scheduler of a sweep, the group and length of each trial, and what those reported that ended in earlier sessions. Out:
one Tune scheduler that hands every trial to the scheduler of its group. The rungs are Tune's; what is ours closes its traps: a
report counts once although a trial that is started again repeats it, a HyperBand bracket is judged only when it is whole and
never waits for a trial that is gone, and a population keeps who is who.
"""

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.schedulers.hyperband import _Bracket

from crate_ray.config import LARGER_IS_BETTER, Domain
from crate_ray.config.sweep import SchedulerConfig
from crate_ray.space.domains import draw_value, list_values, round_digits

TIME = "step"
RESAMPLE_PROBABILITY = 0.25  # of a perturbed key: a fresh draw instead of a neighbour, as in the paper of PBT
FACTORS = (0.8, 1.2)
DIGITS = 6
Report = Mapping[str, float]


@dataclass(frozen=True)
class Entry:
    """What a scheduler must know of a trial.

    Attributes:
        group: Trials of other groups are never compared with it.
        total_steps: Steps of the whole trial.
    """

    group: str
    total_steps: int


@dataclass(frozen=True)
class PastTrial:
    """A trial that ended in an earlier session, as far as a scheduler looks at it."""

    trial_id: str


class GroupedScheduler(TrialScheduler):
    """One scheduler a group.

    Args:
        config: Of the sweep.
        metric: What trials are judged by.
        entry_of: The Entry of a trial, from the configuration that Tune starts it with.
        is_closed: Whether no more trials will be added.
        room: How many trials may hold resources, where Tune does not see what they hold; None where it does.
        actor_grace_s: How long an actor may take to write its checkpoint when the experiment ends; Tune gives it ten seconds.
        seed: Of the draws of a population.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        metric: str,
        entry_of: Callable[[Mapping[str, Any]], Entry],
        is_closed: Callable[[], bool] = lambda: False,
        room: Callable[[], int] | None = None,
        actor_grace_s: float = 10.0,
        seed: int = 0,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._config, self._judged_by, self._entry_of = config, metric, entry_of
        self._metric = metric  # of the base class, which Tune reads
        self._is_closed, self._room = is_closed, room
        self._actor_grace_s, self._seed = actor_grace_s, seed
        self._groups: dict[str, TrialScheduler] = {}
        self._entries: dict[str, Entry] = {}
        self._last_step: dict[str, float] = {}
        self.num_paused = 0

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """See TrialScheduler: all is known already."""
        return True

    @property
    def learns_from_the_past(self) -> bool:
        """Whether `prime` is of use: a bracket of HyperBand and a population are made of the trials that go on."""
        return self._config.type in ("asha", "median")

    def prime(self, name: str, entry: Entry, reports: Sequence[Report]) -> None:
        """Takes in a trial that ended in an earlier session, so that rungs hold what they held.

        Args:
            name: The trial's id.
            entry: The trial.
            reports: `step` and objectives, in order.
        """
        scheduler: Any = self._scheduler(entry)
        trial = PastTrial(name)
        scheduler.on_trial_add(None, trial)
        for report in reports:
            if self._config.type == "asha":
                scheduler.on_trial_result(None, trial, dict(report))
            else:  # on_trial_result would note a stop that nobody carries out; this one only takes the values in
                scheduler.on_trial_complete(None, trial, dict(report))

    def on_trial_add(self, controller: Any, trial: Trial) -> None:
        """See TrialScheduler. One that failed and is started again is known already."""
        if trial.trial_id in self._entries:
            return
        owner = getattr(controller, "_tune_controller", controller)
        owner._actor_force_cleanup_timeout = max(owner._actor_force_cleanup_timeout, self._actor_grace_s)
        entry = self._entries[trial.trial_id] = self._entry_of(trial.config)
        self._scheduler(entry).on_trial_add(self._view(controller, entry.group), trial)

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """See TrialScheduler. A clone of a population may go back in steps; every other trial only repeats itself then."""
        if TIME not in result or self._judged_by not in result:
            return TrialScheduler.CONTINUE
        if self._config.type != "pbt" and result[TIME] <= self._last_step.get(trial.trial_id, 0):
            return TrialScheduler.CONTINUE
        self._last_step[trial.trial_id] = result[TIME]
        entry = self._entries[trial.trial_id]
        decision: str = self._scheduler(entry).on_trial_result(
            self._view(controller, entry.group), trial, self._in_units(result)
        )
        return decision

    def on_trial_complete(self, controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """See TrialScheduler."""
        entry = self._forget(trial)
        if TIME in result and self._judged_by in result:
            result = self._in_units(result)
        elif self._config.type == "median":
            return
        self._scheduler(entry).on_trial_complete(self._view(controller, entry.group), trial, result)

    def on_trial_remove(self, controller: Any, trial: Trial) -> None:
        """See TrialScheduler."""
        entry = self._forget(trial)
        self._scheduler(entry).on_trial_remove(self._view(controller, entry.group), trial)

    def on_trial_error(self, controller: Any, trial: Trial) -> None:
        """See TrialScheduler. One that is started again keeps its place."""
        if trial.should_recover():  # type: ignore[no-untyped-call]
            return
        entry = self._forget(trial)
        self._scheduler(entry).on_trial_error(self._view(controller, entry.group), trial)

    def choose_trial_to_run(self, controller: Any) -> Trial | None:
        """See TrialScheduler. A paused trial goes on only where there is room for it."""
        live = controller.get_live_trials()
        self.num_paused = sum(trial.status == Trial.PAUSED for trial in live)
        holding = sum(trial.status in (Trial.PENDING, Trial.RUNNING) for trial in live)
        is_full = self._room is not None and holding >= self._room()
        for group, scheduler in self._groups.items():
            trial = scheduler.choose_trial_to_run(self._view(controller, group))
            if trial is None or (is_full and trial.status == Trial.PAUSED):
                continue
            self.num_paused -= trial.status == Trial.PAUSED
            return trial
        return None

    def debug_string(self) -> str:
        """See TrialScheduler."""
        return "\n".join(f"{group}: {scheduler.debug_string()}" for group, scheduler in self._groups.items())

    def rungs(self) -> dict[str, list[tuple[float, int]]]:
        """asha: of each group the rungs with the number of trials that reached them, highest first."""
        return {
            group: [(milestone, len(reached)) for milestone, reached in scheduler._brackets[0]._rungs]
            for group, scheduler in self._groups.items()
            if isinstance(scheduler, AsyncHyperBandScheduler)
        }

    def _forget(self, trial: Trial) -> Entry:
        self._last_step.pop(trial.trial_id, None)
        return self._entries.pop(trial.trial_id)

    def _in_units(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """HyperBand counts from 1 up: its unit is the grace period."""
        if self._config.type != "hyperband":
            return dict(result)
        return {**result, TIME: result[TIME] / (self._config.grace_steps or 1)}

    def _view(self, controller: Any, group: str) -> Any:
        return _GroupView(controller, lambda trial: self._entries.get(trial.trial_id, _NOWHERE).group == group)

    def _scheduler(self, entry: Entry) -> TrialScheduler:
        if entry.group not in self._groups:
            self._groups[entry.group] = self._make(entry.total_steps)
        return self._groups[entry.group]

    def _make(self, total_steps: int) -> TrialScheduler:
        config, metric = self._config, self._judged_by
        mode = "max" if LARGER_IS_BETTER[metric] else "min"
        grace = config.grace_steps or 1
        if config.type == "asha":
            return AsyncHyperBandScheduler(
                time_attr=TIME,
                metric=metric,
                mode=mode,
                max_t=max(total_steps, grace),
                grace_period=grace,
                reduction_factor=config.reduction_factor,
                stop_last_trials=False,
            )
        if config.type == "median":
            return MedianStoppingRule(
                time_attr=TIME,
                metric=metric,
                mode=mode,
                grace_period=grace,
                min_time_slice=sys.maxsize,  # never pauses
            )
        if config.type == "hyperband":
            return _WholeHyperBand(
                self._is_closed,
                time_attr=TIME,
                metric=metric,
                mode=mode,
                max_t=max(1, total_steps // grace),
                reduction_factor=config.reduction_factor,
                stop_last_trials=False,
            )
        if config.type == "pbt":
            return _Population(config, seed=self._seed + len(self._groups), metric=metric, mode=mode)
        return FIFOScheduler()  # type: ignore[no-untyped-call]


_NOWHERE = Entry("", 0)


class _GroupView:
    """The controller as the scheduler of one group sees it: with the trials of that group alone.

    It shows no search algorithm either: PBT refuses any, even one that only hands out what was planned.
    """

    search_alg = None

    def __init__(self, controller: Any, is_member: Callable[[Any], bool]) -> None:
        self._controller, self._is_member = controller, is_member

    def get_trials(self) -> list[Any]:
        return [trial for trial in self._controller.get_trials() if self._is_member(trial)]

    def get_live_trials(self) -> list[Any]:
        return [trial for trial in self._controller.get_live_trials() if self._is_member(trial)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._controller, name)


class _WholeBracket(_Bracket):
    """A bracket that is judged when all its trials are there, and none of them waits for a second start."""

    is_closed: Callable[[], bool]

    def cur_iter_done(self) -> bool:
        is_whole = len(self._all_trials) >= self._n0 or self.is_closed()
        return is_whole and all(trial.status != Trial.PENDING for trial in self._live_trials) and super().cur_iter_done()


class _WholeHyperBand(HyperBandScheduler):
    """HyperBand over trials that come one by one.

    Tune's own judges a bracket as soon as the trials that are there have reached the milestone, even a single one; and once
    it has judged one it waits for ever when the last trial that runs in it fails.
    """

    def __init__(self, is_closed: Callable[[], bool], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._is_closed = is_closed

    def _create_bracket(self, s: int) -> _Bracket:
        bracket = _WholeBracket(
            time_attr=self._time_attr,
            max_trials=self._get_n0(s),  # type: ignore[no-untyped-call]
            init_t_attr=self._get_r0(s),  # type: ignore[no-untyped-call]
            max_t_attr=self._max_t_attr,
            eta=self._eta,
            s=s,
            stop_last_trials=self._stop_last_trials,
        )
        bracket.is_closed = self._is_closed
        return bracket

    def choose_trial_to_run(self, controller: Any) -> Trial | None:
        """See TrialScheduler. Judges the brackets in which every trial waits."""
        brackets: list[Any] = [bracket for band in self._hyperbands for bracket in band if bracket is not None]
        for bracket in brackets:
            trials = bracket.current_trials()
            waits = all(t.status == Trial.PAUSED and t not in bracket.trials_to_unpause for t in trials)
            if trials and waits and bracket.cur_iter_done():
                self._process_bracket(controller, bracket)
        trial: Trial | None = super().choose_trial_to_run(controller)
        return trial


class _Population(PopulationBasedTraining):
    """PBT whose clones stay themselves: they take weights and values from their donor, not its folder or seed.

    All meet at every interval: trials that start seconds apart may otherwise never train at the same time, and then nobody
    copies anybody. Tune's own waits for ever when the last one that the others wait for fails; here they go on.
    """

    def __init__(self, config: SchedulerConfig, *, seed: int, metric: str, mode: str) -> None:
        assert config.interval_steps is not None
        super().__init__(
            time_attr=TIME,
            metric=metric,
            mode=mode,
            perturbation_interval=config.interval_steps,
            quantile_fraction=config.quantile,
            custom_explore_fn=dict,  # _get_new_config is ours; the constructor wants one of two
            log_config=False,
            synch=True,
        )
        self._perturb = config.perturb
        self._generator = np.random.default_rng(seed)

    def choose_trial_to_run(self, controller: Any) -> Trial | None:
        """See TrialScheduler. Where all wait and nobody is left to come, the next interval begins."""
        live = controller.get_live_trials()
        waits = bool(live) and all(
            trial.status == Trial.PAUSED and self._trial_state[trial].last_train_time >= self._next_perturbation_sync
            for trial in live
        )
        if waits:
            self._next_perturbation_sync += self._perturbation_interval
        trial: Trial | None = super().choose_trial_to_run(controller)
        return trial

    def _get_new_config(self, trial: Trial, trial_to_clone: Trial) -> tuple[dict[str, Any], dict[str, Any]]:
        donor = trial_to_clone.config
        values = {**donor["point"]["values"], **donor["set"]}
        drawn = {key: perturbed(domain, values.get(key), self._generator) for key, domain in self._perturb.items()}
        return {**copy.deepcopy(trial.config), "set": {**values, **drawn}}, {}


def perturbed(domain: Domain, value: Any, generator: np.random.Generator) -> Any:
    """A value near another one, or now and then a fresh draw; always one that the domain has.

    Args:
        domain: Of the key.
        value: The donor's; None where it has none.
        generator: Where the chance comes from.
    """
    if value is None or generator.random() < RESAMPLE_PROBABILITY:
        return draw_value(domain, generator.random())
    bounds = domain.uniform or domain.loguniform
    if bounds is not None:
        return min(max(round_digits(value * float(generator.choice(FACTORS)), DIGITS), bounds[0]), bounds[1])
    listed = list_values(domain)
    near = listed.index(value) + int(generator.choice((-1, 1)))
    return listed[min(max(near, 0), len(listed) - 1)]


def size_bounds(params_m: Sequence[float], num_classes: int) -> list[float]:
    """Limits between classes of size with equally many points, ascending; sizes that are equal stay in one class.

    Args:
        params_m: Parameters of the planned points.
        num_classes: How many classes.
    """
    ordered = sorted(params_m)
    cuts = [ordered[len(ordered) * number // num_classes] for number in range(1, num_classes)] if ordered else []
    return sorted({cut for cut in cuts if cut > ordered[0]})


def size_class(params_m: float, bounds: Sequence[float]) -> int:
    """The class of a size, from 0; a size equal to a limit lies above it."""
    return sum(params_m >= bound for bound in bounds)
