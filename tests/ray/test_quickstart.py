"""The main job from one command, shortened to a few steps."""

import json
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.timeout(900)
def test_quickstart_makes_the_comparison_and_the_same_command_again_repeats_it_from_the_folders(
    drive: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "quickstart"
    command = ["quickstart", "--out", str(out), "--set", "train.steps=6", "--set", "schedule.warmup_steps=2"]
    first = drive(*command)
    assert first.wait(700) == 0, first.output()
    printed = first.output()
    for line in (
        "parameters, trainable",
        "probe top-1",
        "untrained encoder",
        "gain, points",
        "raw pixels",
        "viewStateShareKey",
    ):
        assert line in printed
    comparison = json.loads((out / "comparison.json").read_text())
    rows = {row["recipe"]: row for row in comparison["rows"]}
    assert rows["digits_crate_mae"]["params_trainable"] == 411_568
    assert abs(rows["digits_mae_small"]["params_trainable"] / 411_568 - 1) < 0.05
    assert rows["digits_mae"]["params_encoder"] > 3 * rows["digits_crate_mae"]["params_encoder"]
    assert (out / "comparison.png").stat().st_size > 10_000
    assert "| CRATE-MAE |" in (out / "report.md").read_text()

    with sqlite3.connect(out / "mlflow.db") as database:
        runs = database.execute("select status from runs where lifecycle_stage = 'active'").fetchall()
        finals = database.execute("select count(distinct run_uuid) from metrics where key = 'final/probe_top1'").fetchone()
    assert runs == [("FINISHED",)] * 4  # three models and the comparison
    assert finals == (3,)

    started = time.monotonic()
    again = drive(*command)
    assert again.wait(120) == 0, again.output()
    assert time.monotonic() - started < 60
    assert json.loads((out / "comparison.json").read_text())["rows"] == comparison["rows"]
