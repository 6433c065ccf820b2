"""Real processes for tests: the ranks of a gloo group, each of which may fail or hang, with a hard end."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from crate_ray.config import RunConfig
from crate_ray.data import BatchReader, open_reader
from crate_ray.runs import RunFolder, read_records
from crate_ray.training.loop import run_training

TIMEOUT_S = 180


def go_on(rank: int, step: int) -> None:
    """Nothing happens."""


@dataclass
class GlooRank:
    """One rank; what it does after a step is `at_step`'s."""

    rank: int
    world_size: int
    attempt: int = 1
    local_rank: int = 0
    at_step: Callable[[int, int], None] = go_on

    def stop_requested(self) -> bool:
        return False

    def checkpoint_written(self, step: int, uri: str) -> None: ...

    def heartbeat(self, step: int) -> None:
        self.at_step(self.rank, step)

    def evaluated(self, step: int, values: Mapping[str, float]) -> None: ...


@dataclass
class Group:
    """What the ranks of an attempt run; everything in it can be pickled."""

    config: RunConfig
    folder: str
    world_size: int = 2
    attempt: int = 1
    at_step: Callable[[int, int], None] = go_on
    open_batches: Callable[..., BatchReader] = open_reader

    def start(self) -> list[BaseProcess]:
        rendezvous = Path(f"{self.folder}-rendezvous-{self.attempt}")
        body = self.config.model_dump(mode="json")
        rest = (self.world_size, body, self.folder, self.attempt, str(rendezvous), self.at_step, self.open_batches)
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=_train, args=(rank, *rest)) for rank in range(self.world_size)]
        for process in processes:
            process.start()
        return list(processes)

    def run(self) -> list[int]:
        """Exit codes, in the order of ranks; ranks that stand still when another has ended for some seconds are killed."""
        processes = self.start()
        try:
            wait_for(lambda: any(not process.is_alive() for process in processes))
            deadline = time.monotonic() + (TIMEOUT_S if processes[0].exitcode == 0 else 20)
            while any(process.is_alive() and not is_stopped(process) for process in processes):
                assert time.monotonic() < deadline, "a rank neither ended nor stands still"
                time.sleep(0.05)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [int(process.exitcode or 0) for process in processes]


def _train(
    rank: int,
    world_size: int,
    config: dict[str, Any],
    folder: str,
    attempt: int,
    rendezvous: str,
    at_step: Callable[[int, int], None],
    open_batches: Callable[..., BatchReader],
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    context = GlooRank(rank, world_size, attempt, at_step=at_step)
    run_training(RunConfig.parse(config), RunFolder(folder), context, open_batches=open_batches)
    dist.destroy_process_group()


def is_stopped(process: BaseProcess) -> bool:
    """Whether a process was stopped by a signal, and stands still."""
    try:
        status = Path(f"/proc/{process.pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] == "T"


def wait_for(is_done: Callable[[], bool]) -> None:
    """Until it is, or TIMEOUT_S have passed."""
    deadline = time.monotonic() + TIMEOUT_S
    while not is_done():
        assert time.monotonic() < deadline, f"not within {TIMEOUT_S} s"
        time.sleep(0.05)


def stop_itself() -> None:
    """As `kill -STOP`: nothing of the process runs any more."""
    os.kill(os.getpid(), signal.SIGSTOP)


def values(folder: RunFolder, key: str) -> dict[int, float]:
    """A key of the records by step."""
    return {record.step: record.values[key] for record in read_records(folder) if key in record.values}
