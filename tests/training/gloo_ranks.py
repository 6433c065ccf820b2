"""Several ranks as processes of this machine that do one thing together, with a hard end."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessContext, start_processes

TIMEOUT_S = 300


@dataclass
class GlooContext:
    """A worker whose wish to stop comes after a step; `ranks_per_node` lets one machine be several."""

    rank: int
    world_size: int
    stop_after: int | None = None
    attempt: int = 1
    ranks_per_node: int = 64
    step: int = 0

    @property
    def local_rank(self) -> int:
        return self.rank % self.ranks_per_node

    def stop_requested(self) -> bool:
        return self.step == self.stop_after

    def checkpoint_written(self, step: int, uri: str) -> None:
        dist.barrier()

    def heartbeat(self, step: int) -> None:
        self.step = step

    def evaluated(self, step: int, values: Mapping[str, float]) -> None: ...


def run_ranks(world_size: int, body: Callable[..., None], *arguments: Any, scratch: Path) -> None:
    """Calls `body(rank, world_size, *arguments)` in every rank of a group; raises what one of them raises.

    Args:
        world_size: Ranks.
        body: A function of a module, which a new process can import.
        scratch: A folder where the ranks meet; made here.
    """
    scratch.mkdir(exist_ok=True)
    rendezvous = str(scratch / f"rendezvous-{time.monotonic_ns()}")
    context: ProcessContext = start_processes(  # type: ignore[no-untyped-call]
        _in_group, (world_size, rendezvous, body, arguments), nprocs=world_size, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while not context.join(timeout=1, grace_period=5):  # true once all have ended; raises when one failed
            assert time.monotonic() < deadline, f"ranks did not end within {TIMEOUT_S} s"
    finally:
        for process in context.processes:
            process.kill()


def _in_group(rank: int, world_size: int, rendezvous: str, body: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    try:
        body(rank, world_size, *arguments)
    finally:
        dist.destroy_process_group()
