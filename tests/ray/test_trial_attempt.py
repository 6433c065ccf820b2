"""An attempt at a trial of several workers."""

from pathlib import Path

import pytest
import ray

from crate_ray.config import RunConfig
from crate_ray.launch.sweeps.trial_attempt import Attempt, Ended
from crate_ray.runs import Lease, RunFolder, read_status
from crate_ray.training.prepare import prepare_run


@pytest.mark.usefixtures("cluster")
def test_workers_that_find_no_room_end_the_attempt_with_what_was_waited_for(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crate_ray.launch.sweeps.trial_attempt.FIRST_WORD_S", 10.0)
    run = RunConfig.load("digits_crate_mae", [*overrides, "train.steps=3", "scale.num_workers=2"])
    config, folder = prepare_run(run, device_type="cpu", kind="trial", uri=str(tmp_path / "trial"))
    taken = ray.util.placement_group([{"CPU": 1}] * int(ray.cluster_resources()["CPU"] - 1))
    before = groups()
    try:
        ray.get(taken.ready(), timeout=60)
        event = Attempt(config, folder, Lease.take(folder), after_step=-1, total_steps=3).next_event()
        left = groups() - before
    finally:
        ray.util.remove_placement_group(taken)
    assert isinstance(event, Ended)
    assert event.state == "FAILED"
    assert event.reason is not None
    assert "2 workers of 1 CPU did not begin within 10 s: the cluster had no room for them" in event.reason
    assert isinstance(event.error, TimeoutError)
    assert left == set()
    status = read_status(RunFolder(folder.uri))
    assert status is not None
    assert status.state == "FAILED"


def groups() -> set[str]:
    """Placement groups that hold or await resources."""
    return {key for key, group in ray.util.placement_group_table().items() if group["state"] != "REMOVED"}
