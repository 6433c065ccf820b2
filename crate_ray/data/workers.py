"""One function over many tasks: in this process, or in processes of this machine.

In: a picklable function and tasks. Out: results with the positions of their tasks, as they come. Work on a cluster has the same
form (`crate_ray.launch.indexing`), so that who computes is chosen by the caller and nothing here knows of it.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from typing import Any, Protocol, TypeVar

from crate_ray.config import ConfigError

T = TypeVar("T")
R = TypeVar("R")


class TaskMap(Protocol):
    """Computes `function(task)` for every task and yields (position of the task, result), in any order."""

    def __call__(self, function: Callable[[T], R], tasks: Sequence[T], /) -> Iterator[tuple[int, R]]:
        """Start the tasks; what is not consumed need not be computed."""


def map_here(function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[tuple[int, R]]:
    """One task after the other, in this process."""
    return enumerate(map(function, tasks))


def _map_in_processes(function: Callable[[T], R], tasks: Sequence[T], *, workers: int) -> Iterator[tuple[int, R]]:
    # Spawned, not forked: a fork copies the locks of torch's thread pools in whatever state they are.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(function, task): number for number, task in enumerate(tasks)}
        try:
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
        except BrokenProcessPool:
            raise ConfigError(
                f"one of {workers} processes was ended from outside (out of memory?); give the same command again with fewer "
                "--workers (an interrupted indexing or build goes on where it stopped)"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def map_with(workers: int) -> TaskMap:
    """A map over this many processes; over none of its own for one."""
    chosen: Any = partial(_map_in_processes, workers=workers) if workers > 1 else map_here
    mapped: TaskMap = chosen
    return mapped
