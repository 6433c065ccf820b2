"""What a node does while a run trains: recorded beside the run, by one worker a node, and never in its way."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from crate_ray.runs import RecordTail, RunFolder, read_records, system_streams
from crate_ray.training import system
from crate_ray.training.loop import LocalContext, run_training
from crate_ray.training.prepare import prepare_run

HOST = {
    "cpu_utilization_percentage",
    "system_memory_usage_megabytes",
    "system_memory_usage_percentage",
    "disk_usage_percentage",
    "disk_usage_megabytes",
    "disk_available_megabytes",
    "network_receive_megabytes",
    "network_transmit_megabytes",
}


@dataclass
class Worker:
    rank: int
    local_rank: int
    attempt: int = 1
    world_size: int = 8

    def stop_requested(self) -> bool:
        return False

    def checkpoint_written(self, step: int, uri: str) -> None: ...

    def heartbeat(self, step: int) -> None: ...

    def evaluated(self, step: int, values: Any) -> None: ...


def run_folder(tmp_path: Path, *, age_s: float = 100) -> RunFolder:
    folder = RunFolder(str(tmp_path / "run"))
    folder.write_json("run_meta.json", {"created": time.time() - age_s})
    return folder


def samples(folder: RunFolder, stream: str = "system/rank0") -> list[Any]:
    return RecordTail(folder, stream=stream).poll()


def wait_for(folder: RunFolder, count: int) -> None:
    deadline = time.monotonic() + 20
    while len(samples(folder)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_node_is_sampled_under_mlflows_names_with_the_age_of_the_run_as_step(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, age_s=5000)
    with system.watch_system(folder, Worker(0, 0), every_s=0.05):
        wait_for(folder, 3)
    records = samples(folder)
    assert {f"system/{key}" for key in HOST} <= records[0].values.keys()
    assert [record.step for record in records] == sorted(record.step for record in records)
    assert 5000 <= records[0].step <= 5030
    memory = psutil.virtual_memory()
    share = records[-1].values["system/system_memory_usage_percentage"]
    used = records[-1].values["system/system_memory_usage_megabytes"]
    assert used == pytest.approx(share / 100 * memory.total / 1e6, rel=0.02)
    assert read_records(folder) == []


def test_one_worker_a_node_samples_and_names_the_others_nodes_by_their_lowest_rank(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    for rank, local_rank in ((0, 0), (1, 1), (4, 0), (5, 1)):
        with system.watch_system(folder, Worker(rank, local_rank), every_s=0.01):
            pass
    assert system_streams(folder) == ["system/rank0", "system/rank4"]
    assert all(key.startswith("system/node_4/") for key in samples(folder, "system/rank4")[0].values)


def test_a_run_that_asks_for_none_has_no_thread_and_no_file(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    with system.watch_system(folder, Worker(0, 0), every_s=None):
        pass
    assert system_streams(folder) == []


def test_a_counter_that_fails_ends_the_samples_with_a_warning_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(psutil, "disk_usage", lambda _: 1 / 0)
    with caplog.at_level(logging.WARNING), system.watch_system(run_folder(tmp_path), Worker(0, 0), every_s=0.01):
        pass
    assert ["ZeroDivisionError" in record.message for record in caplog.records] == [True]


def test_a_sandbox_that_hides_its_counters_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        raise PermissionError("/proc/net/dev")

    monkeypatch.setattr(psutil, "net_io_counters", refuse)
    folder = run_folder(tmp_path)
    with caplog.at_level(logging.WARNING), system.watch_system(folder, Worker(0, 0), every_s=0.01):
        pass
    assert caplog.messages == ["no system metrics: PermissionError: /proc/net/dev"]
    assert system_streams(folder) == []


@pytest.mark.parametrize(("stated", "names"), [("2,0", ["2", "0"]), ("GPU-1f,", ["GPU-1f"]), ("-1", []), ("", [])])
def test_only_the_devices_that_the_worker_may_use_are_asked(
    stated: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", stated)
    assert system.visible_gpus(None) == names


def test_training_has_the_same_bits_with_and_without(load_tiny: Any, tmp_path: Path) -> None:
    outcomes = []
    for name, every in (("with", "1"), ("without", "null")):
        config = load_tiny(f"tracking.system_every_s={every}", f"name={name}")
        config, folder = prepare_run(config, device_type="cpu")
        run_training(config, folder, LocalContext())
        losses = [record.values["train/loss"] for record in read_records(folder) if "train/loss" in record.values]
        weights = Path(folder.uri, "checkpoints/step_00000012/model.safetensors").read_bytes()
        outcomes.append((losses, weights))
        assert bool(system_streams(folder)) == (name == "with")
    assert outcomes[0] == outcomes[1]


@pytest.mark.gpu
def test_every_gpu_of_the_worker_is_sampled(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    with system.watch_system(folder, Worker(0, 0), every_s=0.05):
        wait_for(folder, 1)
    values = samples(folder)[0].values
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        used = values[f"system/gpu_{number}_memory_usage_megabytes"]
        assert used == pytest.approx((total - free) / 1e6, rel=0.2, abs=1000)
        assert 0 <= values[f"system/gpu_{number}_utilization_percentage"] <= 100
