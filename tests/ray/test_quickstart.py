"""The main job from one command, shortened to a few steps."""

import json
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crate_ray.tracking.row_tag import unpack_row

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
        "No verdict: 1 seed",
        "viewStateShareKey",
    ):
        assert line in printed
    comparison = json.loads((out / "comparison.json").read_text())
    rows = {row["recipe"]: row for row in comparison["rows"]}
    assert rows["digits_crate_mae"]["params_total"] == 411_568
    assert abs(rows["digits_mae_small"]["params_total"] / 411_568 - 1) < 0.05
    assert rows["digits_mae"]["params_encoder"] > 3 * rows["digits_crate_mae"]["params_encoder"]
    assert 0 < comparison["raw_pixels"] < 1
    assert (out / "figures" / "encoder_params.png").stat().st_size > 10_000
    assert "| CRATE-MAE 4x128 |" in (out / "report.md").read_text()

    with sqlite3.connect(out / "mlflow.db") as database:
        runs = database.execute("select status from runs where lifecycle_stage = 'active'").fetchall()
        finals = database.execute("select count(distinct run_uuid) from metrics where key = 'final/probe_top1'").fetchone()
        told = database.execute("select run_uuid, value from tags where key = 'crate_ray.row'").fetchall()
    assert runs == [("FINISHED",)] * 4  # three models and the comparison
    assert finals == (3,)
    assert {unpack_row(text, "test").judged_split for _, text in told} == {"test"}  # told again after the probes
    assert len(told) == 3

    started = time.monotonic()
    again = drive(*command)
    assert again.wait(120) == 0, again.output()
    assert time.monotonic() - started < 60
    assert json.loads((out / "comparison.json").read_text())["rows"] == comparison["rows"]
