"""The training loop, written once for a plain process, a Ray Train worker and a Tune trial.

In: a RunConfig, its folder and a WorkerContext. Out: records, checkpoints and final numbers in the run
folder; the return value only says how it ended. The loop knows neither ray nor mlflow.
"""

import logging
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch.distributed as dist
from torch import Tensor

from crate_ray.config import RunConfig
from crate_ray.data import Batch, BatchReader, load_source, open_reader
from crate_ray.models import Classifier, MaskedAutoencoder, create_model
from crate_ray.runs import Intervention, MetricSink, NullSink, RecordWriter, RunFolder, WorkerContext
from crate_ray.training.checkpoint import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    Checkpoint,
    check_same_run,
    checkpoint_uri,
)
from crate_ray.training.ema import EMA_FILE, Ema
from crate_ray.training.evaluate import Evaluator
from crate_ray.training.final import write_result
from crate_ray.training.first_weights import load_first_weights
from crate_ray.training.health import Health, RollBack, find_path
from crate_ray.training.memory import MemoryGuard, OutOfMemory, agreed_micro_batch, release_memory
from crate_ray.training.monitor import Monitor
from crate_ray.training.optimizer import create_optimizer, optimizer_tensors, restore_optimizer
from crate_ray.training.parallel import choose_parallel
from crate_ray.training.precision import choose_device, make_deterministic, resolve_precision
from crate_ray.training.profiling import ProfiledSteps, StepProfiler
from crate_ray.training.reading import TrainingBatches
from crate_ray.training.saving import CheckpointSaver
from crate_ray.training.schedule import cooldown_start, describe_rate, learning_rate, total_steps, warmup_steps
from crate_ray.training.step import PendingOutcome, TrainStep, Votes
from crate_ray.training.system import watch_system
from crate_ray.training.watchdog import Watchdog
from crate_ray.training.whitebox import WhiteboxMonitor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopResult:
    """How a worker's loop ended."""

    state: Literal["FINISHED", "KILLED"]
    step: int


class LocalContext:
    """One worker in this process; `stop()` may be called from a signal handler or another thread."""

    rank = 0
    world_size = 1
    local_rank = 0

    def __init__(self, attempt: int = 1) -> None:
        self.attempt = attempt
        self._stop = False

    def stop(self) -> None:
        """Asks the loop to write a checkpoint and return."""
        self._stop = True

    def stop_requested(self) -> bool:
        """See WorkerContext."""
        return self._stop

    def checkpoint_written(self, step: int, uri: str) -> None:
        """See WorkerContext."""

    def heartbeat(self, step: int) -> None:
        """See WorkerContext."""

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """See WorkerContext."""


def run_training(
    config: RunConfig,
    folder: RunFolder,
    context: WorkerContext,
    *,
    open_batches: Callable[..., BatchReader] = open_reader,
    profiled: ProfiledSteps | None = None,
) -> LoopResult:
    """Trains until the last step or a stop, from the newest checkpoint of the folder.

    After a rollback it begins again in this process, on all ranks alike. When a step does not fit into memory, a worker alone
    begins again with a smaller micro-batch; of several the one that it happened to raises, and all must be started anew. A
    worker that hangs ends its process (see `watchdog`).

    Args:
        config: The resolved configuration, the same on every rank.
        folder: The run; rank 0 alone writes records, all may read.
        context: This worker. With more than one, torch.distributed is initialised already.
        open_batches: Who reads and decodes; called as `open_reader`, and hands out the same batches.
        profiled: Steps that rank 0 traces into the folder.

    Raises:
        TrainingDivergedError: Losses or gradients are not finite, and rollbacks did not help.
        OutOfMemory: A step did not fit.
        ConfigError: The data or a checkpoint cannot be read.
    """
    watched = watch_system(folder, context, every_s=config.tracking.system_every_s)
    with watched, Watchdog(folder, context, timeout_s=config.scale.hang_timeout_s) as watchdog:
        while True:
            fitting = agreed_micro_batch(config, folder, context)
            watchdog.feed("the start and the first step", is_long=True)
            try:
                return Trainer(fitting, folder, context, open_batches, profiled, watchdog).train()
            except RollBack:
                log.info("beginning again from the last good checkpoint")
            except OutOfMemory as error:
                if context.world_size > 1 or error.micro_batch is None:
                    raise
                log.warning("%s", error)
            release_memory()


