"""How much of a machine programs of others use while this one works.

In: the counters of the system and of this process. Out: processor cores that others kept busy since the last look, and how
many of them compute on the GPU. Only cores that this process may run on count, so a neighbour pinned elsewhere is none; one
that takes memory bandwidth alone is not seen.
"""

import logging
import os
import time
from dataclasses import dataclass

import torch

from crate_ray.training.system import gpu_handle, visible_gpus

log = logging.getLogger(__name__)

QUIET_SHARE = 0.05
"""Of this machine's cores: below it, and below QUIET_CORES, others do not count."""
QUIET_CORES = 0.1


@dataclass(frozen=True)
class OtherLoad:
    """What others used.

    Attributes:
        cores: Busy ones, on average.
        gpu_processes: Programs that compute on the GPU; None where the driver does not tell.
    """

    cores: float
    gpu_processes: int | None

    @property
    def is_quiet(self) -> bool:
        """Whether timings hold beside it."""
        return self.cores <= max(QUIET_CORES, QUIET_SHARE * len(_own_cores())) and not self.gpu_processes

    def sentence(self) -> str:
        """'other programs use 1.3 of 2 cores and 1 of them the GPU'."""
        text = f"other programs use {self.cores:.1f} of {len(_own_cores())} cores"
        return f"{text} and {self.gpu_processes} of them the GPU" if self.gpu_processes else text


class OtherLoadWatch:
    """Looks at what others used since the last look.

    Args:
        device: Where the timed work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = _counters()

    def look(self) -> OtherLoad:
        """What others used since the last call, or since it was made; of use after a second or more."""
        now = _counters()
        busy_s, own_s, seconds = (after - before for after, before in zip(now, self._before, strict=True))
        self._before = now
        return OtherLoad(max(0.0, busy_s - own_s) / max(seconds, 1e-9), other_gpu_processes(self._device))


def _counters() -> tuple[float, float, float]:
    """Busy seconds of all cores that this process may use, its own ones, and the time."""
    import psutil

    own_cores = _own_cores()
    cores = [times for number, times in enumerate(psutil.cpu_times(percpu=True)) if number in own_cores]
    busy_s = sum(sum(times) - _waiting_s(times) for times in cores)
    return busy_s, sum(os.times()[:4]), time.monotonic()


def _waiting_s(times: object) -> float:
    """Idle, and what is counted twice: the time of guests is part of user and nice."""
    return sum(float(getattr(times, name, 0.0)) for name in ("idle", "iowait", "guest", "guest_nice"))


def _own_cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def other_gpu_processes(device: torch.device) -> int | None:
    """Programs on the GPU beside this one; None on a CPU, or where the driver does not tell.

    They are counted, not named: in a container the driver's process numbers are not ours.
    """
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = gpu_handle(pynvml, visible_gpus(pynvml)[device.index or 0])
        programs = len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
    except pynvml.NVMLError as error:
        log.debug("no list of the programs on the GPU: %s", error)
        return None
    is_own_there = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return max(0, programs - int(is_own_there))
