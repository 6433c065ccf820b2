"""How long a run's step, evaluation, probe and frame take on this device, by doing them.

In: a RunConfig. Out: seconds. The steps are those of the loop itself, with its reader, its model and its checkpoint at the end,
in a scratch folder; evaluation is done beside it, so that its cost is known after a few steps. It takes a few seconds, and for
a model whose step is slow what ten steps and an evaluation take.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from crate_ray.config import RunConfig
from crate_ray.models import create_model
from crate_ray.runs import RunFolder
from crate_ray.training.checkpoint import Checkpoint, latest_checkpoint
from crate_ray.training.evaluate import Evaluator
from crate_ray.training.loop import LocalContext, run_training
from crate_ray.training.precision import choose_device, resolve_precision
from crate_ray.training.probes import judge_classifier, judge_encoder
from crate_ray.training.whitebox import WhiteboxMonitor

WARMUP_STEPS = 3
LEAST_STEPS = 3
MOST_STEPS = 60
"""Warm-up included."""
QUICK_S = 1.0
"""An evaluation that took less the first time is measured again, warm."""
_HARMLESS_LR = 1e-8  # a rate that would diverge must not end the measurement


@dataclass(frozen=True)
class Timing:
    """Seconds of the parts of a run on one device.

    Attributes:
        step_s: Of each measured step, reading included.
        evaluation_s: Of one evaluation: validation loss, and kNN where the run measures it as often.
        whitebox_s: Of one look at the layers, where the run takes any.
        probe_s: Of judging a finished run; None when it was not asked for.
        frame_s: Of what is before the first step and after the last: model, reader, compilation, checkpoint.
    """

    step_s: tuple[float, ...]
    evaluation_s: float
    whitebox_s: float
    probe_s: float | None
    frame_s: float


def time_run(config: RunConfig, *, limit_s: float = 5.0, probe: bool = False) -> Timing:
    """Measures a run on this device, with one worker.

    Args:
        config: With paths that hold here. Of several workers this one takes its share of the batch, without their
            communication.
        limit_s: No further step begins after so long; at least LEAST_STEPS are measured.
        probe: Judge the encoder too; needs scikit-learn and labels.

    Raises:
        ConfigError: The data cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="crate-ray-timing-") as scratch:
        folder = RunFolder(scratch)
        cold = _train(_stripped(config), folder, limit_s=limit_s, most=MOST_STEPS)
        step_s = _step_seconds(cold)
        checkpoint = latest_checkpoint(folder)
        assert checkpoint is not None
        evaluation_s, whitebox_s = (0.0, 0.0) if config.data.eval is None else _time_evaluation(config)
        probe_s = _seconds_of_probe(config, checkpoint) if probe else None
    return Timing(step_s, evaluation_s, whitebox_s, probe_s, _frame_seconds(config, cold, statistics.median(step_s)))


def time_steps(config: RunConfig, *, steps: int) -> tuple[float, ...]:
    """Seconds of so many steps after the warm-up, by the loop itself; with one worker, which takes the whole batch.

    Args:
        config: With paths that hold here.
        steps: Measured ones.

    Raises:
        ConfigError: The data cannot be read.
        OutOfMemory: A step does not fit.
    """
    most = WARMUP_STEPS + steps
    with tempfile.TemporaryDirectory(prefix="crate-ray-timing-") as scratch:
        return _step_seconds(_train(timed(config, steps=most), RunFolder(scratch), limit_s=math.inf, most=most))


@dataclass(frozen=True)
class _Lap:
    """When a loop was called, when each of its steps ended, and when it returned."""

    started: float
    marks: tuple[float, ...]
    ended: float


def _train(config: RunConfig, folder: RunFolder, *, limit_s: float, most: int) -> _Lap:
    context = _Stopwatch(limit_s, most)
    started = time.perf_counter()
    run_training(config, folder, context)
    return _Lap(started, tuple(context.marks), time.perf_counter())


def _step_seconds(lap: _Lap) -> tuple[float, ...]:
    """Of every step after the warm-up."""
    return tuple(after - before for before, after in pairwise(lap.marks))[WARMUP_STEPS - 1 :]


def _frame_seconds(config: RunConfig, cold: _Lap, step_s: float) -> float:
    """Around the steps, in a process that has trained before, as the actors of a sweep have; compiling is not done twice."""
    lap = cold
    if not config.train.compile:
        with tempfile.TemporaryDirectory(prefix="crate-ray-timing-") as scratch:
            lap = _train(_stripped(config), RunFolder(scratch), limit_s=0, most=1)
    return max(0.0, lap.marks[0] - lap.started + lap.ended - lap.marks[-1] - step_s)


def _stripped(config: RunConfig) -> RunConfig:
    """What one of the run's workers does, without its communication."""
    return timed(config, steps=MOST_STEPS, workers=config.scale.max_workers)


def timed(config: RunConfig, *, steps: int, workers: int = 1) -> RunConfig:
    """The run without what is timed apart, and without what could end it early.

    Args:
        config: The run.
        steps: It takes at least so many.
        workers: How many share the batch; one of them is left.
    """
    share = -(-config.train.global_batch // workers)
    changes: dict[str, dict[str, Any]] = {
        "data": {"eval": None, "preprocess": None},
        "train": {"steps": max(steps, MOST_STEPS) + 2, "epochs": None, "global_batch": share, "init_from": None},
        "optimizer": {"lr": _HARMLESS_LR, "base_lr": None},
        "checkpoint": {"every_steps": None, "every_minutes": None},
        "scale": {"num_workers": 1},
    }
    return config.model_copy(
        update={section: getattr(config, section).model_copy(update=keys) for section, keys in changes.items()}
    )


class _Stopwatch(LocalContext):
    """Marks the end of every step, and stops the loop when it has enough of them."""

    def __init__(self, limit_s: float, most: int) -> None:
        super().__init__()
        self.marks: list[float] = []
        self._limit_s, self._most = limit_s, most

    def heartbeat(self, step: int) -> None:
        """See WorkerContext."""
        self.marks.append(time.perf_counter())
        is_late = self.marks[-1] - self.marks[0] > self._limit_s
        if len(self.marks) >= self._most or (is_late and len(self.marks) >= WARMUP_STEPS + LEAST_STEPS):
            self.stop()


def _time_evaluation(config: RunConfig) -> tuple[float, float]:
    """Seconds of one evaluation and of one look at the layers; neither depends on the weights."""
    device = choose_device(config.scale.use_gpu, 0)
    precision = resolve_precision(config.train.precision, device.type)
    model = create_model(config.model).to(device)
    evaluator = Evaluator(config, rank=0, world_size=1, precision=precision)

    def evaluate() -> None:
        evaluator.metrics(model)
        if config.eval.probe_every_steps is not None:
            evaluator.knn(model)

    whitebox_s = 0.0
    if config.eval.whitebox_every_steps is not None:
        monitor = WhiteboxMonitor(config, device=device)
        whitebox_s = _seconds(lambda: monitor.measure(model), device)
    first_s = _seconds(evaluate, device)  # reads the index and warms the device up
    return (_seconds(evaluate, device) if first_s < QUICK_S else first_s), whitebox_s


def _seconds_of_probe(config: RunConfig, checkpoint: Checkpoint) -> float:
    started = time.perf_counter()
    if config.task == "classify":
        judge_classifier(config, checkpoint, split="validation")
    else:
        judge_encoder(config, checkpoint, split="validation")
    return time.perf_counter() - started


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
