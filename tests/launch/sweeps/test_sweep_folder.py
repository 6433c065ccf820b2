"""What may change while a sweep goes on in its folder."""

from pathlib import Path

import pytest

from crate_ray.config import ConfigError, SweepConfig
from crate_ray.launch.sweeps.folder import locate_sweep, write_sweep
from crate_ray.runs import RunFolder, TrialRow
from crate_ray.runs.trials import write_trial


def sweep_in(folder: Path, *, steps: int, seeds: int = 5) -> SweepConfig:
    return SweepConfig.parse(
        {
            "name": "tested",
            "base": "digits_mae",
            "set": {"storage.path": str(folder)},
            "tune": {"optimizer.lr": {"grid": [1e-3, 3e-3]}},
            "confirm": {"seeds": seeds, "set": {"train.steps": steps}},
        }
    )


def test_confirming_runs_of_another_length_are_refused_once_there_are_some(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "tested"))
    write_sweep(folder, sweep_in(tmp_path, steps=40))
    assert locate_sweep(sweep_in(tmp_path, steps=80)).uri == folder.uri
    row = TrialRow(id="vit-1", arm="vit", stage="confirm", seed=1000, state="FINISHED")
    write_trial(RunFolder(folder.path("trials", row.id)), row)
    assert locate_sweep(sweep_in(tmp_path, steps=40, seeds=7)).uri == folder.uri
    with pytest.raises(ConfigError, match=r"confirm.set is .*80.* has confirming runs with .*40.* --set name=NEW"):
        locate_sweep(sweep_in(tmp_path, steps=80))
