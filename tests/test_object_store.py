"""A run folder in a bucket: a real S3 server on this machine, through pyarrow."""

import pytest
import torch
from saved_checkpoints import save_checkpoint

from crate_ray import storage
from crate_ray.config import ConfigError, RunConfig, fingerprint
from crate_ray.runs import Lease, RecordTail, RecordWriter, RunFolder, list_runs, open_run, read_records, read_status
from crate_ray.training.checkpoint import latest_checkpoint, prune_checkpoints


@pytest.fixture
def study(bucket: str) -> str:
    """A folder in the bucket, which need not exist."""
    return storage.join(bucket, "study")


@pytest.fixture
def folder(study: str, request: pytest.FixtureRequest) -> RunFolder:
    config = RunConfig.load("digits_crate_mae", [f"storage.path={study}", f"name={request.node.name[-50:]}"])
    return open_run(config, fingerprint(config, "0" * 64, "float32"))


def test_a_run_is_created_found_and_read_back(folder: RunFolder, study: str) -> None:
    assert folder.uri.partition("?")[0] == f"s3://runs-bucket/study/{folder.name}"
    assert folder.read_config().train.steps == 600
    assert folder.name in [run.name for run in list_runs(study)]
    assert storage.read_text(folder.path("config.yaml")).startswith("# schema_version")


def test_records_are_segments_that_a_tail_follows_and_a_later_attempt_wins(folder: RunFolder) -> None:
    tail = RecordTail(folder)
    first = RecordWriter(folder, 1)
    for step in (1, 2, 3):
        first.write(step, {"train/loss": float(step)})
    assert tail.poll() == []
    first.flush()
    assert [record.step for record in tail.poll()] == [1, 2, 3]
    second = RecordWriter(folder, 2)
    second.write(3, {"train/loss": 30.0})
    second.close()
    first.close()
    assert [record.step for record in tail.poll()] == [3]
    assert [record.values["train/loss"] for record in read_records(folder)] == [1.0, 2.0, 30.0]
    assert len(storage.list_dir(folder.path("metrics"))) == 2


def test_a_checkpoint_exists_once_its_manifest_does(folder: RunFolder) -> None:
    tensors = {"weight": torch.arange(6.0)}
    for step in (1, 2, 3):
        save_checkpoint(folder, step=step, cursor=step, train_seconds=0.0, model=tensors, optimizer={})
    storage.delete(folder.path("checkpoints", "step_00000003", "manifest.json"))
    newest = latest_checkpoint(folder)
    assert newest is not None
    assert newest.step == 2
    assert torch.equal(newest.read("model.safetensors")["weight"], tensors["weight"])
    prune_checkpoints(folder, keep_last=1)
    assert "step_00000001" not in storage.list_dir(folder.path("checkpoints"))


def test_a_lease_in_a_bucket_refuses_a_second_driver(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crate_ray.runs.status.SETTLE_SECONDS", 0.0)
    lease = Lease.take(folder)
    with pytest.raises(ConfigError, match="held by another live driver"):
        Lease.take(folder)
    lease.end("FINISHED")
    status = read_status(folder)
    assert status is not None
    assert status.state == "FINISHED"
    assert not storage.exists(folder.path("lease.json"))


def test_a_bucket_that_is_not_there_is_one_message(study: str) -> None:
    missing = study.replace("runs-bucket", "no-such-bucket").replace("&allow_bucket_creation=true", "")
    with pytest.raises(ConfigError, match=r"storage\.path = .* cannot be written"):
        storage.check_writable(missing)