class Trainer:
    """The state of one attempt on one rank."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        context: WorkerContext,
        open_batches: Callable[..., BatchReader],
        profiled: ProfiledSteps | None,
        watchdog: Watchdog,
    ) -> None:
        self.config, self.folder, self.context, self.watchdog = config, folder, context, watchdog
        self.device = choose_device(config.scale.use_gpu, context.local_rank)
        self.precision = resolve_precision(config.train.precision, self.device.type)
        self.num_samples = load_source(config.data.source).num_samples
        self.total = total_steps(config, self.num_samples)
        self.warmup = warmup_steps(config, self.num_samples)
        self.cooldown = cooldown_start(config, self.num_samples)
        self.peak_lr = config.optimizer.peak_lr(config.train.global_batch)
        make_deterministic(config)
        if context.rank == 0:
            log.info("%s", describe_rate(config, self.num_samples))
        self.parallel = choose_parallel(config.scale, context, self.device)
        restored, interventions = self._agreed_path()
        self.model = create_model(config.model).to(self.device)
        if restored is None:
            load_first_weights(self.model, config)
        self.parallel.distribute(self.model)
        self.optimizer = create_optimizer(self.model, config.optimizer, lr=self.peak_lr)
        self.ema = Ema(self.model, config.train.ema) if config.train.ema else None
        if restored is not None:
            check_same_run(restored, config)
            self._restore(restored)
        self.step = restored.step if restored else 0
        self.train_seconds = restored.train_seconds if restored else 0.0
        self.train_step = TrainStep(
            self.model, self.optimizer, config, precision=self.precision, parallel=self.parallel, ema=self.ema
        )
        self.memory = MemoryGuard(config, folder, context, precision=self.precision)
        health = restored.state.get("health", {}) if restored else {}
        self.health = Health(config, folder, context, total=self.total, interventions=interventions, state=health)
        self.evaluator = (
            Evaluator(config, rank=context.rank, world_size=context.world_size, precision=self.precision)
            if config.data.eval
            else None
        )
        self.whitebox = (
            WhiteboxMonitor(config, device=self.device)
            if config.data.eval and config.eval.whitebox_every_steps and context.rank == 0
            else None
        )
        self.sink: MetricSink = RecordWriter(folder, context.attempt) if context.rank == 0 else NullSink()
        self.monitor = Monitor(
            config,
            self.model,
            self.optimizer,
            context=context,
            sink=self.sink,
            precision=self.precision,
            profiler=StepProfiler(profiled, folder, device=self.device) if profiled and context.rank == 0 else None,
        )
        self.is_stopping = False
        self.is_saving = False
        self._pending: deque[tuple[PendingOutcome, Batch]] = deque()
        self._eval_values: dict[str, float] = {}
        self.saver = CheckpointSaver(
            config,
            folder,
            ranks=self.parallel,
            device=self.device,
            sink=self.sink,
            attempt=context.attempt,
            restored=restored.step if restored else None,
        )
        self._saved_step = self.step if restored else -1
        self.batches = TrainingBatches(  # last, so that nothing can fail beside running loaders
            config,
            context,
            cursor=restored.cursor if restored else 0,
            num_samples=self.num_samples,
            open_batches=open_batches,
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.model.load_state_dict(self.parallel.read(checkpoint, MODEL_FILE, self.model))
        restore_optimizer(self.model, self.optimizer, self.parallel.read(checkpoint, OPTIMIZER_FILE, self.model))
        if self.ema is not None:
            self.ema.load_state_dict(self.parallel.read(checkpoint, EMA_FILE, self.model))
        log.info("resuming %s from step %d", self.folder.name, checkpoint.step)

    def _agreed_path(self) -> tuple[Checkpoint | None, tuple[Intervention, ...]]:
        """What rank 0 finds: on shared storage another rank may not see the newest checkpoint yet, or see an older one."""
        if self.context.world_size == 1:
            return find_path(self.folder)
        found = [find_path(self.folder) if self.context.rank == 0 else (None, ())]
        dist.broadcast_object_list(found)
        return found[0]

    def train(self) -> LoopResult:
        """The loop, and after it the end of all that runs beside it."""
        try:
            return self.run()
        except RollBack:
            self.roll_back()
            raise
        finally:
            with self.watchdog.patient("the end"):
                self.close()

    def run(self) -> LoopResult:
        """The loop."""
        if self.step == 0 and self.evaluator is not None and self.config.eval.whitebox_every_steps:
            self._record(self._measure_whitebox(self.parallel.whole(self.model)))  # later values mean little without these
        if self.step == self.total:  # stopped between the last checkpoint and the final numbers
            self._evaluate()
        evaluated: dict[str, float] = {}
        while self.step < self.total and not self.is_stopping:
            with self.monitor.reading(self.step + 1):
                batch = self.batches.next_batch(self.health.next_cursor)
            lr = self._learning_rate()
            votes = self._votes()
            with self.memory.watching(self.step + 1):
                pending = self.train_step(batch, lr=lr, votes=votes)
            self.step += 1
            self._settle(pending, batch)
            self.train_seconds += self.monitor.step_done(self.step)
            self.watchdog.feed(f"step {self.step + 1}")
            self.context.heartbeat(self.step)
            if self._is_due(self.config.eval.log_every_steps):
                self.monitor.log(self.step, lr=lr, others=self.batches.epochs() | self.health.metrics())
            with self.watchdog.patient("evaluation"):
                evaluated = self._evaluate() if not self.is_stopping or self.step == self.total else {}
            if self.is_saving or self.step == self.cooldown or self.saver.is_due(self.step, evaluated):
                with self.watchdog.patient("a checkpoint"):
                    self._save(evaluated)
            if evaluated:
                with self.watchdog.patient("a report"):
                    self.context.evaluated(self.step, evaluated)
                self.monitor.resume("eval")
                if self.context.world_size == 1:  # nobody has to agree, and the stop costs no further step
                    self.is_stopping = self.is_stopping or self.context.stop_requested()
        with self.watchdog.patient("the last checkpoint"):
            self._save(evaluated)
            self.saver.wait(is_last=True)
            self._report_saved()
        if self.step < self.total:
            return LoopResult("KILLED", self.step)
        self._write_result()
        return LoopResult("FINISHED", self.step)

    def roll_back(self) -> None:
        """Writes down where the run goes back to; the checkpoint under way may be the one."""
        self.saver.wait()
        self._report_saved()
        self.health.intervene()

    def close(self) -> None:
        """Stops the loader threads and flushes the records."""
        self.batches.close()
        self.monitor.close()
        self.saver.close()
        self.sink.close()

    def _learning_rate(self) -> float:
        return self.health.lr_factor(self.step) * learning_rate(
            self.step,
            total=self.total,
            warmup=self.warmup,
            peak=self.peak_lr,
            final_fraction=self.config.schedule.final_lr_fraction,
            cooldown=self.cooldown,
        )

    def _is_due(self, every_steps: int | None, *, at_end: bool = True) -> bool:
        if at_end and self.step == self.total:
            return True
        return every_steps is not None and self.step % every_steps == 0

    def _votes(self) -> Votes:
        """Rank 0's clock decides when to save; the others follow its vote."""
        is_overdue = self.context.rank == 0 and self.saver.is_overdue()
        return Votes(self.context.stop_requested(), is_overdue, self.batches.replaced_samples, self.saver.written)

    def _settle(self, pending: PendingOutcome, batch: Batch) -> None:
        """Reads outcomes one step late on a GPU, so that it is never waited for; at once where a number is due.

        All ranks read the same outcomes at the same step, so they agree on every vote.
        """
        self._pending.append((pending, batch))
        self._read_outcomes(lag=1 if self.device.type == "cuda" and not self._is_due(self.config.eval.log_every_steps) else 0)

    def _read_outcomes(self, *, lag: int) -> None:
        while len(self._pending) > lag:
            pending, batch = self._pending.popleft()
            outcome, step = pending.read(), self.step - len(self._pending)
            self.monitor.observe(step, outcome)
            with self.memory.watching(step):  # the search for a layer runs the batch uncompiled
                self.health.see(
                    step, outcome, cursor_after=batch.cursor_after, locate=partial(self.train_step.find_non_finite, batch)
                )
            self.is_stopping = self.is_stopping or outcome.stop
            self.is_saving = self.is_saving or outcome.save
            self.saver.settle(outcome.written)
        self._report_saved()

    def _evaluate(self) -> dict[str, float]:
        """What the task measures on validation, and kNN, where they are due; both at the end. Returns these, with the rate."""
        cadence = self.config.eval
        if self.evaluator is None or not any(
            map(self._is_due, (cadence.every_steps, cadence.probe_every_steps, cadence.whitebox_every_steps))
        ):
            return {}
        values: dict[str, float] = {}
        self._read_outcomes(lag=0)
        with self.ema.swapped() if self.ema and cadence.use_ema else nullcontext():
            model = self.parallel.whole(self.model)
            if self._is_due(cadence.every_steps):
                self._eval_values = self.evaluator.metrics(model)
                values.update(self._eval_values)
                self.health.see_evaluation(values)
            if self.step == self.total:
                self._eval_values |= self.evaluator.losses_by_mask_ratio(model)
            if self._is_due(cadence.probe_every_steps):
                top1 = self.evaluator.knn(model)
                if top1 is not None:
                    values["eval/knn_top1"] = top1
            self._record(values | self._measure_whitebox(model))
        if values and self.monitor.images_per_s is not None:
            values["perf/images_per_s"] = self.monitor.images_per_s
        return values

    def _measure_whitebox(self, model: MaskedAutoencoder | Classifier) -> dict[str, float]:
        """What each layer does to the frozen batch, where it is due. On rank 0 alone, and without a collective."""
        if self.whitebox is None or not self._is_due(self.config.eval.whitebox_every_steps):
            return {}
        return self.whitebox.measure(model)

    def _record(self, values: Mapping[str, float]) -> None:
        """Writes what was measured between steps, and leaves that time out of the throughput."""
        if values:
            self.sink.write(self.step, values)
            self.monitor.resume("eval")

    def _save(self, evaluated: Mapping[str, float]) -> None:
        if self.step == self._saved_step:
            return
        self._read_outcomes(lag=0)
        if self.health.is_skipping and not (self.is_stopping or self.step == self.cooldown):
            self.is_saving = True  # once a step is finite again: weights are saved when they are known to give numbers
            return
        state = {
            "cursor": self.batches.cursor,
            "train_seconds": self.train_seconds,
            "evaluation": {key: value for key, value in evaluated.items() if key.startswith("eval/")},
            "health": self.health.state(),
        }
        # A longer run can go on from where the cooldown begins.
        self.saver.save(self.step, self._files(), state, pin="cooldown" if self.step == self.cooldown else None)
        self._saved_step, self.is_saving = self.step, False
        self._report_saved()
        self.monitor.resume("checkpoint")

    def _files(self) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
        """What this rank has of the state."""
        states = {MODEL_FILE: self.model.state_dict(), OPTIMIZER_FILE: optimizer_tensors(self.model, self.optimizer)}
        if self.ema is not None:
            states[EMA_FILE] = self.ema.state_dict()
        return {file: held for name, state in states.items() for file, held in self.parallel.files(name, state).items()}

    def _report_saved(self) -> None:
        for step in self.saver.finished():
            self.context.checkpoint_written(step, checkpoint_uri(self.folder, step))
            self.monitor.checkpoint_saved(step)

    def _write_result(self) -> None:
        """The numbers that comparisons use, once."""
        if self.context.rank != 0:
            return
        measured = self.health.final_values()
        measured |= {key.replace("eval/", "final/eval_"): value for key, value in self._eval_values.items()}
        if self.monitor.images_per_s is not None:
            measured["final/images_per_s"] = self.monitor.images_per_s
        write_result(
            self.config,
            self.folder,
            self.sink,
            step=self.step,
            train_seconds=self.train_seconds,
            precision=self.precision,
            measured=measured,
        )
