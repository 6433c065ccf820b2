"""What the machine does while a run trains: processors, memory, disk, network and GPUs of each node.

In: the counters of the system, every `tracking.system_every_s` seconds, by a thread of one worker a node. Out: records of a
stream of their own, system/rank<N>.jsonl, under the names that MLflow's page of system metrics draws; those of other nodes
than rank 0's are called by the lowest rank there, `system/node_4/...`. Their step is the age of the run in seconds: it never
falls, through restarts too. Measured where the work is, so that nothing depends on where the driver is. The trade-off: counters
are the whole node's, of which other programs may use a part; GPUs are only those that the worker may use.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from crate_ray.runs import RecordWriter, RunFolder, WorkerContext, system_stream

log = logging.getLogger(__name__)

_SEGMENT_SECONDS = 60.0  # on an object store every segment is a paid request
_FIRST_SECONDS = 2.0
_JOIN_SECONDS = 5.0
_MEGABYTE = 1e6

Sample = dict[str, float]


@contextmanager
def watch_system(folder: RunFolder, context: WorkerContext, *, every_s: float | None) -> Iterator[None]:
    """Records what this node does until the block ends; nothing on workers that are not the first of their node.

    Args:
        folder: The run.
        context: This worker.
        every_s: Seconds between two samples; None for none at all.
    """
    watch = None if every_s is None or context.local_rank != 0 else _start(folder, context, every_s)
    try:
        yield
    finally:
        if watch is not None:
            watch.close()


def _start(folder: RunFolder, context: WorkerContext, every_s: float) -> "_SystemWatch | None":
    try:
        probes = _open_probes()
        return _SystemWatch(folder, context, probes, every_s) if probes else None
    except Exception as error:  # noqa: BLE001 - the boundary: a sandbox that hides its counters ends no run
        log.warning("no system metrics: %s: %s", type(error).__name__, error)
        return None


class _SystemWatch:
    """The thread and its writer. Training never waits for it, and none of its faults reaches training."""

    def __init__(self, folder: RunFolder, context: WorkerContext, probes: list[Callable[[], Sample]], every_s: float) -> None:
        self._probes, self._every_s = probes, every_s
        self._prefix = "system/" if context.rank == 0 else f"system/node_{context.rank}/"
        self._began = float((folder.read_json("run_meta.json") or {}).get("created", time.time()))
        self._writer = RecordWriter(
            folder, context.attempt, stream=system_stream(context.rank), segment_s=max(_SEGMENT_SECONDS, every_s)
        )
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Takes a last sample and closes the stream."""
        self._closing.set()
        self._thread.join(_JOIN_SECONDS)
        if not self._thread.is_alive():  # a probe that hangs, of a driver in trouble, is left behind
            self._writer.close()

    def _run(self) -> None:
        try:
            for probe in self._probes:
                probe()  # shares of time are those since the call before
            is_last = self._closing.wait(min(_FIRST_SECONDS, self._every_s))
            while True:
                values = {f"{self._prefix}{key}": round(value, 1) for probe in self._probes for key, value in probe().items()}
                self._writer.write(max(int(time.time() - self._began), 0), values)
                if is_last:
                    return
                is_last = self._closing.wait(self._every_s)
        except Exception as error:  # noqa: BLE001 - the boundary: no counter of the system may end a run
            log.warning("system metrics end here: %s: %s", type(error).__name__, error)


def _open_probes() -> list[Callable[[], Sample]]:
    """What can be measured on this machine: nothing without psutil, no GPU without nvidia-ml-py or a driver."""
    try:
        import psutil
    except ImportError:
        log.info("no system metrics: psutil is not installed")
        return []
    probes: list[Callable[[], Sample]] = [_host_probe(psutil)]
    gpus = _open_gpus()
    return [*probes, gpus] if gpus is not None else probes


def _host_probe(psutil: ModuleType) -> Callable[[], Sample]:
    first = psutil.net_io_counters()

    def sample() -> Sample:
        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(os.sep), psutil.net_io_counters()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MEGABYTE,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / _MEGABYTE,
            "disk_available_megabytes": disk.free / _MEGABYTE,
        }
        if first is not None and network is not None:  # None in a container without interfaces
            values["network_receive_megabytes"] = (network.bytes_recv - first.bytes_recv) / _MEGABYTE
            values["network_transmit_megabytes"] = (network.bytes_sent - first.bytes_sent) / _MEGABYTE
        return values

    return sample


def _open_gpus() -> Callable[[], Sample] | None:
    """A probe of the GPUs that this process may use, numbered as torch does; None where there are none to be asked."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handles = [gpu_handle(pynvml, name) for name in visible_gpus(pynvml)]
    except pynvml.NVMLError as error:  # no driver, or no GPU
        log.debug("no GPU metrics: %s", error)
        return None
    return (
        (lambda: {key: v for i, gpu in enumerate(handles) for key, v in _gpu_sample(pynvml, i, gpu).items()})
        if handles
        else None
    )


def visible_gpus(pynvml: Any) -> list[str]:
    """Numbers or UUIDs of the devices, as CUDA_VISIBLE_DEVICES or the driver says."""
    stated = os.environ.get("CUDA_VISIBLE_DEVICES")
    if stated is None:
        return [str(number) for number in range(pynvml.nvmlDeviceGetCount())]
    return [name.strip() for name in stated.split(",") if name.strip() not in ("", "-1")]


def gpu_handle(pynvml: Any, name: str) -> Any:
    """The driver's handle of a device by its number or UUID."""
    if name.isdecimal():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    return pynvml.nvmlDeviceGetHandleByUUID(name)


def _gpu_sample(pynvml: Any, number: int, handle: Any) -> Sample:
    """What the driver says of one GPU; what it does not know of this kind, as of a MIG slice, is absent."""
    values: Sample = {}

    def memory() -> None:
        found = pynvml.nvmlDeviceGetMemoryInfo(handle)
        values[f"gpu_{number}_memory_usage_percentage"] = 100 * found.used / found.total
        values[f"gpu_{number}_memory_usage_megabytes"] = found.used / _MEGABYTE

    def utilization() -> None:
        values[f"gpu_{number}_utilization_percentage"] = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu

    def power() -> None:
        used_mw, limit_mw = pynvml.nvmlDeviceGetPowerUsage(handle), pynvml.nvmlDeviceGetEnforcedPowerLimit(handle)
        values[f"gpu_{number}_power_usage_watts"] = used_mw / 1000
        values[f"gpu_{number}_power_usage_percentage"] = 100 * used_mw / limit_mw

    for measure in (memory, utilization, power):
        try:
            measure()
        except pynvml.NVMLError as error:
            log.debug("GPU %d: no %s: %s", number, measure.__name__, error)
    return values
