"""Tasks on the cluster: one Ray task a shard that is read, or a block of images that is encoded.

In: the function and the tasks of `crate_ray.data.indexing`, `crate_ray.data.verify` or `crate_ray.training.probes`. Out: their
results, as they come; the caller puts them in order. Results travel through the object store, so the nodes need to see the
shards, not the index.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import OutOfMemoryError, WorkerCrashedError

from crate_ray.config import ConfigError
from crate_ray.launch.cluster import capacity, connect

T = TypeVar("T")
R = TypeVar("R")

_TASKS_A_CPU = 2  # one that runs and one that waits; results that nobody has taken yet stay few
_FIX = "give the same command again on nodes with more memory, or with --workers (an interrupted indexing goes on)"


def map_on_cluster(
    function: Callable[[T], R], tasks: Sequence[T], *, gpus: float = 0, at_most: int | None = None, fix: str = _FIX
) -> Iterator[tuple[int, R]]:
    """Computes `function(task)` for every task, as a `crate_ray.data.TaskMap`.

    Args:
        function: Picklable; run on any node, again elsewhere when its node dies.
        tasks: One each.
        gpus: That a task takes.
        at_most: Tasks at the same time; None for as many as there is room for.
        fix: What to do about a task that cannot be computed.

    Raises:
        ConfigError: RAY_ADDRESS names a cluster that does not answer, or a task's process died on every attempt.
    """
    if not tasks:
        return
    connect()
    most = at_most or max(1, _TASKS_A_CPU * math.floor(capacity().total("CPU")))
    call = _call.options(num_gpus=gpus)
    waiting, running = iter(enumerate(tasks)), dict[ray.ObjectRef[Any], int]()
    try:
        while True:
            while len(running) < most and (following := next(waiting, None)) is not None:
                running[call.remote(function, following[1])] = following[0]
            if not running:
                return
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            yield running.pop(done), result_of(done, fix)
    finally:
        for reference in running:
            ray.cancel(reference)


def result_of(done: ray.ObjectRef[Any], fix: str) -> Any:
    """What a task returned, waited for.

    Args:
        done: The task.
        fix: What to do where its process died on every attempt.

    Raises:
        ConfigError: Its process died on every attempt.
    """
    try:
        return ray.get(done)
    except (WorkerCrashedError, OutOfMemoryError) as error:
        raise ConfigError(
            f"a task's process died each time it was tried (out of memory?): {str(error).partition(chr(10))[0]}; {fix}"
        ) from None


@ray.remote(num_cpus=1, max_retries=3)
def _call(function: Callable[[Any], Any], task: Any) -> Any:
    return function(task)
