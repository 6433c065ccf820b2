"""What a sweep will cost, from the times of its smallest and largest runs. Arithmetic alone.

In: the planned trials with their GFLOPs, measured times of the extremes of every arm, the scheduler, and how many trials run
at a time. Out: hours of GPUs or CPUs, wall time and USD, by stage, each as a range; later, how far the trials that ended are
from it. Two points make a line, seconds = a + b x GFLOPs: what is between the extremes is interpolated, one line for every
arm, for a FLOP of CRATE and one of a transformer take different times. The range holds the spread of the measured times and
the least and most that the scheduler may train; not a machine that is slower tomorrow.
"""

import heapq
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from crate_ray.config import ConfigError, RunConfig, SweepConfig
from crate_ray.config.prices import NO_PRICE, Price
from crate_ray.config.sweep import SchedulerConfig, TrialResources
from crate_ray.models.memory import Precision, run_activation_bytes, run_state_bytes
from crate_ray.space.costs import flops_per_step
from crate_ray.space.expected_steps import ExpectedSteps, expected_steps, rungs

OVERHEAD_S = 0.3
"""Seconds of a one-worker trial beyond its own loop, on reused actors: benchmarks/results/2026-11-21-sweep.md, 2 cores."""
NESTED_OVERHEAD_S = 12.0
"""The same of a trial of several workers, each of which starts processes."""
START_S = 7.0
"""Until the first trial of a sweep takes its first step: cluster, driver and first actor."""
MEMORY_MARGIN = 1.1
"""Temporaries and the allocator's rounding, as a share of what is counted."""
MEMORY_BASE_BYTES = 1 << 29
"""What a device holds beside: context and workspaces."""


@dataclass(frozen=True)
class Range:
    """A forecast number with its least and most."""

    low: float
    expected: float
    high: float

    def __add__(self, other: "Range") -> "Range":
        return Range(self.low + other.low, self.expected + other.expected, self.high + other.high)

    def times(self, factor: float) -> "Range":
        """All three, multiplied."""
        return Range(self.low * factor, self.expected * factor, self.high * factor)


@dataclass(frozen=True)
class Branch:
    """What a trial trains besides where a rung is judged on a cooled branch: from `start` to `rung`, once more."""

    start: int
    rung: int

    @property
    def steps(self) -> int:
        """Of the cooldown."""
        return self.rung - self.start

    def events(self, every: int) -> int:
        """How often it does on the way what is done every so many steps and at the end of a run."""
        return self.rung // every - self.start // every + bool(self.rung % every)


@dataclass(frozen=True)
class PlannedTrial:
    """One run, as far as its cost goes.

    Attributes:
        arm: Whose line it lies on.
        gflops_per_step: Forward and backward of a global batch.
        steps: Of the whole run.
        whitebox_every: Steps between two looks at its layers; None: it takes none.
        branches: Of the rungs before its end, lowest first, where they are judged on cooled branches.
    """

    arm: str
    gflops_per_step: float
    steps: int
    whitebox_every: int | None = None
    branches: tuple[Branch, ...] = ()


@dataclass(frozen=True)
class Measured:
    """Times of one run of an arm; the fields as in `training.timing.Timing`."""

    gflops_per_step: float
    step_s: tuple[float, ...]
    evaluation_s: float
    whitebox_s: float = 0.0
    probe_s: float = 0.0
    frame_s: float = 0.0


@dataclass(frozen=True)
class Line:
    """seconds = at_zero + per_gflop x GFLOPs of a step."""

    at_zero: float
    per_gflop: float

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]]) -> "Line":
        """Through the points of least and most GFLOPs; level where they agree, or where the larger run was not the slower."""
        (x0, y0), (x1, y1) = min(points), max(points)
        if x1 <= x0 or y1 <= y0:
            return cls(statistics.fmean(y for _, y in points), 0.0)
        slope = (y1 - y0) / (x1 - x0)
        return cls(y0 - slope * x0, slope)

    def at(self, gflops: float) -> float:
        """Seconds, never less than none."""
        return max(0.0, self.at_zero + self.per_gflop * gflops)


@dataclass(frozen=True)
class ArmCost:
    """The lines of one arm."""

    step: tuple[Line, Line, Line]
    """Through the least, the median and the most seconds of a step."""
    evaluation: Line
    whitebox: Line
    probe: Line
    frame: Line

    @classmethod
    def of(cls, measured: Sequence[Measured]) -> "ArmCost":
        """From the measured runs of an arm, one or more."""
        if not measured:
            raise ValueError("no run of this arm was measured")
        parts = {
            name: Line.through([(one.gflops_per_step, getattr(one, name)) for one in measured])
            for name in ("evaluation_s", "whitebox_s", "probe_s", "frame_s")
        }
        low, median, high = (
            Line.through([(one.gflops_per_step, of_steps(one.step_s)) for one in measured])
            for of_steps in (min, statistics.median, max)
        )
        return cls((low, median, high), parts["evaluation_s"], parts["whitebox_s"], parts["probe_s"], parts["frame_s"])


