"""The planners of TPE and NSGA-II: bounded, resumable, and each arm with a study of its own."""

import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest

from crate_ray.config import SweepConfig
from crate_ray.space import Planner, Point, make_planner, point_config, quantities

Make = Callable[..., SweepConfig]
KEYS: dict[str, Any] = {
    "search": {"method": "tpe", "seed": 5},
    "budget": {"trials": 10},
    "space": {"model.width": {"quantized": [32, 128, 32]}, "model.num_heads": {"of": "model.width", "times": 0.03125}},
    "tune": {"optimizer.lr": {"loguniform": [1e-4, 1e-2]}, "model.norm_pix_loss": {"choice": [True, False]}},
}


def loss(point: Point) -> dict[str, float]:
    """Best at the widest model and a rate of 1e-3."""
    return {"eval_loss": abs(math.log10(point.values["optimizer.lr"]) + 3) + 10 / point.values["model.width"]}


def run(planner: Planner, most: int = 1000) -> list[tuple[Point, Mapping[str, float] | None]]:
    done: list[tuple[Point, Mapping[str, float] | None]] = []
    while len(done) < most and (point := planner.ask()) is not None:
        done.append((point, loss(point)))
        planner.tell(point, loss(point))
    return done


def states(path: Path, arm: str) -> Counter[str]:
    study = optuna.load_study(study_name=arm, storage=f"sqlite:///{path}")
    return Counter(trial.state.name for trial in study.get_trials(deepcopy=False))


@pytest.fixture(autouse=True)
def quiet_optuna() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(scope="module")
def empty_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with Optuna's tables, which take it a second to make."""
    path = tmp_path_factory.mktemp("optuna") / "empty.db"
    optuna.storages.RDBStorage(f"sqlite:///{path}").engine.dispose()
    return path


@pytest.fixture
def study(empty_study: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(empty_study, tmp_path / "study.db"))


def test_suggestions_are_points_of_the_space_each_once_and_arms_in_turns(sweep_of: Make) -> None:
    planner = make_planner(sweep_of(**KEYS))
    points = [point for point, _ in run(planner)]
    assert planner.total == len(points) == len({point.key for point in points}) == 10
    assert [point.arm for point in points] == ["mae", "crate"] * 5
    for point in points:
        assert point.values["model.width"] in (32, 64, 96, 128)
        assert point.values["model.num_heads"] == point.values["model.width"] // 32
        assert 1e-4 <= point.values["optimizer.lr"] <= 1e-2
        assert isinstance(point.values["model.norm_pix_loss"], bool)
    assert planner.is_exhausted


def test_what_is_refused_costs_no_trial_and_is_counted(sweep_of: Make, study: Path) -> None:
    sweep = sweep_of(**{**KEYS, "budget": {"trials": 4}}, constraints=["params_m <= 0.3"])
    planner = make_planner(sweep, study_path=str(study))
    points = [point for point, _ in run(planner)]
    assert len(points) == 4
    assert all(quantities(point_config(sweep, point))["params_m"] <= 0.3 for point in points)
    failed = states(study, "mae")["FAIL"] + states(study, "crate")["FAIL"]
    assert planner.refused == {"not params_m <= 0.3": failed}
    assert failed > 0


def test_a_small_space_is_used_up_before_its_budget(sweep_of: Make) -> None:
    keys = {**KEYS, "tune": {"optimizer.lr": {"grid": [1e-3]}}, "space": {"model.width": {"grid": [32, 64]}}}
    planner = make_planner(sweep_of(**keys, arms={"mae": {}}))
    assert sorted(point.values["model.width"] for point, _ in run(planner)) == [32, 64]
    assert planner.is_exhausted
    assert planner.ask() is None


