"""Timing by turns: what is timed, how others are noticed, and what the interval of a median holds."""

import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from crate_ray.config import ConfigError
from crate_ray.training import exclusive, quiet
from crate_ray.training.exclusive import LEAST_ROUNDS, device_name, median_interval, time_exclusively, timing_key
from crate_ray.training.quiet import OtherLoad, OtherLoadWatch
from tests.training.conftest import LoadTiny

CPU = torch.device("cpu")


@pytest.fixture
def busy_neighbour() -> Iterator[None]:
    """A process that keeps one core at work."""
    neighbour = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    assert neighbour.stdout is not None
    neighbour.stdout.readline()
    yield
    neighbour.kill()
    neighbour.wait(10)
    neighbour.stdout.close()


def test_the_interval_of_a_median_of_six_is_all_of_them_and_of_nine_leaves_out_the_ends() -> None:
    # P(all six on one side) = 2 / 64 = 3.1%; of nine, at most one on a side: 2 (1 + 9) / 512 = 3.9%.
    assert median_interval([6, 2, 5, 1, 4, 3]) == (1, 6)
    assert median_interval([9, 8, 7, 6, 5, 4, 3, 2, 1]) == (2, 8)


@pytest.mark.parametrize("n", [6, 12, 25])
def test_the_interval_of_a_median_holds_it_as_often_as_it_says(n: int) -> None:
    draws = np.random.default_rng(n).exponential(size=(2000, n))  # far from normal; its median is log 2
    ends = np.array([median_interval(draw.tolist()) for draw in draws])
    covered = np.mean((ends[:, 0] <= np.log(2)) & (np.log(2) <= ends[:, 1]))
    assert covered > 0.95 - 4 * np.sqrt(0.95 * 0.05 / 2000)


def test_a_neighbour_that_computes_is_seen_and_own_work_is_not(busy_neighbour: None) -> None:
    watch = OtherLoadWatch(CPU)
    began, own_s = time.perf_counter(), time.process_time()
    while time.perf_counter() < began + 1.5:
        pass
    load = watch.look()
    own_cores = (time.process_time() - own_s) / (time.perf_counter() - began)
    assert own_cores > 0.05
    assert load.cores < len(os.sched_getaffinity(0)) - own_cores + 0.1
    assert load.cores > 0.3  # it shares two cores with this loop and with whatever else is there
    assert not load.is_quiet
    assert "cores" in load.sentence()


def test_a_program_on_the_gpu_is_company_however_idle_the_cores_are() -> None:
    assert OtherLoad(0.0, 0).is_quiet and OtherLoad(0.0, None).is_quiet
    assert not OtherLoad(0.0, 1).is_quiet
    assert OtherLoad(0.0, 2).sentence().endswith("2 of them the GPU")


def test_a_busy_machine_is_refused_before_any_step(busy_neighbour: None, load_tiny: LoadTiny) -> None:
    with pytest.raises(ConfigError, match=r"busy: other programs use .* cores; wait until it is idle, or give --busy"):
        time_exclusively({"run": load_tiny()}, steps=1)


def test_a_busy_machine_that_is_timed_anyway_is_said_to_be(
    busy_neighbour: None, load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exclusive, "WAIT_S", 0.5)
    timing = time_exclusively({"run": load_tiny()}, steps=1, may_be_busy=True)["run"]
    assert not timing.exclusive
    assert timing.other_cores > 0.2
    assert len(timing.rounds) == LEAST_ROUNDS


def test_runs_are_timed_by_turns_and_a_larger_one_is_slower(load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exclusive, "WAIT_S", 0.1)
    monkeypatch.setattr(quiet, "QUIET_CORES", math.inf)  # whatever else this machine does
    wide = ("model.width=256", "model.decoder_width=256", "model.encoder_depth=8")
    found = time_exclusively({"small": load_tiny(), "wide": load_tiny(*wide)}, steps=2, may_be_busy=True)
    for timing in found.values():
        assert len(timing.rounds) == LEAST_ROUNDS
        assert timing.exclusive
        assert timing.low <= timing.images_per_s <= timing.high
        assert timing.hardware == f"1 x {device_name(CPU)}"
    assert found["small"].images_per_s > 2 * found["wide"].images_per_s


def test_the_whole_batch_is_timed_on_one_worker(load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exclusive, "WAIT_S", 0.1)
    several = load_tiny("scale.num_workers=2", "train.global_batch=16")
    assert time_exclusively({"run": several}, steps=1, may_be_busy=True)["run"].global_batch == 16


def test_seeds_rates_and_lengths_share_a_timing_and_shapes_do_not(load_tiny: LoadTiny) -> None:
    key = timing_key(load_tiny())
    for same in ("train.seed=7", "optimizer.lr=0.5", "train.steps=99", "name=other"):
        assert timing_key(load_tiny(same)) == key
    for other in ("model.encoder_depth=2", "train.global_batch=16", "optimizer.name=lion", "train.micro_batch=4"):
        assert timing_key(load_tiny(other)) != key


def test_too_few_rounds_have_no_interval(load_tiny: LoadTiny) -> None:
    with pytest.raises(ValueError, match="at least 6 rounds"):
        time_exclusively({"run": load_tiny()}, rounds=5)


def test_data_that_is_gone_is_an_error_of_the_user(load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exclusive, "WAIT_S", 0.1)
    with pytest.raises(ConfigError, match="nowhere"):
        time_exclusively({"run": load_tiny("data.train=/nowhere")}, steps=1, may_be_busy=True)
