"""What the searcher proposes: trials that fit into memory, in a form that they can read; the others are written down."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from crate_ray.config import SweepConfig
from crate_ray.config.sweep import TrialResources
from crate_ray.data import load_source
from crate_ray.launch.capacity import Capacity
from crate_ray.launch.cluster import worker_bytes
from crate_ray.launch.sweeps.budget import Budget
from crate_ray.launch.sweeps.roster import Roster
from crate_ray.launch.sweeps.searcher import PlannedSearch
from crate_ray.launch.sweeps.trial_session import TrialSpec
from crate_ray.runs import RunFolder, TrialRow, list_trials, write_trial
from crate_ray.space import make_planner
from crate_ray.space.point import Point


class Told:
    """The points of a planner, and what it was told of them."""

    def __init__(self, planner: Any) -> None:
        self._planner = planner
        self.refused: list[str] = []

    @property
    def is_exhausted(self) -> bool:
        return bool(self._planner.is_exhausted)

    def ask(self) -> Point | None:
        point: Point | None = self._planner.ask()
        return point

    def tell(self, point: Point, values: Mapping[str, float]) -> None:
        self._planner.tell(point, values)

    def tell_infeasible(self, point: Point, reason: str) -> None:
        self.refused.append(reason)
        self._planner.tell_infeasible(point, reason)


class Seen:
    """Who watches."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.ended: list[TrialRow] = []

    def trial_started(self, row: TrialRow, folder: RunFolder) -> None:
        self.started.append(row.id)

    def trial_ended(self, row: TrialRow) -> None:
        self.ended.append(row)


WIDTHS = {"model.width": {"grid": [64, 4096]}}


def search_of(
    digits: Path,
    tmp_path: Path,
    seen: Seen,
    points: list[Told] | None = None,
    *,
    space: Mapping[str, Any] = WIDTHS,
    **keys: Any,
) -> tuple[PlannedSearch, RunFolder]:
    """The search of a sweep; by default over two widths, the larger of which needs more than the 4 GiB that a worker has."""
    sweep = SweepConfig.parse(
        {
            "name": "sizes",
            "base": "digits_crate_mae",
            "set": {"data.train": f"{digits}/train", "data.eval": f"{digits}/validation", "storage.path": str(tmp_path)},
            "space": dict(space),
            "tune": {"optimizer.lr": {"grid": [1e-4, 1e-3]}},
            **keys,
        }
    )
    num_samples = int(load_source(f"{digits}/train").num_samples)
    folder = RunFolder(str(tmp_path / "sizes"))
    told = Told(make_planner(sweep, num_samples, study_path=None))
    if points is not None:
        points.append(told)
    search = PlannedSearch(
        told,
        over=[],
        roster=Roster(sweep, folder, num_samples=num_samples, parent_uid="0", worker_bytes=4 << 30),
        budget=Budget(sweep.budget, sweep.resources_per_trial),
        room=lambda: 9,
        is_stopping=lambda: False,
        watcher=seen,
    )
    return search, folder


def test_only_the_trials_that_fit_are_proposed(digits: Path, tmp_path: Path) -> None:
    told: list[Told] = []
    seen = Seen()
    search, folder = search_of(digits, tmp_path, seen, told)

    proposed = [search.suggest(name) for name in "abc"]

    assert [isinstance(config, dict) for config in proposed] == [True, True, False]
    assert len(seen.started) == 2
    rows = list_trials(folder.uri)
    assert [row.state for row in rows] == ["INFEASIBLE"] * 2
    assert {row.values["model.width"] for row in rows} == {4096}
    assert {row.id for row in seen.ended} == {row.id for row in rows}
    assert all(reason.startswith("needs about") and "a worker has 4.00 GiB" in reason for reason in told[0].refused)
    assert len(told[0].refused) == 2


@pytest.mark.parametrize(("cpus", "expected"), [(1.0, 8 << 30), (4.0, 32 << 30), (16.0, 64 << 30)])
def test_a_worker_has_its_part_of_the_largest_node(cpus: float, expected: int) -> None:
    small, large = {"CPU": 2.0, "memory": float(4 << 30)}, {"CPU": 8.0, "memory": float(64 << 30)}
    assert worker_bytes(TrialResources(cpus=cpus), Capacity((small, large))) == expected


def test_without_a_node_or_a_gpu_the_memory_is_not_known() -> None:
    assert worker_bytes(TrialResources(), Capacity(())) is None
    assert worker_bytes(TrialResources(gpus=1), Capacity(({"CPU": 8.0, "memory": float(64 << 30)},))) is None


def test_a_watcher_that_fails_ends_no_sweep(digits: Path, tmp_path: Path) -> None:
    class Broken(Seen):
        def trial_started(self, row: TrialRow, folder: RunFolder) -> None:
            raise OSError("the screen is gone")

    search, folder = search_of(digits, tmp_path, Broken())
    proposed = search.suggest("a")
    assert isinstance(proposed, dict)
    assert TrialSpec.parse(proposed).folder.startswith(folder.uri)
    assert TrialSpec.parse(proposed).run.model.width == 64
    assert not TrialSpec.parse(proposed).is_stopping()
    folder.write_json("stopping.json", {})
    assert TrialSpec.parse(proposed).is_stopping()


SMALL = {"model.width": {"grid": [64]}}


