"""The small size of every shipped sweep, run as it stands but for where its data lies."""

import math
from collections import Counter
from pathlib import Path

import pytest

from crate_ray.config import SweepConfig
from crate_ray.launch.sweeps.driver import run_sweep
from crate_ray.runs import read_sweep
from crate_ray.space import make_plan

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.slow]

FOLDER = Path(__file__).resolve().parents[2] / "sweeps"


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_the_small_size_of_a_shipped_sweep_runs_to_its_end(name: str, digits: Path, tmp_path: Path) -> None:
    splits = {"train": "train", "eval": "validation", "test": "test"}
    overrides = [f"data.{key}={digits}/{split}" for key, split in splits.items()]
    sweep = SweepConfig.load(str(FOLDER / f"{name}.yaml"), [*overrides, f"storage.path={tmp_path}"], smoke=True)
    outcome = run_sweep(sweep)
    assert outcome.state == "FINISHED", outcome.reason
    assert read_sweep(outcome.folder) == sweep
    planned = {arm: len(points) for arm, points in make_plan(sweep).points.items()}
    assert Counter(row.arm for row in outcome.rows) == planned
    assert {row.state for row in outcome.rows} <= {"FINISHED", "STOPPED"}
    for row in outcome.rows:
        if row.state == "FINISHED":
            assert all(math.isfinite(row.value_of(objective) or math.nan) for objective in sweep.objective), row
