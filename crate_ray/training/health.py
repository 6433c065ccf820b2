"""What is done about steps without a finite loss or gradient: skip, roll back, and in the end stop with the layer's name.

In: the outcome of every step, in order, the same on all ranks. Out: a RollBack when the run is to go back to a checkpoint, and
what holds from there on: batches that are passed over, and a factor on the learning rate. Both are rules over (step, cursor)
in the run's interventions, so a crash after a rollback repeats the same path. The step itself has skipped the update on the
device; a skipped step counts as a step, and its images as seen.

Loss spikes are counted and reported by a robust z-score. Nothing is done about them: most heal by themselves, and a run that
is left alone can be compared.
"""

import dataclasses
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from types import MappingProxyType
from typing import Any

import torch.distributed as dist

from crate_ray.config import RunConfig
from crate_ray.runs import Intervention, RunFolder, WorkerContext, interventions_of, read_interventions, write_interventions
from crate_ray.training.checkpoint import Checkpoint, delete_checkpoint, list_checkpoints
from crate_ray.training.nonfinite import Finding
from crate_ray.training.step import StepOutcome

log = logging.getLogger(__name__)

DEFAULT_MAX_ROLLBACKS = 3
SPIKE_WINDOW = 128
"""Finite losses that a new one is judged by."""
_SPIKE_LEAST = 20  # with fewer, nothing is a spike
_DEVIATION = 1.4826  # of a normal distribution: its standard deviation is so many median absolute deviations
_LEAST_SPREAD = 1e-3  # of the median: losses that hardly differ have no spikes
_NO_STATE: Mapping[str, Any] = MappingProxyType({})


class TrainingDivergedError(RuntimeError):
    """The loss or its gradient is no longer a number, and what may be tried has been tried."""


class RollBack(Exception):  # noqa: N818  no error: how the loop ends when the run is to go on from an earlier checkpoint
    """Too many steps in a row were skipped: after `Health.intervene` the run goes on as it does after a restart."""


@dataclass(frozen=True)
class Streak:
    """Skipped steps in a row.

    Attributes:
        first_step: The first of them.
        last_step: The last so far.
        skipped_steps: How many.
        cursors: Before the first and after the last batch.
        finding: What was not finite first.
        numbers: Loss and gradient norm of the first.
    """

    first_step: int
    last_step: int
    skipped_steps: int
    cursors: tuple[int, int]
    finding: str
    numbers: str

    def longer(self, step: int, cursor_after: int) -> "Streak":
        """With one step more."""
        cursors = (self.cursors[0], cursor_after)
        return dataclasses.replace(self, last_step=step, skipped_steps=self.skipped_steps + 1, cursors=cursors)