@dataclass(frozen=True)
class StageForecast:
    """One stage: seconds of all its trials together, and from its first start to its last end."""

    trials: int
    steps: Range
    trial_seconds: Range
    wall_seconds: Range


@dataclass(frozen=True)
class Forecast:
    """What a sweep will cost."""

    screen: StageForecast
    confirm: StageForecast | None
    resources: TrialResources
    concurrency: int
    start_s: float
    price: Price | None

    @property
    def stages(self) -> dict[str, StageForecast]:
        """By name."""
        return {"screen": self.screen} | ({"confirm": self.confirm} if self.confirm else {})

    @property
    def trial_seconds(self) -> Range:
        """Of all trials together, each while it holds its resources."""
        return sum((stage.trial_seconds for stage in self.stages.values()), Range(0, 0, 0))

    @property
    def wall_seconds(self) -> Range:
        """From the command to its end."""
        return sum((stage.wall_seconds for stage in self.stages.values()), Range(self.start_s, self.start_s, self.start_s))

    @property
    def unit(self) -> str:
        """What hours are counted in."""
        return "gpu_hours" if self.resources.gpus else "cpu_hours"

    def device_hours(self, seconds: Range) -> Range:
        """Hours of GPUs, or of CPUs where trials have none, of so many seconds of trials."""
        return seconds.times(devices(self.resources) / 3600)

    def usd(self, seconds: Range) -> Range | None:
        """Cost of so many seconds of trials; None without a price."""
        return None if self.price is None else seconds.times(self.price.usd_per_trial_hour(self.resources) / 3600)

    def beyond(self, sweep: SweepConfig) -> list[str]:
        """The limits of the budget that the forecast goes past, each in a few words."""
        budget, spent = sweep.budget, self._sums(self.trial_seconds, self.wall_seconds)
        limits = {"gpu_hours": budget.gpu_hours, "wall_hours": budget.hours, "usd": budget.usd}
        names = {"wall_hours": "hours"}
        return [
            f"budget.{names.get(key, key)} = {limit:g}, forecast {spent[key]['expected']:.3g}"
            for key, limit in limits.items()
            if limit is not None and isinstance(spent.get(key), dict) and spent[key]["expected"] > limit
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: stages and total, hours and USD as low, expected and high."""
        stages = {
            name: {"trials": stage.trials, "steps": asdict(stage.steps), **self._sums(stage.trial_seconds, stage.wall_seconds)}
            for name, stage in self.stages.items()
        }
        return {
            "stages": stages,
            "total": self._sums(self.trial_seconds, self.wall_seconds),
            "concurrency": self.concurrency,
            "start_s": self.start_s,
            "price": NO_PRICE if self.price is None else self.price.said,
        }

    def _sums(self, trial_seconds: Range, wall_seconds: Range) -> dict[str, Any]:
        usd = self.usd(trial_seconds)
        return {
            self.unit: asdict(self.device_hours(trial_seconds)),
            "wall_hours": asdict(wall_seconds.times(1 / 3600)),
            "usd": NO_PRICE if usd is None else asdict(usd),
        }


class Forecaster:
    """Costs of the trials of one sweep.

    Args:
        sweep: The sweep.
        measured: Of every arm, the runs that were timed: its smallest and its largest, or one where all are equal.
        overhead_s: Seconds of a trial beyond its own loop; default: what the benchmark of sweeps found.
        start_s: Until the first step of the first trial.
    """

    def __init__(
        self,
        sweep: SweepConfig,
        measured: Mapping[str, Sequence[Measured]],
        *,
        overhead_s: float | None = None,
        start_s: float = START_S,
    ) -> None:
        self._sweep = sweep
        self._costs = {arm: ArmCost.of(runs) for arm, runs in measured.items()}
        default = OVERHEAD_S if sweep.resources_per_trial.num_workers == 1 else NESTED_OVERHEAD_S
        self._overhead_s = default if overhead_s is None else overhead_s
        self._start_s = start_s

    def seconds(
        self, trial: PlannedTrial, *, steps: float, is_finished: float = 1.0, passed: Sequence[float] | None = None
    ) -> Range:
        """How long one trial holds its resources.

        Args:
            trial: The trial.
            steps: That it reaches; what it trains on cooled branches comes on top.
            is_finished: The probability that it comes to its end and is probed.
            passed: Of each branch, the probability that the trial goes on from its rung; default: whether it reaches further.
        """
        cost, x, every = self._costs[trial.arm], trial.gflops_per_step, self._sweep.report_every_steps
        if passed is None:
            passed = [float(branch.rung < steps) for branch in trial.branches]
        branches = list(zip(trial.branches, passed, strict=True))
        evaluations = -(-steps // every) + sum(share * branch.events(every) for branch, share in branches)
        beside = self._overhead_s + (1 + sum(passed)) * cost.frame.at(x) + evaluations * cost.evaluation.at(x)
        if self._sweep.resources_per_trial.num_workers > 1:
            beside += sum(passed) * self._overhead_s  # each starts workers of its own
        if (whitebox_every := trial.whitebox_every) is not None:
            looks = 1 + -(-steps // whitebox_every) + sum(share * branch.events(whitebox_every) for branch, share in branches)
            beside += looks * cost.whitebox.at(x)
        if "probe_top1" in self._sweep.objective:
            beside += is_finished * cost.probe.at(x)
        trained = steps + sum(share * branch.steps for branch, share in branches)
        low, expected, high = (beside + trained * line.at(x) for line in cost.step)
        return Range(low, expected, high)

    def forecast(
        self,
        trials: Sequence[PlannedTrial],
        *,
        confirm: Sequence[PlannedTrial] = (),
        num_confirm: int = 0,
        concurrency: int,
        price: Price | None = None,
    ) -> Forecast:
        """The whole sweep.

        Args:
            trials: Of the screening, in order; where a search will choose, draws that stand for what it chooses.
            confirm: The runs that the second stage may train, each once: the screening decides which.
            num_confirm: How many it will train.
            concurrency: Trials at a time.
            price: Of a node or device.
        """
        if not trials or concurrency < 1:
            raise ConfigError(f"a forecast needs trials and room for one: {len(trials)} trials, {concurrency} at a time")
        screen = self._screen(trials, concurrency)
        second = self._confirm(confirm, num_confirm, concurrency) if confirm and num_confirm else None
        return Forecast(screen, second, self._sweep.resources_per_trial, concurrency, self._start_s, price)

    def _screen(self, trials: Sequence[PlannedTrial], concurrency: int) -> StageForecast:
        classes = self._sweep.scheduler.num_brackets if self._sweep.scheduler.bracket_by else 1
        rivals = len(trials) / classes
        reach = [self._expected_steps(trial, rivals) for trial in trials]
        low = [self._least_seconds(t, r, rivals) for t, r in zip(trials, reach, strict=True)]
        mean = [
            self.seconds(t, steps=r.mean, is_finished=r.finished, passed=(r.passed if t.branches else ()) or None).expected
            for t, r in zip(trials, reach, strict=True)
        ]
        high = [self.seconds(t, steps=r.most).high for t, r in zip(trials, reach, strict=True)]
        steps = Range(sum(r.least for r in reach), sum(r.mean for r in reach), sum(r.most for r in reach))
        return _stage(steps, low, mean, high, concurrency)

    def _expected_steps(self, trial: PlannedTrial, rivals: float) -> ExpectedSteps:
        report_every = 1 if trial.branches else self._sweep.report_every_steps
        return expected_steps(self._sweep.scheduler, total_steps=trial.steps, trials=rivals, report_every=report_every)

    def _least_seconds(self, trial: PlannedTrial, reach: ExpectedSteps, rivals: float) -> float:
        """One trial of each class has no rival and passes every rung."""
        passed = [min(1.0, 1 / rivals)] * len(trial.branches)
        return self.seconds(trial, steps=reach.least, is_finished=0, passed=passed).low

    def _confirm(self, candidates: Sequence[PlannedTrial], number: int, concurrency: int) -> StageForecast:
        """Which runs are trained is not known: the mean of each arm's candidates, between its cheapest and its dearest."""
        arms = list(dict.fromkeys(trial.arm for trial in candidates))
        ranges: list[Range] = []
        steps: list[Range] = []
        for index in range(number):
            own = [trial for trial in candidates if trial.arm == arms[index % len(arms)]]
            seconds = [self.seconds(trial, steps=trial.steps) for trial in own]
            ranges.append(
                Range(min(s.low for s in seconds), statistics.fmean(s.expected for s in seconds), max(s.high for s in seconds))
            )
            lengths = [trial.steps for trial in own]
            steps.append(Range(min(lengths), statistics.fmean(lengths), max(lengths)))
        low, mean, high = ([getattr(one, name) for one in ranges] for name in ("low", "expected", "high"))
        return _stage(sum(steps, Range(0, 0, 0)), low, mean, high, concurrency)


def _stage(steps: Range, low: list[float], mean: list[float], high: list[float], concurrency: int) -> StageForecast:
    seconds = Range(sum(low), sum(mean), sum(high))
    wall = Range(*(wall_seconds(each, concurrency) for each in (low, mean, high)))
    return StageForecast(len(mean), steps, seconds, wall)


def wall_seconds(seconds: Iterable[float], concurrency: int) -> float:
    """From the first start to the last end, where each next trial takes the first free place."""
    free = [0.0] * concurrency
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def devices(resources: TrialResources) -> float:
    """GPUs of a trial over its workers, or CPUs where it has no GPU."""
    return resources.num_workers * (resources.gpus or resources.cpus)


def planned_trial(
    arm: str, config: RunConfig, *, scheduler: SchedulerConfig | None = None, num_samples: int | None = None
) -> PlannedTrial:
    """A run of an arm as its cost goes.

    Args:
        arm: The arm.
        config: Of the point.
        scheduler: Who judges it; nobody does by default, as in the second stage.
        num_samples: Images of the training data, for a length in epochs.

    Raises:
        ConfigError: The length is in epochs, and the number of images is not known.
    """
    steps = config.train.num_steps(num_samples)
    if steps is None:
        raise ConfigError("a forecast needs the number of steps: set train.steps, or build the training data first")
    branches = () if scheduler is None else _branches(config, scheduler, steps)
    return PlannedTrial(arm, flops_per_step(config) / 1e9, steps, config.eval.whitebox_every_steps, branches)


def _branches(config: RunConfig, scheduler: SchedulerConfig, total_steps: int) -> tuple[Branch, ...]:
    """Each rung's cooldown is its last share of steps; a warm-up that reaches into it is passed over."""
    fraction = config.schedule.cooldown_fraction
    if fraction is None or scheduler.type != "asha":
        return ()
    assert scheduler.grace_steps is not None
    at = rungs(scheduler.grace_steps, scheduler.reduction_factor, total_steps)
    return tuple(Branch(rung - max(1, round(fraction * rung)), rung) for rung in at)


def extremes(trials: Iterable[PlannedTrial]) -> dict[str, tuple[int, ...]]:
    """Of every arm, the places of its smallest and its largest run in the sequence; one place where all cost the same."""
    places: dict[str, list[tuple[float, int]]] = {}
    for place, trial in enumerate(trials):
        places.setdefault(trial.arm, []).append((trial.gflops_per_step, place))
    ends = {arm: (min(found), max(found)) for arm, found in places.items()}
    return {arm: (low[1],) if low[0] == high[0] else (low[1], high[1]) for arm, (low, high) in ends.items()}


@dataclass(frozen=True)
class LiveError:
    """How far the forecast is from the trials that ended: real over predicted seconds, less one.

    The prediction is for the steps that each trial really trained, so an error is one of the times, not of the scheduler.
    """

    trials: int = 0
    predicted_s: float = 0.0
    real_s: float = 0.0

    def with_trial(self, predicted_s: float, real_s: float) -> "LiveError":
        """One more trial that ended."""
        return replace(self, trials=self.trials + 1, predicted_s=self.predicted_s + predicted_s, real_s=self.real_s + real_s)

    @property
    def relative(self) -> float | None:
        """+0.25: trials take a quarter longer than forecast; None before the first one."""
        return self.real_s / self.predicted_s - 1 if self.predicted_s else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "relative": self.relative}


