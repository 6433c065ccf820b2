"""Sweeps that a user can correct: one message that says how, exit code 2, nothing written; without Ray."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from crate_ray.config import SweepConfig
from crate_ray.launch.sweeps.folder import write_sweep
from crate_ray.runs import RunFolder

MakeSweep = Callable[..., Path]


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is refused before Ray starts."""
    monkeypatch.setattr("crate_ray.launch.sweeps.driver.connect", lambda: pytest.fail("Ray was started"))


@pytest.fixture
def make_sweep(digits: Path, tmp_path: Path) -> MakeSweep:
    """Writes a sweep file of the digits; keys given here replace those of the file."""

    def make(**keys: Any) -> Path:
        body = {
            "name": "small",
            "base": "digits_crate_mae",
            "set": {
                "storage.path": str(tmp_path / "out"),
                "data.train": f"{digits}/train",
                "data.eval": f"{digits}/validation",
                "train.steps": 40,
                "schedule.warmup_steps": 5,
            },
            "space": {"model.encoder_depth": {"grid": [1, 2]}},
            "tune": {"optimizer.lr": {"grid": [1e-3, 3e-3]}},
            "report_every_steps": 10,
            **keys,
        }
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in body.items() if value is not None}))
        return path

    return make


@pytest.mark.parametrize("mode", [[], ["--dry-run", "--no-measure"]])
@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"space": {"model.widht": {"grid": [64]}}}, "did you mean 'model.width'?"),
        ({"space": {}, "tune": {}}, "nothing varies"),
        ({"space": {"model.width": {"grid": []}}}, "space.model.width"),
        ({"space": {"model.encoder_depth": {"uniform": [3, 3]}}}, "the range is empty"),
        ({"space": {"model.encoder_depth": {"grid": [1], "choice": [2]}}}, "exactly one of"),
        ({"constraints": ["params_m <= 0.001"]}, "no point of arm 'crate' is feasible"),
        ({"constraints": ["parms_m <= 1"]}, "params_m"),
        ({"budget": {"trials": 0}}, "more than 0"),
        ({"budget": {"hours": 0}}, "more than 0"),
        ({"budget": {"usd": 5}}, "budget.price"),
        ({"objective": "accuracy"}, "knn_top1"),
        ({"objective": "eval_loss", "space": {"model.mask_ratio": {"grid": [0.5, 0.75]}}}, "answer different questions"),
        ({"scheduler": {"type": "asha", "grace_steps": 5}}, "before the first report"),
        ({"scheduler": {"type": "asha", "grace_steps": 40}}, "stops no trial"),
        ({"scheduler": {"type": "asha", "metric": "gflops"}}, "scheduler.metric"),
        ({"scheduler": {"type": "pbt"}}, "scheduler.perturb"),
        ({"objective": "params_m", "scheduler": {"type": "asha"}}, "scheduler.metric"),
        ({"schedular": {"type": "asha"}}, "did you mean 'scheduler'?"),
        ({"base": "digits_crate_mea"}, "did you mean 'digits_crate_mae'?"),
        ({"set": {"data.train": "/no/such/folder"}}, "/no/such/folder"),
        ({"resources_per_trial": {"num_workers": 2, "gpus": 0.5}}, "uses one card"),
    ],
)
def test_one_message_exit_code_2_and_nothing_written(
    invoke, make_sweep: MakeSweep, tmp_path: Path, keys: dict[str, Any], expected: str, mode: list[str]
) -> None:
    outcome = invoke("sweep", make_sweep(**keys), *mode)
    assert outcome.code == 2, outcome.err
    assert expected in " ".join(outcome.err.split())
    assert outcome.err.count("error:") == 1
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    assert {path.name for path in tmp_path.iterdir()} == {"small.yaml"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--set", "budget.trails=3"], "did you mean 'trials'?"),
        (["--set", "train.step=3"], "did you mean"),
        (["--set", "budget.trials=0"], "more than 0"),
        (["--smoke"], "has no small size"),
        (["--no-measure"], "together with --dry-run"),
        (["--dry-run", "--coord-check"], "one at a time"),
    ],
)
def test_options_that_do_not_fit_are_one_message(invoke, make_sweep: MakeSweep, words: list[str], expected: str) -> None:
    outcome = invoke("sweep", make_sweep(), *words)
    assert outcome.code == 2
    assert expected in " ".join(outcome.err.split())
    assert outcome.out == ""


def test_a_file_that_is_not_there_names_those_beside_it(invoke, make_sweep: MakeSweep) -> None:
    outcome = invoke("sweep", str(make_sweep()).replace("small", "smal"))
    assert outcome.code == 2
    assert "small.yaml" in outcome.err


def test_a_changed_space_says_what_changed_and_how_to_start_anew(invoke, make_sweep: MakeSweep, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "out" / "small"))
    write_sweep(folder, SweepConfig.load(str(make_sweep())))
    held = sorted(path.name for path in (tmp_path / "out" / "small").iterdir())
    outcome = invoke("sweep", make_sweep(space={"model.encoder_depth": {"grid": [1, 3]}}))
    flat = " ".join(outcome.err.split())
    assert outcome.code == 2
    assert "space.model.encoder_depth.grid: [1, 2] there, [1, 3] here" in flat
    assert "--set name=" in flat
    assert sorted(path.name for path in (tmp_path / "out" / "small").iterdir()) == held


def test_trials_that_never_fit_are_refused_with_the_numbers(invoke, make_sweep: MakeSweep, tmp_path: Path) -> None:
    outcome = invoke("sweep", make_sweep(resources_per_trial={"cpus": 512}), "--dry-run", "--no-measure")
    assert outcome.code == 2
    assert "512 CPU" in outcome.err
    assert not (tmp_path / "out").exists()
