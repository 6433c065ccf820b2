"""What a trial is told of its sweep."""

import pytest

from crate_ray.config import RunConfig, SweepConfig
from crate_ray.launch.sweeps.rungs import legs_of
from crate_ray.launch.sweeps.trial_session import TrialSpec
from crate_ray.runs import RunFolder


@pytest.mark.parametrize(("stage", "ends"), [("screen", [20, 40, 60]), ("confirm", [60])])
def test_only_screening_trials_branch_off_at_the_rungs(stage: str, ends: list[int]) -> None:
    keys = {"schedule.cooldown_fraction": 0.25, "schedule.warmup_epochs": None, "schedule.warmup_steps": 5}
    run = RunConfig.load("digits_mae", [f"{key}={'null' if value is None else value}" for key, value in keys.items()])
    run = run.model_copy(update={"train": run.train.model_copy(update={"steps": 60, "epochs": None})})
    asha = {"type": "asha", "grace_steps": 20, "reduction_factor": 2}
    sweep = SweepConfig.parse(
        {"name": "a", "base": "digits_mae", "tune": {"optimizer.lr": {"grid": [1e-3, 3e-3]}}, "scheduler": asha}
    )
    spec = TrialSpec(run, sweep, {"stage": stage}, "/nowhere")
    legs = legs_of(run, RunFolder(spec.folder), spec.scheduler, num_samples=1000)
    assert [leg.total_steps for leg in legs] == ends
