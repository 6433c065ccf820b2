"""What stands on the screen when a sweep has ended."""

from pathlib import Path

import pytest

from crate_ray.cli.sweep_result import print_end
from crate_ray.launch.sweeps.driver import SweepOutcome
from crate_ray.runs import RunFolder, TrialRow

SUMMARY = {
    "sweep": "made",
    "state": "FINISHED",
    "reason": None,
    "was_finished": False,
    "cut_short": None,
    "spent": {"hours": 0.1},
    "forecast": None,
    "refused": {},
    "links": {"report": "out/made/report.md", "serve": "crate-ray tracking ui out", "views": {}, "sweep": None},
}


def trial(number: int, state: str, reason: str | None = None) -> TrialRow:
    return TrialRow.of({"id": f"mae-{number:08x}", "arm": "mae", "seed": 0, "state": state, "reason": reason})


def test_a_finished_sweep_says_how_many_trials_have_no_result_and_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        trial(0, "FINISHED"),
        *(trial(number, "FAILED", "no shards at data/train\nbuild them first") for number in (1, 2)),
        trial(3, "FAILED", "worker lost"),
        trial(4, "INFEASIBLE", "loss nan at step 7"),
    ]
    print_end(SweepOutcome(RunFolder(str(tmp_path)), rows, "FINISHED"), SUMMARY)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["made: FINISHED", "screening: 3 failed, 1 done, 1 infeasible"]
    assert lines[2:5] == [
        "Infeasible: 1 trial, loss nan at step 7.",
        "Failed: 2 trials, no shards at data/train.",
        "Failed: 1 trial, worker lost.",
    ]
