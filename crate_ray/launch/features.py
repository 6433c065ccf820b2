"""Judging runs on the cluster: one Ray task a run, and of large splits one task a block of images.

In: finished runs and a request. Out: their reports, written into their folders by their own tasks. A run's task is its only
writer; the tasks that encode blocks for it write files of their own, and are tried again elsewhere when their node dies. While
a run's task waits for them it holds no processor, so it never keeps them out.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

from crate_ray.launch.cluster import capacity, connect
from crate_ray.launch.indexing import map_on_cluster, result_of
from crate_ray.runs import RunFolder
from crate_ray.training.probes import CLUSTER_FROM, ProbeRequest, Split, find_subject, num_images

if TYPE_CHECKING:
    from crate_ray.evaluation.intervals import Interval

_FIX = "give the same command again (blocks that were encoded are kept) on nodes with more memory, or without --workers"


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
    probe_runs(folders, ProbeRequest(split))
    interval: Interval = _result(pixels)
    return interval


def probe_runs(folders: Sequence[RunFolder], request: ProbeRequest, *, workers: int | None = None) -> list[dict[str, Any]]:
    """Judges runs side by side.

    Args:
        folders: Of the runs.
        request: What is asked of each.
        workers: Tasks that encode for one run at a time; None for as many as there is room for, from CLUSTER_FROM images
            on, and else for none.

    Returns:
        The reports, in the order of the runs.

    Raises:
        ConfigError: A run is refused, or a task's process died on every attempt.
    """
    subjects = [find_subject(folder, request) for folder in folders]
    connect()
    there = capacity().total("GPU") > 0
    tasks = []
    for subject in subjects:
        gpus = 1 if subject.config.scale.use_gpu and there else 0
        is_split = workers is not None or num_images(subject) >= CLUSTER_FROM
        options = {"num_gpus": 0 if is_split else gpus}
        tasks.append(_judge.options(**options).remote(subject.folder.uri, request, is_split, workers, gpus))
    try:
        return [_result(task) for task in tasks]
    finally:
        for task in tasks:
            ray.cancel(task)


def _result(task: Any) -> Any:
    try:
        return result_of(task, _FIX)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


@ray.remote(num_cpus=1, max_retries=1)
def _judge(uri: str, request: ProbeRequest, is_split: bool, workers: int | None, gpus: int) -> dict[str, Any]:
    from crate_ray.training.probes import probe_run

    task_map = partial(map_on_cluster, gpus=gpus, at_most=workers, fix=_FIX) if is_split else None
    return probe_run(RunFolder(uri), request, task_map=task_map)


@ray.remote(num_cpus=1, max_retries=1)
def _judge_pixels(uri: str, split: Split) -> "Interval":
    from crate_ray.training.probes import probe_raw_pixels

    return probe_raw_pixels(RunFolder(uri).read_config(), split=split)