def test_a_later_session_goes_on_with_the_study(sweep_of: Make, tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    sweep = sweep_of(**{**KEYS, "budget": {"trials": 7}})
    first = make_planner(sweep, study_path=str(path))
    done = run(first, 3)
    orphan, unheard = first.ask(), first.ask()  # killed in the middle; ended, but the study was not told
    assert orphan is not None
    assert unheard is not None
    second = make_planner(sweep, study_path=str(path))
    second.restore([*done, (unheard, None)])
    assert states(path, orphan.arm)["RUNNING"] == states(path, unheard.arm)["RUNNING"] == 0
    rest = [point for point, _ in run(second)]
    assert orphan in rest[:2]
    assert unheard not in rest
    assert len(rest) == 7 - 4
    assert not {point.key for point in rest} & {point.key for point, _ in done}


def test_a_lost_database_is_filled_again_from_what_the_folders_hold(sweep_of: Make, study: Path) -> None:
    sweep = sweep_of(**{**KEYS, "budget": {"trials": 6}})
    done = run(make_planner(sweep), 4)
    planner = make_planner(sweep, study_path=str(study))
    planner.restore([(Point.of(point.as_dict()), values) for point, values in done])
    assert states(study, "mae") == states(study, "crate") == {"COMPLETE": 2}
    assert len(run(planner)) == 2


def test_a_suggestion_that_was_cut_off_while_it_was_written_is_marked_failed(sweep_of: Make, study: Path) -> None:
    sweep = sweep_of(**KEYS, arms={"mae": {}})
    make_planner(sweep, study_path=str(study))
    kept = optuna.load_study(study_name="mae", storage=f"sqlite:///{study}")
    kept.ask({"model.width": optuna.distributions.IntDistribution(32, 128, step=32)})
    make_planner(sweep, study_path=str(study)).restore([])
    assert states(study, "mae") == {"FAIL": 1}


def test_infeasible_and_unmeasured_trials_are_told_as_failed(sweep_of: Make, study: Path) -> None:
    planner = make_planner(sweep_of(**KEYS, arms={"mae": {}}), study_path=str(study))
    for i in range(4):
        point = planner.ask()
        assert point is not None
        if i == 0:
            planner.tell_infeasible(point, "out of memory")
        else:
            planner.tell(point, [{"knn_top1": 0.5}, {"eval_loss": math.nan}, loss(point)][i - 1])
    assert states(study, "mae") == {"FAIL": 3, "COMPLETE": 1}


def test_a_study_learns_from_what_it_is_told(sweep_of: Make) -> None:
    sweep = sweep_of(**{**KEYS, "budget": {"trials": 40}}, arms={"mae": {}})
    values = [values["eval_loss"] for _, values in run(make_planner(sweep)) if values is not None]
    assert sum(values[20:]) / 20 < 0.6 * sum(values[:10]) / 10


def test_a_front_is_searched_with_both_objectives_the_known_one_filled_in(sweep_of: Make, study: Path) -> None:
    keys = {**KEYS, "search": {"method": "nsga2"}, "budget": {"trials": 6}}
    sweep = sweep_of(**keys, objective=["eval_loss", "params_m"], arms={"mae": {}})
    done = run(make_planner(sweep, study_path=str(study)))
    kept = optuna.load_study(study_name="mae", storage=f"sqlite:///{study}")
    told = [trial.values for trial in kept.get_trials() if trial.values is not None]
    assert [direction.name for direction in kept.directions] == ["MINIMIZE", "MINIMIZE"]
    assert len(done) == 6
    assert told == [[loss(point)["eval_loss"], quantities(point_config(sweep, point))["params_m"]] for point, _ in done]


def test_an_accuracy_is_maximised(sweep_of: Make, study: Path) -> None:
    make_planner(sweep_of(**KEYS, objective=["knn_top1", "params_m"]), study_path=str(study))
    kept = optuna.load_study(study_name="crate", storage=f"sqlite:///{study}")
    assert kept.direction.name == "MAXIMIZE"


def test_lists_and_nothing_pass_through_a_study(sweep_of: Make) -> None:
    tune = {"model.ista_lambda": {"choice": [[0.1, 0.2, 0.3, 0.4], 0.5]}, "train.clip_norm": {"choice": [None, 1.0]}}
    sweep = sweep_of(**{**KEYS, "tune": tune, "space": {}}, arms={"crate": {"base": "digits_crate_mae"}})
    planner = make_planner(sweep)
    found = set()
    while (point := planner.ask()) is not None:
        config = point_config(sweep, point)
        found.add((config.model.ista_lambda, config.train.clip_norm))
        planner.tell(point, {"eval_loss": 1.0})
    assert found == {((0.1, 0.2, 0.3, 0.4), None), ((0.1, 0.2, 0.3, 0.4), 1.0), (0.5, None), (0.5, 1.0)}
