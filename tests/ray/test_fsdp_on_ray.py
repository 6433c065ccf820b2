"""Shards of a model on Ray Train workers, and a run that goes on from them with whole copies."""

import os
import signal

import pytest

from crate_ray.config import RunConfig
from crate_ray.runs import read_records
from crate_ray.training.checkpoint import latest_checkpoint
from crate_ray.training.loop import LocalContext, run_training
from crate_ray.training.prepare import prepare_run


@pytest.mark.usefixtures("cluster")
def test_a_sharded_run_that_was_stopped_goes_on_with_ddp(overrides: list[str]) -> None:
    from crate_ray.launch.train import RunOutcome, launch_training
    from crate_ray.runs import RunFolder

    started: list[RunFolder] = []

    def load(name: str, *more: str) -> RunConfig:
        return RunConfig.load("digits_crate_mae", [*overrides, "train.steps=300", f"name={name}", *more])

    def stop_soon() -> None:
        if started and any(record.step >= 3 for record in read_records(started[0])):
            os.kill(os.getpid(), signal.SIGTERM)
            started.clear()

    def losses(folder: RunFolder) -> dict[int, float]:
        return {r.step: r.values["train/loss"] for r in read_records(folder) if "train/loss" in r.values}

    first: RunOutcome = launch_training(
        load("shards", "scale.num_workers=2", "scale.parallel=fsdp"),
        on_start=lambda folder, _: started.append(folder),
        on_poll=stop_soon,
    )
    assert first.state == "KILLED", first.reason
    held = latest_checkpoint(first.folder)
    assert held is not None
    assert 3 <= held.step < 300
    assert sorted(held.files) == [
        f"{name}.shard-0000{i}-of-00002.safetensors" for name in ("model", "optimizer") for i in (1, 2)
    ]

    second = launch_training(load("shards", "scale.num_workers=2", "scale.parallel=ddp"))
    assert second.state == "FINISHED", second.reason
    config, alone = prepare_run(load("alone", "scale.use_gpu=false"), device_type="cpu")
    context, last = LocalContext(), held.step + 10
    context.heartbeat = lambda step: context.stop() if step == last else None  # type: ignore[method-assign]
    run_training(config, alone, context)
    ours, theirs = losses(second.folder), losses(alone)
    assert list(ours) == list(range(1, 301))
    assert last in theirs
    # float32: the same sums in another order, through every update of AdamW up to there.
    assert {step: ours[step] for step in theirs} == pytest.approx(theirs, rel=1e-4)
