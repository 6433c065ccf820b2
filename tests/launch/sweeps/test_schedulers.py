"""Schedulers without a cluster: Tune's own rungs, over trials that may be compared."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from crate_ray.config import Domain
from crate_ray.config.sweep import SchedulerConfig
from crate_ray.launch.sweeps.schedulers import Entry, GroupedScheduler, perturbed, size_bounds, size_class

pytestmark = pytest.mark.filterwarnings("default")  # Ray's own


@dataclass(eq=False)
class FakeTrial:
    """What schedulers ask of a Tune trial."""

    trial_id: str
    config: dict[str, Any]
    status: str = Trial.RUNNING
    is_saving: bool = False

    def should_recover(self) -> bool:
        return False


@dataclass
class FakeController:
    """What schedulers ask of the controller."""

    trials: list[FakeTrial] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    _actor_force_cleanup_timeout: float = 10.0
    search_alg: object = "a searcher, which PBT would refuse"

    def get_trials(self) -> list[FakeTrial]:
        return self.trials

    def get_live_trials(self) -> list[FakeTrial]:
        return [trial for trial in self.trials if trial.status != Trial.TERMINATED]

    def stop_trial(self, trial: FakeTrial) -> None:
        self.stopped.append(trial.trial_id)
        trial.status = Trial.TERMINATED


def scheduler_of(config: SchedulerConfig, **arguments: Any) -> GroupedScheduler:
    return GroupedScheduler(
        config, metric="eval_loss", entry_of=lambda given: Entry(given["group"], given["steps"]), **arguments
    )


def add(scheduler: GroupedScheduler, controller: FakeController, name: str, group: str = "a", steps: int = 900) -> FakeTrial:
    trial = FakeTrial(name, {"group": group, "steps": steps})
    controller.trials.append(trial)
    scheduler.on_trial_add(controller, trial)
    return trial


def report(scheduler: GroupedScheduler, controller: FakeController, trial: FakeTrial, step: int, loss: float) -> str:
    return scheduler.on_trial_result(controller, trial, {"step": step, "eval_loss": loss})


ASHA = SchedulerConfig(type="asha", grace_steps=100, reduction_factor=3)


def test_asha_keeps_the_best_third_of_those_that_came_before() -> None:
    scheduler, controller = scheduler_of(ASHA), FakeController()
    losses = [0.5, 0.9, 0.4, 0.6, 0.3, 0.35]
    decisions = [
        report(scheduler, controller, add(scheduler, controller, str(number)), 100, loss) for number, loss in enumerate(losses)
    ]
    # Numpy's percentile is the independent formula: a trial stops when it is below the best third of the earlier ones.
    for number, (loss, decision) in enumerate(zip(losses, decisions, strict=True)):
        earlier = [-value for value in losses[:number]]
        stops = bool(earlier) and -loss < np.percentile(earlier, 100 * (1 - 1 / 3))
        assert (decision == TrialScheduler.STOP) == stops, number


def test_groups_are_never_compared() -> None:
    scheduler, controller = scheduler_of(ASHA), FakeController()
    assert report(scheduler, controller, add(scheduler, controller, "small", "small"), 100, 0.1) == TrialScheduler.CONTINUE
    assert report(scheduler, controller, add(scheduler, controller, "large", "large"), 100, 0.9) == TrialScheduler.CONTINUE
    assert report(scheduler, controller, add(scheduler, controller, "other", "small"), 100, 0.9) == TrialScheduler.STOP


def test_a_primed_scheduler_decides_as_one_that_saw_the_trials() -> None:
    seen, primed, controller = scheduler_of(ASHA), scheduler_of(ASHA), FakeController()
    for name, losses in {"a": {100: 0.5, 200: 0.4, 300: 0.3}, "b": {100: 0.7}, "c": {100: 0.4, 200: 0.35, 300: 0.32}}.items():
        trial = add(seen, controller, name)
        for step, loss in losses.items():
            report(seen, controller, trial, step, loss)
        primed.prime(name, Entry("a", 900), [{"step": step, "eval_loss": loss} for step, loss in losses.items()])
    assert seen.rungs() == primed.rungs() == {"a": [(900.0, 0), (300.0, 2), (100.0, 3)]}
    for step, loss in ((100, 0.41), (300, 0.31)):
        one, other = add(seen, controller, f"x{step}"), add(primed, controller, f"x{step}")
        assert report(seen, controller, one, step, loss) == report(primed, controller, other, step, loss)


def test_repeated_reports_of_a_trial_that_was_started_again_count_once() -> None:
    scheduler, controller = scheduler_of(SchedulerConfig(type="median", grace_steps=100)), FakeController()
    trial = add(scheduler, controller, "a")
    for step, loss in ((100, 0.5), (200, 0.4), (100, 9.0), (200, 9.0), (300, 0.3)):
        report(scheduler, controller, trial, step, loss)
    inner: Any = scheduler._groups["a"]
    assert [(result["step"], result["eval_loss"]) for result in inner._results[trial]] == [(100, 0.5), (200, 0.4), (300, 0.3)]


def test_the_median_rule_stops_what_is_worse_than_the_median_and_never_pauses() -> None:
    scheduler, controller = scheduler_of(SchedulerConfig(type="median", grace_steps=100)), FakeController()
    for number, loss in enumerate((0.3, 0.5, 0.7)):
        scheduler.prime(f"past{number}", Entry("a", 900), [{"step": step, "eval_loss": loss} for step in (100, 200)])
    assert report(scheduler, controller, add(scheduler, controller, "good"), 100, 0.4) == TrialScheduler.CONTINUE
    assert report(scheduler, controller, add(scheduler, controller, "bad"), 100, 0.6) == TrialScheduler.STOP


def hyperband(*, is_closed: bool) -> GroupedScheduler:
    return scheduler_of(SchedulerConfig(type="hyperband", grace_steps=100), is_closed=lambda: is_closed)


def test_a_hyperband_bracket_waits_until_it_is_whole() -> None:
    scheduler, controller = hyperband(is_closed=False), FakeController()
    # max_t 3 graces, eta 3: the first bracket has two trials that run to the end, the second three that are judged at one.
    first = [add(scheduler, controller, f"first{number}", steps=300) for number in range(2)]
    assert [report(scheduler, controller, trial, 100, 0.5) for trial in first] == [TrialScheduler.CONTINUE] * 2
    second = [add(scheduler, controller, f"second{number}", steps=300) for number in range(2)]
    for trial in second:
        assert report(scheduler, controller, trial, 100, 0.5) == TrialScheduler.PAUSE
        trial.status = Trial.PAUSED
    assert scheduler.choose_trial_to_run(controller) is None
    last = add(scheduler, controller, "last", steps=300)
    assert report(scheduler, controller, last, 100, 0.1) == TrialScheduler.CONTINUE  # the best of three
    assert controller.stopped == ["second0", "second1"]


def test_a_hyperband_bracket_that_will_never_be_whole_is_judged_as_it_is() -> None:
    scheduler, controller = hyperband(is_closed=True), FakeController()
    for number in range(2):
        add(scheduler, controller, f"first{number}", steps=300).status = Trial.TERMINATED
    trials = [add(scheduler, controller, f"t{number}", steps=300) for number in range(2)]
    assert report(scheduler, controller, trials[0], 100, 0.5) == TrialScheduler.PAUSE
    trials[0].status = Trial.PAUSED
    scheduler.on_trial_error(controller, trials[1])  # the only one that still ran
    trials[1].status = Trial.ERROR
    assert scheduler.choose_trial_to_run(controller) is trials[0]


def test_a_paused_trial_waits_for_room() -> None:
    scheduler = scheduler_of(SchedulerConfig(), room=lambda: 1)
    controller = FakeController()
    running, paused = add(scheduler, controller, "running"), add(scheduler, controller, "paused")
    paused.status = Trial.PAUSED
    assert scheduler.choose_trial_to_run(controller) is None
    assert scheduler.num_paused == 1
    running.status = Trial.TERMINATED
    assert scheduler.choose_trial_to_run(controller) is paused


@pytest.mark.parametrize(
    "domain",
    [
        Domain(grid=(1, 2, 4, 8)),
        Domain(uniform=(0.5, 2.0)),
        Domain(loguniform=(1e-4, 1e-2)),
        Domain(quantized=(2, 10, 2)),
    ],
)
def test_perturbed_values_lie_in_their_domain(domain: Domain) -> None:
    generator = np.random.default_rng(0)
    value: Any = None
    for _ in range(200):
        value = perturbed(domain, value, generator)
        if domain.grid:
            assert value in domain.grid
        elif domain.quantized:
            assert value in (2, 4, 6, 8, 10)
        else:
            lowest, highest = domain.uniform or domain.loguniform or (math.nan, math.nan)
            assert lowest <= value <= highest


def test_classes_of_size_have_equal_counts() -> None:
    sizes = [float(size) for size in range(1, 10)]
    bounds = size_bounds(sizes, 3)
    assert [size_class(size, bounds) for size in sizes] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_points_of_one_size_are_one_class() -> None:
    assert size_bounds([5.0] * 6, 3) == []
    assert size_bounds([], 3) == []
