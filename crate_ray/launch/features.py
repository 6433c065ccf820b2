"""Judging runs on the cluster: one Ray task a run, so that the probes of a comparison run side by side."""

from typing import TYPE_CHECKING

import ray

from crate_ray.launch.cluster import connect
from crate_ray.runs import RunFolder
from crate_ray.training.probe import Split

if TYPE_CHECKING:
    from crate_ray.evaluation.intervals import Interval


def probe_on_cluster(folders: list[RunFolder], *, split: Split) -> "Interval":
    """Judges runs that share their data, and raw pixels once.

    Args:
        folders: Finished runs; each verdict is written into its folder by its own task.
        split: What to judge on.

    Returns:
        The accuracy of raw pixels.
    """
    connect()
    pixels = _judge_pixels.remote(folders[0].uri, split)
    gpus = [1 if folder.read_config().scale.use_gpu else 0 for folder in folders]
    verdicts = [_judge.options(num_gpus=gpu).remote(folder.uri, split) for folder, gpu in zip(folders, gpus, strict=True)]
    ray.get(verdicts)
    interval: Interval = ray.get(pixels)
    return interval


@ray.remote(num_cpus=1, max_retries=1)
def _judge(uri: str, split: Split) -> None:
    from crate_ray.training.probe import probe_run

    probe_run(RunFolder(uri), split=split)


@ray.remote(num_cpus=1, max_retries=1)
def _judge_pixels(uri: str, split: Split) -> "Interval":
    from crate_ray.training.probe import probe_raw_pixels

    return probe_raw_pixels(RunFolder(uri).read_config(), split=split)
