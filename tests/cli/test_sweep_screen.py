"""The screen of a running sweep, with real records and without Ray."""

import io
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from crate_ray.cli import sweep_screen
from crate_ray.cli.sweep_screen import SweepScreen
from crate_ray.config import SweepConfig
from crate_ray.runs import RecordWriter, RunFolder, TrialRow

SWEEP: dict[str, Any] = {
    "name": "widths",
    "base": "digits_crate_mae",
    "space": {"model.encoder_depth": {"grid": [2, 4]}, "model.width": {"grid": [64, 128]}},
    "tune": {"optimizer.lr": {"grid": [3e-4, 1e-3]}},
}


def trial(number: int, state: str = "RUNNING", *, arm: str = "crate", **more: Any) -> TrialRow:
    values = {"model.encoder_depth": 4, "model.width": 128, "optimizer.lr": 3e-4}
    fields = {"id": f"{arm}-{number:08x}", "arm": arm, "seed": 0, "state": state, "values": values, "total_steps": 600}
    return TrialRow(**{**fields, "quantities": {"params_m": 0.81}, **more})


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., io.StringIO]]:
    """Puts a terminal of some size, or a file, in the place of standard error."""

    def make(*, width: int = 80, height: int = 24, is_terminal: bool = True) -> io.StringIO:
        target = io.StringIO()
        console = Console(file=target, width=width, height=height, force_terminal=is_terminal, highlight=False)
        monkeypatch.setattr(sweep_screen, "errors", console)
        return target

    yield make


def drawn(screen: SweepScreen) -> list[str]:
    console = Console(width=sweep_screen.errors.width, file=io.StringIO())
    console.print(screen.render())
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_running_trials_come_first_with_what_their_records_say(terminal, tmp_path: Path) -> None:
    terminal()
    folder = RunFolder(str(tmp_path / "a"))
    writer = RecordWriter(folder, 1)
    with SweepScreen(SweepConfig.parse(SWEEP)) as screen:
        screen.known([trial(9, "FINISHED", step=600, objectives={"eval_loss": 0.25})], total=8, refused=2)
        screen.trial_started(trial(1), folder)
        writer.write(120, {"eval/loss": 0.21345, "eval/knn_top1": 0.5, "perf/images_per_s": 1234.4})
        deadline = time.monotonic() + 5
        while not any("120/600" in line for line in drawn(screen)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        screen.trial_ended(trial(2, "INFEASIBLE", reason="out of memory"))
        lines = drawn(screen)
    writer.close()
    assert lines[0] == "widths: screen  1 of 8 done  1 running  5 waiting  3 infeasible"
    assert lines[1] == "best eval loss: crate 0.2500 (4x128 lr3e-4)"
    table = [re.split(r" {1,}", line.strip()) for line in lines[3:]]
    assert table[0] == ["trial", "shape", "params", "step", "eval", "kNN", "img/s", "state"]
    assert table[1] == ["crate-00000001", "4x128", "lr3e-4", "0.81M", "120/600", "0.2135", "50.0%", "1234", "running"]
    assert [row[0] for row in table[2:]] == ["crate-00000002", "crate-00000009"]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (80, 10), (200, 50)])
def test_the_screen_never_outgrows_the_terminal(terminal, width: int, height: int) -> None:
    terminal(width=width, height=height)
    with SweepScreen(SweepConfig.parse(SWEEP)) as screen:
        screen.known([], total=500)
        screen.notes("about 0:24:10 left", "budget left: 27 trials, 1.2 GPU-hours, $3.10")
        for number in range(300):
            arm = ("crate", "vit_equal_decoder")[number % 2]
            screen.trial_ended(trial(number, "FINISHED", arm=arm, step=600, objectives={"eval_loss": 1 - number / 1000}))
        lines = drawn(screen)
    assert len(lines) == height - 1
    assert max(map(len, lines)) <= width
    assert "300 of 500 done" in lines[0]


def test_the_best_of_each_arm_follows_the_objective(terminal) -> None:
    terminal(width=200)
    with SweepScreen(SweepConfig.parse({**SWEEP, "objective": ["knn_top1", "params_m"]})) as screen:
        for number, (arm, state, knn) in enumerate(
            [("crate", "FINISHED", 0.5), ("crate", "FINISHED", 0.7), ("crate", "STOPPED", 0.9), ("vit", "FINISHED", 0.6)]
        ):
            screen.trial_ended(trial(number, state, arm=arm, objectives={"knn_top1": knn}))
        assert drawn(screen)[1] == "best kNN: crate 70.0% (4x128 lr3e-4)  vit 60.0% (4x128 lr3e-4)"


def test_a_file_gets_one_line_for_each_end_and_a_line_now_and_then(terminal, tmp_path: Path, monkeypatch) -> None:
    written = terminal(is_terminal=False)
    monkeypatch.setattr(sweep_screen, "LINE_EVERY_S", 0.2)
    monkeypatch.setattr(sweep_screen, "REFRESH_S", 0.02)
    with SweepScreen(SweepConfig.parse(SWEEP)) as screen:
        screen.known([], total=2)
        screen.trial_started(trial(1), RunFolder(str(tmp_path / "a")))
        deadline = time.monotonic() + 5
        while not written.getvalue():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        screen.trial_ended(trial(1, "FINISHED", step=600, objectives={"eval_loss": 0.25, "images_per_s": 900.0}))
    lines = written.getvalue().splitlines()
    assert lines[-1] == "1/2  crate-00000001  4x128 lr3e-4  done  step 600/600  eval loss 0.2500  images/s 900"
    assert set(lines[:-1]) == {"0 of 2 done, 1 running, 1 waiting"}
    assert 1 <= len(lines[:-1]) <= 2
    assert "\x1b" not in written.getvalue()


def test_a_line_says_why_a_trial_has_no_result(terminal) -> None:
    written = terminal(is_terminal=False)
    with SweepScreen(SweepConfig.parse(SWEEP)) as screen:
        screen.known([], total=2)
        screen.trial_ended(trial(1, "FAILED", step=60, reason="no shards at data/train\nbuild them first"))
    assert written.getvalue().splitlines() == [
        "1/2  crate-00000001  4x128 lr3e-4  failed  step 60/600  no shards at data/train"
    ]