def test_a_point_that_makes_no_run_is_a_failed_trial_with_its_reason_and_the_others_are_proposed(
    digits: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "there.safetensors"
    weights.write_bytes(b"not read before the trial starts")
    told: list[Told] = []
    seen = Seen()
    space = {"train.init_from": {"choice": [str(tmp_path / "gone.safetensors"), str(weights)]}}
    search, folder = search_of(digits, tmp_path, seen, told, space=space)
    proposed = [search.suggest(name) for name in "abc"]
    assert [isinstance(config, dict) for config in proposed] == [True, True, False]
    rows = list_trials(folder.uri)
    assert [(row.state, row.values["train.init_from"]) for row in rows] == [("FAILED", str(tmp_path / "gone.safetensors"))] * 2
    assert all("gone.safetensors" in (row.reason or "") for row in rows)
    assert (len(seen.ended), len(seen.started), len(told[0].refused)) == (2, 2, 2)


class Silent(Told):
    """A study whose database is locked."""

    def __init__(self, planner: Any, times: int) -> None:
        super().__init__(planner)
        self.times = times

    def ask(self) -> Point | None:
        self.times -= 1
        if self.times >= 0:
            raise OSError("database is locked")
        return super().ask()

    def tell(self, point: Point, values: Mapping[str, float]) -> None:
        raise OSError("database is locked")


def test_a_study_that_does_not_answer_for_a_moment_is_asked_again(digits: Path, tmp_path: Path) -> None:
    search, _ = search_of(digits, tmp_path, Seen(), space=SMALL)
    search._planner = Silent(search._planner, 2)  # type: ignore[assignment]
    proposed = [search.suggest("a") for _ in range(3)]
    assert proposed[:2] == [None, None]
    assert isinstance(proposed[2], dict)
    assert search.failure is None


def test_a_study_that_never_answers_lets_the_running_trials_end_and_says_why(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crate_ray.launch.sweeps.searcher.SILENCE_S", 0.0)
    search, _ = search_of(digits, tmp_path, Seen(), space=SMALL)
    search._planner = Silent(search._planner, 99)  # type: ignore[assignment]
    assert search.suggest("a") == "FINISHED"
    assert search.is_closed
    assert search.failure == "the search gave no point for 0 s: OSError: database is locked"


def test_a_study_that_does_not_take_a_result_costs_nothing_of_the_trial(digits: Path, tmp_path: Path) -> None:
    seen = Seen()
    search, folder = search_of(digits, tmp_path, seen, space=SMALL)
    search._planner = Silent(search._planner, 0)  # type: ignore[assignment]
    started = started_trial(search, folder, "a", state="FINISHED")
    search.on_trial_complete("a", {"state": "FINISHED"})
    search.on_trial_complete("a", error=True)  # as Tune says it of a trial that it could not stop
    assert [(row.id, row.state) for row in seen.ended] == [(started.id, "FINISHED")]
    assert isinstance(search.suggest("b"), dict)


@pytest.mark.parametrize(
    ("result", "error", "state"),
    [(None, False, "STOPPED"), ({"state": "FINISHED"}, False, "FAILED"), (None, True, "FAILED")],
)
def test_a_trial_whose_own_word_is_lost_has_an_end_all_the_same(
    result: dict[str, Any] | None, error: bool, state: str, digits: Path, tmp_path: Path
) -> None:
    seen = Seen()
    search, folder = search_of(digits, tmp_path, seen, space=SMALL)
    started = started_trial(search, folder, "a", state="RUNNING")
    Path(folder.path("trials", started.id, "trial.json").removeprefix("file://")).write_text('{"half a')
    search.on_trial_complete("a", result, error=error)
    assert [(row.id, row.state) for row in list_trials(folder.uri)] == [(started.id, state)]
    assert [row.state for row in seen.ended] == [state]


def test_a_trial_that_was_over_when_its_process_died_stays_over(digits: Path, tmp_path: Path) -> None:
    seen = Seen()
    search, folder = search_of(digits, tmp_path, seen, space=SMALL)
    started_trial(search, folder, "a", state="FINISHED")
    search.on_trial_complete("a", error=True)
    assert [row.state for row in seen.ended] == ["FINISHED"]


def started_trial(search: PlannedSearch, folder: RunFolder, trial_id: str, *, state: Any) -> TrialRow:
    """A trial that was proposed, and wrote its state."""
    config = search.suggest(trial_id)
    assert isinstance(config, dict)
    trial = RunFolder(config["folder"])
    row = TrialRow(id=trial.name, arm="crate", seed=0, state=state, objectives={"eval_loss": 0.5})
    write_trial(trial, row)
    return row


def test_a_trial_of_a_population_goes_on_with_the_values_that_it_ended_an_earlier_session_with(
    digits: Path, tmp_path: Path
) -> None:
    pbt = {"type": "pbt", "population": 2, "interval_steps": 10, "perturb": {"optimizer.lr": {"loguniform": [1e-5, 1e-2]}}}
    keys = {"space": SMALL, "scheduler": pbt, "report_every_steps": 10}
    search, _ = search_of(digits, tmp_path, Seen(), **keys)
    config = search.suggest("a")
    assert isinstance(config, dict)
    assert config["set"] == {}
    clone = RunFolder(RunFolder(config["folder"]).path("gen_01"))
    clone.write_json("generation.json", {"donor": "another", "step": 10, "set": {"optimizer.lr": 2e-4}})
    later, _ = search_of(digits, tmp_path, Seen(), **keys)
    again = later.suggest("a")
    assert isinstance(again, dict)
    assert (again["folder"], again["set"]) == (config["folder"], {"optimizer.lr": 2e-4})
