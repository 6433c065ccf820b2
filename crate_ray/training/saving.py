"""When a run is saved, and by whom: a thread writes while the training goes on.

In: tensors and state of a step, from every rank at the same step. Out: whole checkpoints, one at a time, and old ones pruned.
The training thread waits only for the copy to host memory, on a GPU not even for that; a thread lays the files out, hashes and
writes them, hands the records to the store, and writes the manifest last. The price is one more copy of the state in host
memory, held from the first save on, and that a crash may cost the steps of the checkpoint that was under way.

Several ranks: each writes its own files. Ranks agree through `written`, which rides in the all-reduce of every step: the
checkpoint is whole when all parts and the manifest count. Only when a checkpoint is not whole by the next one do they meet.

A write that fails ends no step. The run goes on, says so, and tries again when the next checkpoint is due; after
MAX_FAILURES in a row, or when it was the last one, it ends with one error on every rank. See docs/checkpoints.md.
"""

import json
import logging
import math
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from crate_ray import storage
from crate_ray.config import RunConfig
from crate_ray.models.weight_files import config_metadata
from crate_ray.runs import MetricSink, RunFolder
from crate_ray.training.checkpoint import (
    LARGER_IS_BETTER,
    MANIFEST,
    FileEntry,
    best_checkpoints,
    checkpoint_uri,
    list_checkpoints,
    pin_checkpoint,
    prune_checkpoints,
    saved_configuration,
    write_file,
    write_manifest,
)
from crate_ray.training.disk_space import explained
from crate_ray.training.tensor_files import HostCopy, file_pieces

log = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Checkpoints in a row that could not be written before a run ends."""
_OF_THE_MODEL = ("model.", "ema.")  # files that carry the model's configuration: heads, lambda and eta are in no tensor
_PART_WAIT_S = 60.0  # until a shared file system shows one node what another has written

Files = Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, str]]]
"""Tensors and metadata by file name."""


class CheckpointError(RuntimeError):
    """Checkpoints cannot be written; the message says what to free, and where the run goes on."""


class Ranks(Protocol):
    """What the saver asks of the way in which workers share a model."""

    rank: int
    world_size: int
    num_shards: int

    def sum_up(self, values: Tensor) -> Tensor:
        """Sums over ranks, in place."""
        ...


@dataclass
class _Write:
    """A checkpoint under way, as this rank sees it.

    Attributes:
        step: Of the checkpoint.
        state: For its manifest.
        number: Of this save in this attempt, the same on every rank.
        task: What the thread does now.
        files: What this rank has written.
        counted: Parts done by this rank, the manifest included.
        is_closing: Whether the manifest is being written.
        reason: Why it failed here.
    """

    step: int
    state: Mapping[str, Any]
    number: int
    task: "Future[Mapping[str, FileEntry]] | None" = None
    files: Mapping[str, FileEntry] | None = None
    counted: int = 0
    is_closing: bool = False
    reason: str | None = None


class CheckpointSaver:
    """The checkpoints of one attempt on one rank; every rank calls the same methods at the same steps.

    Args:
        config: The run's.
        folder: The run's.
        ranks: Who shares the model; of `num_shards` ranks each writes files.
        device: Where ranks meet.
        sink: Its records are in the store before a manifest that counts them.
        attempt: Start of the run.
        restored: Step of the checkpoint that this attempt goes on from.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        *,
        ranks: Ranks,
        device: torch.device,
        sink: MetricSink,
        attempt: int,
        restored: int | None = None,
    ) -> None:
        self._config, self._folder, self._ranks, self._device = config, folder, ranks, device
        self._sink, self._attempt = sink, attempt
        self._host = HostCopy()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._write: _Write | None = None
        self._number = 0
        self._failures = 0
        self._lost: tuple[int, str] | None = None  # the newest, where it was not written
        self._newest = restored
        self._finished: list[int] = []
        self._saved_at = time.monotonic()
        self._sign = -1 if LARGER_IS_BETTER[config.best_metric] else 1
        self._best = self._known_best()

    @property
    def written(self) -> int:
        """This rank's parts of the checkpoint under way that are written; its vote."""
        if self._write is None:
            return 0
        if self._write.task is not None and self._write.task.done():
            self._join(self._write)
        return self._write.counted

    def is_overdue(self) -> bool:
        """Whether `checkpoint.every_minutes` have passed on this rank's clock."""
        minutes = self._config.checkpoint.every_minutes
        return minutes is not None and time.monotonic() - self._saved_at > 60 * minutes

    def is_due(self, step: int, evaluation: Mapping[str, float]) -> bool:
        """Whether a step is to be saved by its number, or because it is among the best.

        Args:
            step: Optimizer steps done.
            evaluation: What was measured at this step; empty where nothing was.
        """
        every = self._config.checkpoint.every_steps
        if every is not None and step % every == 0:
            return True
        value, keep = self._rating(evaluation), self._config.checkpoint.keep_best or 0
        return value is not None and keep > 0 and (len(self._best) < keep or value < self._best[-1][0])

    def save(self, step: int, files: Files, state: Mapping[str, Any], *, pin: str | None = None) -> None:
        """Copies what this rank has to host memory and begins to write it; waits for the checkpoint before.

        With `checkpoint.wait` it waits for this one too.

        Args:
            step: Optimizer steps done.
            files: This rank's; most ranks of a plain run have none.
            state: What the run goes on from, as JSON: cursor, train_seconds, evaluation and more.
            pin: Who needs this checkpoint beyond the last and the best ones.

        Raises:
            CheckpointError: The last MAX_FAILURES checkpoints could not be written.
        """
        self.wait()
        copies = self._host.take({name: tensors for name, (tensors, _) in files.items()})
        self._number += 1
        self._write = write = _Write(step, {**state, "records": self._sink.position()}, self._number)
        if files:
            metadata = {name: self._metadata(name, given) for name, (_, given) in files.items()}
            write.task = self._thread.submit(self._write_part, write, copies, metadata, pin)
        self._saved_at = time.monotonic()
        if (value := self._rating(state.get("evaluation", {}))) is not None:
            keep = self._config.checkpoint.keep_best or 0
            self._best = sorted([*self._best, (value, step)])[:keep]
        if self._config.checkpoint.wait:
            self.wait()

    def settle(self, written: int) -> None:
        """Takes note of what all ranks together have written; without waiting.

        Args:
            written: Sum of `written` over ranks, at a step since the last `save`.
        """
        write, shards = self._write, self._ranks.num_shards
        if write is None:
            return
        if written == self._all_parts:
            self._end(write, is_whole=True)
        elif written == shards:
            self._close_parts(write)

    def finished(self) -> list[int]:
        """Steps whose checkpoints have become whole since the last call, on every rank alike."""
        steps, self._finished = self._finished, []
        return steps

    def wait(self, *, is_last: bool = False) -> None:
        """Returns when no checkpoint is under way; every rank must call it.

        Args:
            is_last: There will be no next one that could be written instead.

        Raises:
            CheckpointError: The last MAX_FAILURES checkpoints could not be written, or the last one of the run.
        """
        write = self._write
        if write is None:
            # With `checkpoint.wait` the fault was seen at once, when nobody knew that it was the last one.
            if is_last and self._lost is not None:
                raise CheckpointError(self._verdict(*self._lost, is_last=True))
            return
        self._join(write)
        total = self._sum(write.counted)
        if self._ranks.num_shards > 1:
            if total == self._ranks.num_shards:
                self._close_parts(write)
            self._join(write)
            total = self._sum(write.counted)
        self._end(write, is_whole=total == self._all_parts, is_last=is_last)

    def close(self) -> None:
        """Lets the thread finish what it has begun."""
        self._thread.shutdown()

    @property
    def _all_parts(self) -> int:
        """What `written` sums up to when the checkpoint is whole; a single part is written with its manifest."""
        shards = self._ranks.num_shards
        return 1 if shards == 1 else shards + 1

    def _sum(self, count: int) -> int:
        return int(self._ranks.sum_up(torch.tensor(float(count), device=self._device)))

    def _rating(self, evaluation: Mapping[str, float]) -> float | None:
        """The metric that the best are chosen by, the smaller the better; None where they are not, or it was not measured."""
        value = evaluation.get(self._config.best_metric)
        if self._config.checkpoint.keep_best is None or value is None or not math.isfinite(value):
            return None
        return self._sign * value

    def _known_best(self) -> list[tuple[float, int]]:
        """Rating and step of the best checkpoints that are there already, the same on every rank."""
        keep = self._config.checkpoint.keep_best
        if keep is None:
            return []
        found: list[Any] = [None]
        if self._ranks.rank == 0:
            metric = self._config.best_metric
            best = best_checkpoints(list_checkpoints(self._folder), metric)[:keep]
            found = [[(self._sign * checkpoint.state["evaluation"][metric], checkpoint.step) for checkpoint in best]]
        if self._ranks.world_size > 1:
            dist.broadcast_object_list(found)
        return list(found[0])

    def _metadata(self, name: str, given: Mapping[str, str]) -> dict[str, str]:
        return {**given, **config_metadata(self._config.model)} if name.startswith(_OF_THE_MODEL) else dict(given)

    def _join(self, write: _Write) -> None:
        """Waits for the thread, and takes note of how it went; what is no fault of a store is raised."""
        if write.task is None:
            return
        task, write.task = write.task, None
        try:
            write.files = task.result()
            write.counted += 1
        except OSError as error:
            write.reason = str(error)
            log.error("the checkpoint of step %d was not written: %s", write.step, error)

    def _end(self, write: _Write, *, is_whole: bool, is_last: bool = False) -> None:
        self._write = None
        if is_whole:
            self._failures, self._newest, self._lost = 0, write.step, None
            self._finished.append(write.step)
            return
        self._failures += 1
        self._best = [(value, step) for value, step in self._best if step != write.step]
        reason = self._shared_reason(write)
        self._lost = write.step, reason
        if is_last or self._failures >= MAX_FAILURES:
            raise CheckpointError(self._verdict(write.step, reason, is_last=is_last))
        if self._ranks.rank == 0:
            left = MAX_FAILURES - self._failures
            log.error("training goes on without the checkpoint of step %d; failures left: %d", write.step, left)

    def _shared_reason(self, write: _Write) -> str:
        """Why the first rank that failed did."""
        reasons = [write.reason]
        if self._ranks.world_size > 1:
            reasons = [None] * self._ranks.world_size
            dist.all_gather_object(reasons, write.reason)
        return next((reason for reason in reasons if reason is not None), "a part is missing")

    def _verdict(self, step: int, reason: str, *, is_last: bool) -> str:
        count = "the last checkpoint" if is_last else f"{MAX_FAILURES} checkpoints in a row"
        place = "starts from the beginning"
        if self._newest is not None:
            place = f"goes on from step {self._newest}, {checkpoint_uri(self._folder, self._newest)}"
        return f"{count}, up to step {step}, could not be written: {reason}. Started again, the run {place}"

    def _write_part(
        self,
        write: _Write,
        copies: Mapping[str, Mapping[str, Tensor]],
        metadata: Mapping[str, Mapping[str, str]],
        pin: str | None,
    ) -> Mapping[str, FileEntry]:
        """In the thread: this rank's files; of a run that is not sharded the whole checkpoint."""
        self._host.wait()
        pieces = {name: file_pieces(tensors, metadata[name]) for name, tensors in copies.items()}
        uri = checkpoint_uri(self._folder, write.step)
        if self._ranks.rank == 0:
            self._prune(writing=write.step)  # what an earlier one that failed has left takes room that this one may need
        needed = sum(len(piece) for file in pieces.values() for piece in file)
        with explained(self._config, self._folder, needed=needed):
            if self._ranks.rank == 0:
                if pin is not None:
                    pin_checkpoint(self._folder, write.step, by=pin)  # before it is whole, so that no crash unpins it
                storage.delete(storage.join(uri, MANIFEST))  # one of an earlier checkpoint of this step must not vouch for this
            files = {name: write_file(uri, name, file) for name, file in pieces.items()}
            if self._ranks.num_shards == 1:
                self._write_manifest(write, files)
            elif self._ranks.rank > 0:
                storage.write_atomic(self._part_uri(write, self._ranks.rank), json.dumps(files))
        return files

    def _close_parts(self, write: _Write) -> None:
        """Rank 0 begins to write the manifest, once."""
        if self._ranks.rank == 0 and not write.is_closing:
            self._join(write)
            write.is_closing = True
            write.task = self._thread.submit(self._write_whole, write)

    def _write_whole(self, write: _Write) -> Mapping[str, FileEntry]:
        """In the thread of rank 0: the manifest over the parts of all ranks."""
        assert write.files is not None
        files = dict(write.files)
        with explained(self._config, self._folder, needed=0):
            for rank in range(1, self._ranks.num_shards):
                files.update(self._read_part(write, rank))
            self._write_manifest(write, files)
        return files

    def _part_uri(self, write: _Write, rank: int) -> str:
        """Unlike that of any other attempt or save: what an earlier one has left is never taken for this."""
        name = f"part-{self._attempt:04d}-{write.number:05d}-{rank:05d}.json"
        return storage.join(checkpoint_uri(self._folder, write.step), name)

    def _read_part(self, write: _Write, rank: int) -> dict[str, FileEntry]:
        uri, deadline = self._part_uri(write, rank), time.monotonic() + _PART_WAIT_S
        while True:
            try:
                return dict(json.loads(storage.read_text(uri)))
            except FileNotFoundError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def _write_manifest(self, write: _Write, files: Mapping[str, FileEntry]) -> None:
        self._sink.flush()
        write_manifest(
            self._folder,
            write.step,
            files=files,
            state=write.state,
            configuration=saved_configuration(self._config),
            attempt=self._attempt,
        )
        self._prune()

    def _prune(self, *, writing: int | None = None) -> None:
        keep = self._config.checkpoint
        try:
            prune_checkpoints(
                self._folder,
                keep_last=keep.keep_last,
                keep_best=keep.keep_best or 0,
                best_metric=self._config.best_metric,
                writing=writing,
            )
        except OSError as error:
            log.warning("old checkpoints of %s were not deleted: %s", self._folder.uri, error)