class Health:
    """Judges the outcomes of one attempt; every rank comes to the same judgement.

    Args:
        config: Its section `health`.
        folder: Where rank 0 writes interventions down.
        context: This worker.
        total: Steps of the run.
        interventions: Those on the path of the run (see `find_path`).
        state: What `state` gave for the checkpoint that the attempt goes on from; empty at the first weights.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        context: WorkerContext,
        *,
        total: int,
        interventions: tuple[Intervention, ...] = (),
        state: Mapping[str, Any] = _NO_STATE,
    ) -> None:
        self._config, self._folder, self._context, self._total = config.health, folder, context, total
        self._global_batch = config.train.global_batch
        limit = config.health.max_rollbacks
        self._max_rollbacks = DEFAULT_MAX_ROLLBACKS if limit is None else limit
        self.interventions = interventions
        known = interventions_of(state)
        self._skipped = state.get("skipped", 0) + sum(item.skipped_steps for item in interventions if item not in known)
        self._spikes = Spikes(self._config.spike_z, losses=state.get("losses", ()), count=state.get("spikes", 0))
        streak = state.get("streak")
        self._streak = None if streak is None else Streak(**streak | {"cursors": tuple(streak["cursors"])})

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of it, for JSON."""
        return {
            "interventions": [item.as_dict() for item in self.interventions],
            "skipped": self._skipped,
            "spikes": self._spikes.count,
            "losses": list(self._spikes.losses),
            "streak": None if self._streak is None else dataclasses.asdict(self._streak),
        }

    def metrics(self) -> dict[str, float]:
        """Numbers of the run so far."""
        return {"train/skipped_steps": self._skipped, "train/spikes": self._spikes.count}

    def final_values(self) -> dict[str, float]:
        """What comparisons must know: empty for a run that had no need of help."""
        values = {"final/skipped_steps": float(self._skipped), "final/rollbacks": float(len(self.interventions))}
        return values if any(values.values()) else {}

    @property
    def is_skipping(self) -> bool:
        """Whether the last step was skipped: weights of which nobody knows yet whether they give numbers."""
        return self._streak is not None

    def lr_factor(self, step: int) -> float:
        """What the learning rate of the update after `step` steps is multiplied by."""
        active = (i for i in self.interventions if i.from_step <= step < i.from_step + i.lr_steps)
        return math.prod(item.lr_factor for item in active)

    def next_cursor(self, cursor: int) -> int:
        """Where to read on: the end of batches that are passed over, or the same place."""
        for begin, end in sorted(item.pass_over for item in self.interventions):
            if begin <= cursor < end:
                cursor = end
        return cursor

    def see(self, step: int, outcome: StepOutcome, *, cursor_after: int, locate: Callable[[], Finding | None]) -> None:
        """Takes in a step; a collective where it is the first of a row of skipped ones.

        Args:
            step: Its number, from 1.
            outcome: Its numbers.
            cursor_after: Of its batch.
            locate: Runs the batch once more and says what is not finite on this rank.

        Raises:
            RollBack: The row is too long.
            TrainingDivergedError: It is, and there have been as many rollbacks as may be.
        """
        if outcome.is_finite:
            self._streak = None
            if (z := self._spikes.see(outcome.loss)) is not None:
                log.warning("loss spike at step %d: %.4g is %.1f deviations above the median", step, outcome.loss, z)
            return
        self._skipped += 1
        if self._streak is None:
            numbers = f"loss {outcome.loss} and gradient norm {outcome.grad_norm}"
            begin = cursor_after - self._global_batch
            self._streak = Streak(step, step, 1, (begin, cursor_after), self._first_finding(locate), numbers)
            log.warning("%s at step %d: skipped; %s", numbers, step, self._streak.finding)
        else:
            self._streak = self._streak.longer(step, cursor_after)
        if self._streak.skipped_steps >= self._config.max_skipped or step == self._total:
            self._judge(self._streak)

    def see_evaluation(self, values: Mapping[str, float]) -> None:
        """A loss on validation that is no number between skipped steps: it is the weights, and no batch will change it.

        Raises:
            RollBack: As `see`.
            TrainingDivergedError: As `see`.
        """
        if self._streak is not None and not math.isfinite(values.get("eval/loss", 0.0)):
            self._judge(self._streak)

    def _judge(self, streak: Streak) -> None:
        """The row of skipped steps is too long."""
        rollbacks = len(self.interventions)
        if rollbacks >= self._max_rollbacks:
            raise TrainingDivergedError(
                f"{streak.numbers} at step {streak.first_step}; {streak.finding}. {streak.skipped_steps} step(s) in a row were "
                f"skipped, after {rollbacks} rollback(s) of at most {self._max_rollbacks} (health.max_rollbacks); the last "
                "checkpoint is from before it. Lower optimizer.lr or set train.clip_norm"
            )
        raise RollBack

    def _first_finding(self, locate: Callable[[], Finding | None]) -> str:
        """The earliest of all ranks: all have the same weights, not the same images."""
        found = [locate()]
        if self._context.world_size > 1:
            found = found * self._context.world_size
            dist.all_gather_object(found, found[0])
        ranked = [(finding.phase, rank, finding.text) for rank, finding in enumerate(found) if finding is not None]
        if not ranked:
            return "all was finite when the batch was run again"
        phase, rank, text = min(ranked)
        return f"{text} (rank {rank})" if self._context.world_size > 1 and phase in (1, 2) else text

    def intervene(self) -> None:
        """After a RollBack: rank 0 writes down where the run goes back to and what it does differently from there on.

        It goes back to the newest checkpoint from before the row of skipped steps. Where the last rollback went there too, and
        not one finite step came of it, the weights there are no good: it goes back to the one before that, but never behind the
        oldest, which a fault that stays would delete. Without any, the run begins again with its first weights.
        """
        if self._context.rank != 0:
            return
        assert self._streak is not None
        streak, steps = self._streak, [checkpoint.step for checkpoint in list_checkpoints(self._folder)]
        last = self.interventions[-1].from_step if self.interventions else None
        limit = last if last == streak.first_step - 1 else streak.first_step
        good = [step for step in steps if step < streak.first_step]
        intervention = Intervention(
            from_step=max((step for step in good if step < limit), default=min(good, default=0)),
            first_step=streak.first_step,
            last_step=streak.last_step,
            skipped_steps=streak.skipped_steps,
            pass_over=streak.cursors,
            lr_factor=self._config.lr_factor,
            lr_steps=self._config.lr_steps,
            finding=streak.finding,
            time=round(time.time(), 3),
            attempt=self._context.attempt,
        )
        log.warning("%s", intervention.sentence())
        write_interventions(self._folder, (*self.interventions, intervention))


def find_path(folder: RunFolder) -> tuple[Checkpoint | None, tuple[Intervention, ...]]:
    """The newest checkpoint on the path of the run, and the interventions of that path; rank 0 calls it.

    A checkpoint that a rollback went back behind is of an abandoned path, and is deleted. One that was copied from another
    run brings its interventions with it.
    """
    held = read_interventions(folder)
    for checkpoint in reversed(list_checkpoints(folder)):
        known = interventions_of(checkpoint.state.get("health", {}))
        if any(item.from_step < checkpoint.step and item not in known for item in held):
            delete_checkpoint(checkpoint)
            continue
        path = (*known, *(item for item in held if item not in known))
        if path != held:
            write_interventions(folder, path)
        return checkpoint, path
    return None, held


class Spikes:
    """Counts losses far above the median of those before.

    Args:
        z: From which a loss counts: (loss - median) / (1.4826 median absolute deviation).
        losses: Those before.
        count: Of spikes before.
    """

    def __init__(self, z: float, *, losses: Sequence[float] = (), count: int = 0) -> None:
        self._z = z
        self.losses = deque(losses, maxlen=SPIKE_WINDOW)
        self.count = count

    def see(self, loss: float) -> float | None:
        """Takes in a finite loss; its z-score where it is a spike."""
        z = self._score(loss)
        self.losses.append(loss)
        if z < self._z:
            return None
        self.count += 1
        return z

    def _score(self, loss: float) -> float:
        if len(self.losses) < _SPIKE_LEAST:
            return 0.0
        middle = median(self.losses)
        spread = _DEVIATION * median(abs(value - middle) for value in self.losses)
        return (loss - middle) / max(spread, _LEAST_SPREAD * abs(middle), 1e-12)
