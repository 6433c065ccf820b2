"""One Ray Train worker: the loop's WorkerContext on top of Ray.

In: a payload of plain values from the driver. Out: how the loop ended, as a plain mapping; everything
else goes to the run folder. Checkpoints are ours: Ray is only told that one exists, without a copy.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import ray
import ray.train
import torch

from crate_ray import storage
from crate_ray.config import RunConfig
from crate_ray.data import BatchReader, open_reader
from crate_ray.runs import RunFolder
from crate_ray.training.loop import TrainingDivergedError, run_training

POLL_S = 0.5


class RayContext:
    """A Ray Train worker as the loop sees it.

    Args:
        line: A RunLine.
        attempt: See WorkerContext.
        is_followed: Whether the driver takes evaluations from the line, and releases each.
    """

    def __init__(self, line: Any, attempt: int, *, is_followed: bool) -> None:
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.local_rank = context.get_local_rank()
        self.attempt = attempt
        self._line = line
        self._is_followed = is_followed and self.rank == 0
        self._stop = threading.Event()
        self._closed = threading.Event()
        if self._is_followed:
            group = ray.util.get_current_placement_group()
            self._post({"placement_group": group.id.hex() if group else None}, wait=False)
        if self.rank == 0:
            threading.Thread(target=self._watch, name="stop-switch", daemon=True).start()

    def _watch(self) -> None:
        while not self._closed.wait(POLL_S):
            try:
                if ray.get(self._line.is_set.remote(), timeout=10):
                    self._stop.set()
                    return
            except ray.exceptions.ActorDiedError:
                self._stop.set()  # the driver is gone: save and end
                return
            except ray.exceptions.RayError:
                continue  # a passing fault of the network; the next poll asks again

    def _post(self, event: dict[str, Any], *, wait: bool) -> None:
        try:
            ray.get(self._line.post.remote(event, wait=wait))
        except ray.exceptions.ActorDiedError:
            self._stop.set()

    def stop_requested(self) -> bool:
        """See WorkerContext."""
        return self._stop.is_set()

    def checkpoint_written(self, step: int, uri: str) -> None:
        """Tells Ray of the checkpoint; a barrier of all ranks."""
        checkpoint = None
        if self.rank == 0:
            store, path = storage.open_store(uri)
            checkpoint = ray.train.Checkpoint(path, filesystem=store)
        ray.train.report({"step": step}, checkpoint=checkpoint, checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD)

    def heartbeat(self, step: int) -> None:
        """See WorkerContext."""

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """Rank 0 of a followed run waits until the driver has seen the values; the others wait for it in their next step."""
        if self._is_followed:
            self._post({"step": step, "values": dict(values)}, wait=True)
            if ray.get(self._line.is_set.remote()):
                self._stop.set()  # the next step carries the wish to the others, half a second before the watch would

    def close(self) -> None:
        """Ends the watcher."""
        self._closed.set()


def train_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """What every Ray Train worker runs.

    Args:
        payload: config (resolved, as a mapping), folder (URI), attempt, line (RunLine), is_followed.

    Returns:
        state, step and reason of this rank, and whether the loss diverged.
    """
    config = RunConfig.parse(payload["config"])
    folder = RunFolder(payload["folder"])
    torch.set_num_threads(max(1, int(config.scale.cpus_per_worker)))
    context = RayContext(payload["line"], payload["attempt"], is_followed=payload["is_followed"])
    _log_to(folder, context.rank)
    try:
        result = run_training(config, folder, context, open_batches=_who_decodes(config))
    except TrainingDivergedError as error:
        # Every rank sees the same loss; starting again from the checkpoint would diverge again.
        return {"state": "FAILED", "step": None, "reason": str(error), "diverged": True}
    finally:
        context.close()
    return {"state": result.state, "step": result.step, "reason": None, "diverged": False}


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
