"""Judging on the cluster: the features of one process, whoever encodes them, and a report written once."""

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from crate_ray.config import RunConfig
from crate_ray.launch.features import probe_runs
from crate_ray.launch.indexing import map_on_cluster
from crate_ray.runs import Lease, RunFolder
from crate_ray.training.loop import LocalContext, run_training
from crate_ray.training.prepare import prepare_run
from crate_ray.training.probes import ProbeRequest, encode, find_subject, probe_run
from crate_ray.training.probes.encode import FOLDER, FeatureReader

LABEL_FREE = ProbeRequest(protocols=("label-free",))


@pytest.fixture
def folder(overrides: list[str]) -> RunFolder:
    """A run that took two steps in this process."""
    config = RunConfig.load("digits_crate_mae", [*overrides, "train.steps=2", "scale.use_gpu=false"])
    config, folder = prepare_run(config, device_type="cpu")
    lease = Lease.take(folder)
    run_training(config, folder, LocalContext(lease.attempt))
    lease.end("FINISHED")
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many as a task has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_tasks_encode_what_one_process_does_and_one_that_is_killed_is_tried_again(
    cluster: str, folder: RunFolder, one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BLOCK_IMAGES", 256)
    subject = find_subject(folder, LABEL_FREE)
    source = subject.config.data.eval or ""
    expected = FeatureReader(subject).read(source, trained=True)
    died = tmp_path / "died"

    def tasks_of_which_one_dies(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        def call(task: Any) -> Any:
            with (tmp_path / "processes").open("a") as log:
                log.write(f"{os.getpid()}\n")
            if task.first == 256 and not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return function(task)

        return map_on_cluster(call, tasks, at_most=2)

    reader = FeatureReader(subject, tasks_of_which_one_dies)  # type: ignore[arg-type]
    found = reader.read(source, trained=True)
    assert died.exists()
    calls = (tmp_path / "processes").read_text().split()
    assert len(calls) == 4 + 1, "788 images in blocks of 256, and the killed one once more"
    assert len(set(calls)) >= 2
    for name in ("mean_ND", "cls_ND", "labels_N"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_runs_judged_on_the_cluster_have_the_reports_of_this_process(cluster: str, folder: RunFolder, one_thread: None) -> None:
    alone = probe_run(folder, LABEL_FREE)
    for name in ("probe_validation.json",):
        Path(folder.path(name)).unlink()
    (shared,) = probe_runs([folder], LABEL_FREE, workers=2)
    assert shared == alone
    assert json.loads(Path(folder.path("probe_validation.json")).read_text()) == {"schema_version": 1, **shared}
    assert not list(Path(folder.path(FOLDER)).glob("*")), "the blocks are deleted once the numbers are written"
    assert ray.is_initialized()


def test_the_verb_judges_with_tasks_and_says_what_it_refuses(drive: Callable[..., Any], folder: RunFolder) -> None:
    judged = drive("probe", folder.uri, "--protocol", "label-free", "--workers", "2", "--json")
    assert judged.wait(200) == 0, judged.output()
    printed = judged.output()
    report = json.loads(printed[printed.index("{") :])["runs"][folder.name]
    assert report["protocols"] == {"label-free": 1}
    assert folder.read_json("probe_validation.json") == {"schema_version": 1, **report}
    refused = drive("probe", folder.uri, "--step", "9", "--workers", "2")
    assert refused.wait(60) == 2
    assert "has no checkpoint of step 9; it has 2" in refused.output()


def test_fine_tuning_trains_beside_the_run_and_again_only_reads(drive: Callable[..., Any], folder: RunFolder) -> None:
    command = ["probe", folder.uri, "--fine-tune", "--seeds", "1", "--json"]
    short = ["train.steps=2", "train.global_batch=32", "eval.log_every_steps=1", "schedule.warmup_epochs=0"]
    command += [part for key in short for part in ("--set", key)]
    first = drive(*command)
    assert first.wait(240) == 0, first.output()
    report = folder.read_json("probe_validation.json")
    assert report is not None
    (tuned,), (control,) = report["fine_tune"]["runs"], report["control_fine_tune"]["runs"]
    for uri in (tuned, control):
        meta = RunFolder(uri).read_json("run_meta.json")
        assert meta is not None
        assert (meta["kind"], meta["parent_uid"]) == ("probe", (folder.read_json("run_meta.json") or {})["run_uid"])
    again = drive(*command)
    assert again.wait(120) == 0, again.output()
    assert folder.read_json("probe_validation.json") == report
