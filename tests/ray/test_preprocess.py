"""`data.preprocess: ray_data`: actors elsewhere decode, and the run is the one that it would be without them."""

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import torch

from crate_ray.config import ConfigError, RunConfig
from crate_ray.runs import RunFolder, read_records

ACTORS = ["data.preprocess=ray_data", "data.num_loaders=1"]


def losses_of(folder: RunFolder) -> dict[int, float]:
    return {record.step: record.values["train/loss"] for record in read_records(folder) if "train/loss" in record.values}


@pytest.fixture
def short_streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Streams of eight batches, so that a few steps hand over from one to the next."""
    from crate_ray.launch import preprocess

    monkeypatch.setattr(preprocess, "_STREAM_BATCHES", 8)
    monkeypatch.setattr(preprocess, "_HANDOVER_BATCHES", 3)
    yield


def free_cpus() -> float:
    import ray

    return float(ray.available_resources().get("CPU", 0.0))


@pytest.mark.usefixtures("cluster", "short_streams")
def test_the_batches_are_those_of_the_reader_bit_by_bit_and_in_order_and_a_cursor_resumes(digits: Path) -> None:
    from crate_ray.data import open_reader
    from crate_ray.launch.preprocess import open_streamed_reader

    options = {
        **{"global_batch": 24, "image_size": 32, "rank": 1, "world_size": 5, "seed": 3, "lanes": 8, "window": 64},
        **{"augment": "random_resized_crop", "noise_size": 16},
    }
    url, before = str(digits / "train"), free_cpus()
    with (
        closing(open_streamed_reader(url, cursor=240, num_loaders=2, **options)) as streamed,
        open_reader(url, cursor=240, num_loaders=0, **options) as reader,
    ):
        for _ in range(20):  # two streams and a half
            ours, expected = next(streamed), next(reader)
            assert ours.images_BCHW.dtype == torch.uint8
            for name in ("images_BCHW", "labels_B", "noise_BN", "weights_B", "sample_ids_B", "epochs_B"):
                assert torch.equal(getattr(ours, name), getattr(expected, name)), name
            assert ours.cursor_after == expected.cursor_after
        assert streamed.state_dict() == reader.state_dict() == {"cursor": 240 + 20 * 24}
        assert streamed.epochs == reader.epochs
        assert streamed.replaced_samples == 0
    deadline = time.monotonic() + 60
    while free_cpus() < before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert free_cpus() == before, "actors are still there"


@pytest.mark.usefixtures("cluster")
def test_an_actor_that_is_killed_costs_time_and_no_batch(digits: Path) -> None:
    from crate_ray.data import open_reader
    from crate_ray.launch.preprocess import open_streamed_reader

    options = {"global_batch": 16, "image_size": 32, "rank": 0, "world_size": 1, "seed": 1, "lanes": 8, "window": 64}
    url = str(digits / "train")
    with closing(open_streamed_reader(url, num_loaders=2, **options)) as streamed, open_reader(url, **options) as reader:
        waits_s = []
        for step in range(400):
            if step == 5:
                _kill_one_actor()
            started = time.perf_counter()
            ours, expected = next(streamed), next(reader)
            waits_s.append(time.perf_counter() - started)
            assert torch.equal(ours.images_BCHW, expected.images_BCHW)
            assert torch.equal(ours.sample_ids_B, expected.sample_ids_B)
    print(f"longest wait for a batch after an actor was killed: {max(waits_s[5:]):.1f} s")


def _kill_one_actor() -> None:
    """SIGKILL to a process of this session's cluster that decodes."""
    raylets = [child for child in psutil.Process().children(recursive=True) if "raylet" in child.name()]
    actors = [child for raylet in raylets for child in raylet.children() if "_BatchMaker" in " ".join(child.cmdline())]
    actors[0].kill()


@pytest.mark.usefixtures("cluster")
def test_a_run_that_stops_and_goes_on_with_actors_has_the_losses_of_one_without(overrides: list[str]) -> None:
    from crate_ray.launch.train import launch_training
    from crate_ray.training.checkpoint import list_checkpoints

    def outcome(name: str, *more: str) -> RunFolder:
        ended = launch_training(RunConfig.load("digits_crate_mae", [*overrides, "train.steps=8", f"name={name}", *more]))
        assert ended.state == "FINISHED", ended.reason
        return ended.folder

    plain = outcome("plain", "scale.num_workers=1")
    streamed = outcome("streamed", *ACTORS, "scale.num_workers=2", "checkpoint.every_steps=5", "checkpoint.keep_last=9")
    assert losses_of(streamed) == pytest.approx(losses_of(plain), rel=2e-5)

    # As if it had been lost after its checkpoint of step 5: resumed with actors, then compared.
    for name in ("checkpoints/step_00000008", "final.json", "metrics.jsonl", "status.json"):
        _remove(Path(streamed.path(name)))
    assert [checkpoint.step for checkpoint in list_checkpoints(streamed)] == [5]
    resumed = outcome("streamed", *ACTORS, "scale.num_workers=2", "checkpoint.every_steps=5")
    assert losses_of(resumed) == pytest.approx({step: losses_of(plain)[step] for step in (6, 7, 8)}, rel=2e-5)


def _remove(path: Path) -> None:
    if path.is_dir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    else:
        path.unlink()


@pytest.mark.usefixtures("cluster")
def test_workers_that_leave_no_cpu_for_actors_are_refused_at_once(overrides: list[str], tmp_path: Path) -> None:
    from crate_ray.launch.train import launch_training

    with pytest.raises(ConfigError, match=r"3 workers of 1 CPU and one actor of 1 CPU for each need 6, and the cluster has 4"):
        launch_training(RunConfig.load("digits_crate_mae", [*overrides, *ACTORS, "scale.num_workers=3"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("cluster")
def test_actors_that_never_get_a_cpu_are_an_error_and_not_a_wait(digits: Path) -> None:
    import ray

    from crate_ray.data import LoaderTimeoutError
    from crate_ray.launch.preprocess import open_streamed_reader

    @ray.remote(num_cpus=4)
    class Occupant:
        def ready(self) -> bool:
            return True

    occupant = Occupant.remote()
    ray.get(occupant.ready.remote(), timeout=60)
    options = {"rank": 0, "world_size": 1, "seed": 0, "lanes": 8, "window": 64, "global_batch": 8, "image_size": 32}
    with closing(open_streamed_reader(str(digits / "train"), loader_timeout_s=3.0, num_loaders=1, **options)) as reader:
        with pytest.raises(LoaderTimeoutError, match=r"no batch within data\.loader_timeout_s=3 from the 1 actors"):
            next(reader)
        ray.kill(occupant)
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline:  # the same batch is waited for again
            try:
                assert next(reader).cursor_after == 8
                break
            except LoaderTimeoutError:
                continue
        assert reader.state_dict() == {"cursor": 8}