def memory_reason(config: RunConfig, *, device_bytes: int) -> str | None:
    """Why a run cannot fit into the memory of its device; None where it may.

    Counted are weights, gradients, moments and what autograd keeps of one micro-batch (`models.memory`), times MEMORY_MARGIN
    and with MEMORY_BASE_BYTES beside. A precision that the device will choose counts as the smaller one: what is refused
    here fits under neither.

    Args:
        config: The run.
        device_bytes: Of a worker's GPU, or its share of the host's memory.
    """
    share = -(-config.train.global_batch // config.scale.min_workers)
    images = min(config.train.micro_batch or share, share)
    precision: Precision = "float32" if config.train.precision == "float32" else "bfloat16"
    # Of a hybrid, shards depend on the nodes; whole workers are the bound that refuses nothing that fits.
    shards = config.scale.min_workers if config.scale.parallel == "fsdp" else 1
    state, image = run_state_bytes(config) // shards, run_activation_bytes(config, precision=precision)
    need = MEMORY_MARGIN * (state + images * image) + MEMORY_BASE_BYTES
    if need <= device_bytes:
        return None
    room = int(((device_bytes - MEMORY_BASE_BYTES) / MEMORY_MARGIN - state) // image)
    fix = f"train.micro_batch = {room} would fit" if room >= 1 else "not even one image at a time fits"
    return (
        f"needs about {_gib(need)} of memory ({_gib(state)} of weights, gradients and moments, {_gib(images * image)} of "
        f"activations of {images} images in {precision}, {MEMORY_MARGIN - 1:.0%} and {_gib(MEMORY_BASE_BYTES)} beside), and a "
        f"worker has {_gib(device_bytes)}; {fix}"
    )


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
