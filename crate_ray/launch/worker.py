"""One Ray Train worker: the loop's WorkerContext on top of Ray.

In: a payload of plain values from the driver. Out: how the loop ended, as a plain mapping; everything
else goes to the run folder. Checkpoints are ours: Ray is only told that one exists, without a copy.
"""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

import ray
import ray.train
import torch

from crate_ray import storage
from crate_ray.config import RunConfig
from crate_ray.data import BatchReader, open_reader
from crate_ray.launch.causes import WorkersPausedError
from crate_ray.launch.switch import StopSwitch
from crate_ray.runs import RunFolder
from crate_ray.training.health import TrainingDivergedError
from crate_ray.training.loop import run_training
from crate_ray.training.profiling import ProfiledSteps

log = logging.getLogger(__name__)

REPORT_S = 5.0  # for the last reports to reach Ray; nothing of ours depends on them


class RayContext:
    """A Ray Train worker as the loop sees it.

    Args:
        line: A RunLine.
        folder: The run.
        attempt: See WorkerContext.
        is_followed: Whether the driver takes evaluations from the line, and releases each.
    """

    def __init__(self, line: Any, folder: RunFolder, attempt: int, *, is_followed: bool) -> None:
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.local_rank = context.get_local_rank()
        self.attempt = attempt
        self._line = line
        self._is_followed = is_followed and self.rank == 0
        self._reporter = Reporter()
        self._switch = StopSwitch(line, folder, attempt)
        if self._is_followed:
            group = ray.util.get_current_placement_group()
            self._post({"placement_group": group.id.hex() if group else None}, wait=False)
        if self.rank == 0:
            self._switch.start()

    def _post(self, event: dict[str, Any], *, wait: bool) -> None:
        try:
            ray.get(self._line.post.remote(event, wait=wait))
        except ray.exceptions.ActorDiedError:
            self._switch.give_up()

    def stop_requested(self) -> bool:
        """See WorkerContext."""
        return self._switch.is_set

    @property
    def pause_reason(self) -> str | None:
        """Why others are to go on after this group; None when the run is to stop. Only rank 0 knows."""
        return self._switch.pause_reason

    def checkpoint_written(self, step: int, uri: str) -> None:
        """Tells Ray of the checkpoint, without waiting for it."""
        self._reporter.put(step, uri if self.rank == 0 else None)

    def heartbeat(self, step: int) -> None:
        """See WorkerContext."""

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """Rank 0 of a followed run waits until the driver has seen the values; the others wait for it in their next step."""
        if self._is_followed:
            self._post({"step": step, "values": dict(values)}, wait=True)
            with contextlib.suppress(ray.exceptions.RayError):  # busy or gone: the watch asks again, and decides
                self._switch.ask()  # the next step carries a wish to the others, half a second before the watch would

    def finish(self) -> None:
        """Gives Ray some seconds to hear of the last checkpoints."""
        self._reporter.close()

    def close(self) -> None:
        """Ends the watch."""
        self._switch.close()


class Reporter:
    """Tells Ray of checkpoints in a thread: Ray takes one each time its controller polls, and would hold up the step till then.

    A report is a barrier of all ranks, so each rank makes all of them, in the same order.
    """

    def __init__(self) -> None:
        self._written: queue.SimpleQueue[tuple[int, str | None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._report, name="reporter", daemon=True)
        self._thread.start()

    def put(self, step: int, uri: str | None) -> None:
        """Takes a checkpoint, or on other ranks than 0 the word that there is one."""
        self._written.put((step, uri))

    def close(self) -> None:
        """Waits up to REPORT_S for what was put."""
        self._written.put(None)
        self._thread.join(REPORT_S)

    def _report(self) -> None:
        while (written := self._written.get()) is not None:
            step, uri = written
            checkpoint = None
            if uri is not None:
                store, path = storage.open_store(uri)
                checkpoint = ray.train.Checkpoint(path, filesystem=store)
            mode = ray.train.CheckpointUploadMode.NO_UPLOAD
            try:
                ray.train.report({"step": step}, checkpoint=checkpoint, checkpoint_upload_mode=mode)
            except ray.exceptions.RayError as error:  # a rank or the controller is gone; the manifests stand
                log.warning("Ray is told of no checkpoint from step %d on: %s", step, type(error).__name__)
                return


def train_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """What every Ray Train worker runs.

    Args:
        payload: config (resolved, as a mapping), folder (URI), attempt, line (RunLine), is_followed, profile (first
            and last step, or None).

    Returns:
        state, step and reason of this rank, and whether the loss diverged.

    Raises:
        WorkersPausedError: A checkpoint was written, for another group to go on from.
    """
    config = RunConfig.parse(payload["config"])
    folder = RunFolder(payload["folder"])
    torch.set_num_threads(max(1, int(config.scale.cpus_per_worker)))
    context = RayContext(payload["line"], folder, payload["attempt"], is_followed=payload["is_followed"])
    _log_to(folder, context.rank)
    try:
        result = run_training(config, folder, context, open_batches=_who_decodes(config), profiled=_profiled(payload))
    except TrainingDivergedError as error:
        # Every rank sees the same loss; starting again from the checkpoint would diverge again.
        return {"state": "FAILED", "step": None, "reason": str(error), "diverged": True}
    finally:
        context.close()
    context.finish()
    if result.state == "KILLED" and context.pause_reason is not None:
        log.info("leaving with a checkpoint at step %d: %s", result.step, context.pause_reason)
        raise WorkersPausedError(f"{context.pause_reason}; a checkpoint was written at step {result.step}")
    return {"state": result.state, "step": result.step, "reason": None, "diverged": False}


def _profiled(payload: dict[str, Any]) -> ProfiledSteps | None:
    return None if payload["profile"] is None else ProfiledSteps(*payload["profile"])


def _who_decodes(config: RunConfig) -> Callable[..., BatchReader]:
    """Loader threads of this worker, or actors anywhere on the cluster."""
    if config.data.preprocess is None:
        return open_reader
    from crate_ray.launch.preprocess import open_streamed_reader

    return open_streamed_reader


def _log_to(folder: RunFolder, rank: int) -> None:
    """Keeps what rank 0 has to say beside the run, where the folder can be appended to."""
    if rank != 0 or not folder.is_local:
        return
    handler = logging.FileHandler(storage.local_path(folder.path("train.log")))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("crate_ray")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
