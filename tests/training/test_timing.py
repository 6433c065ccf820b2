"""Timing a run: the loop's own steps, bounded, without a trace."""

import statistics
import tempfile
import time
from pathlib import Path

import pytest

from crate_ray.training.timing import LEAST_STEPS, MOST_STEPS, WARMUP_STEPS, time_run
from tests.training.conftest import LoadTiny

STEPS_ALONE = ("data.eval=null", "eval.every_steps=null")


def test_every_part_of_a_run_is_timed_and_together_they_are_what_it_took(load_tiny: LoadTiny) -> None:
    config = load_tiny("eval.probe_every_steps=4", "eval.whitebox_every_steps=4")
    started = time.perf_counter()
    timing = time_run(config, limit_s=60)
    took_s = time.perf_counter() - started
    assert len(timing.step_s) == MOST_STEPS + 1 - WARMUP_STEPS
    parts = (min(timing.step_s), timing.evaluation_s, timing.whitebox_s, timing.frame_s)
    assert all(part > 0 for part in parts)
    assert timing.probe_s is None
    assert sum(timing.step_s) + sum(parts[1:]) < took_s


def test_the_limit_ends_the_steps_but_not_before_the_least_number(load_tiny: LoadTiny) -> None:
    timing = time_run(load_tiny(*STEPS_ALONE), limit_s=0)
    assert len(timing.step_s) == LEAST_STEPS + 1
    assert (timing.evaluation_s, timing.whitebox_s) == (0, 0)


def test_nothing_is_left_behind_and_a_rate_that_diverges_ends_no_measurement(
    load_tiny: LoadTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    assert min(time_run(load_tiny("optimizer.lr=1e30"), limit_s=0).step_s) > 0
    assert list(scratch.iterdir()) == []
    assert not (tmp_path / "runs").exists()


def test_a_larger_model_takes_longer_steps(load_tiny: LoadTiny) -> None:
    wide = ["model.width=256", "model.decoder_width=256", "model.encoder_depth=4", "train.global_batch=32"]
    times = [time_run(load_tiny(*STEPS_ALONE, *keys), limit_s=0.5) for keys in ([], wide)]
    small, large = (statistics.median(timing.step_s) for timing in times)
    assert large > 2 * small


def test_the_probe_is_timed_where_it_is_asked_for(load_tiny: LoadTiny) -> None:
    pytest.importorskip("sklearn")
    timing = time_run(load_tiny(), limit_s=0, probe=True)
    assert timing.probe_s is not None
    assert timing.probe_s > 0
