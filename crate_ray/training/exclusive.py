"""Images a second of runs that are to be compared, timed by turns on a machine that does nothing else.

In: configurations. Out: for each the median over rounds with an interval, and whether the machine was quiet. A round times
every configuration once, every other round in reverse order, so that a clock or a temperature that drifts meets all alike. The
steps are the loop's own, with its reader, by one worker that takes the whole batch; evaluation and checkpoints stay out.
"""

import logging
import math
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from crate_ray.config import ConfigError, RunConfig
from crate_ray.training.memory import is_out_of_memory
from crate_ray.training.precision import choose_device, resolve_precision
from crate_ray.training.quiet import OtherLoad, OtherLoadWatch
from crate_ray.training.timing import time_steps, timed

log = logging.getLogger(__name__)

STEPS = 20
LEAST_ROUNDS = 6
"""The median of fewer has no interval of 95% that supposes nothing."""
WAIT_S = 2.0
"""How long others are watched before the first step."""


@dataclass(frozen=True)
class ExclusiveTiming:
    """What is written into a run's folder as timing.json.

    Attributes:
        images_per_s: Median over the rounds.
        low: Lower end of its 95% interval.
        high: Upper end.
        hardware: "1 x NVIDIA H200"; of a CPU with the threads that computed.
        steps: Measured in each round.
        date: Of the measurement, local time.
        exclusive: Whether the machine was quiet before and throughout.
        global_batch: Images a step.
        precision: That of its products.
        rounds: Images a second of each.
        disturbed_rounds: Rounds that were left out because others were at work; of a machine that is never quiet, none.
        other_cores: Most cores that others used, on average over a round that counts.
        torch: Its version.
    """

    images_per_s: float
    low: float
    high: float
    hardware: str
    steps: int
    date: str
    exclusive: bool
    global_batch: int
    precision: str
    rounds: tuple[float, ...]
    disturbed_rounds: int
    other_cores: float
    torch: str

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def timing_key(config: RunConfig) -> str:
    """The same for runs of the same speed: what is timed, without names, places and the seed."""
    body = timed(config, steps=STEPS).model_dump(mode="json", exclude={"name": True, "storage": True, "tracking": True})
    body["train"].pop("seed")
    return repr(body)


def time_exclusively(
    configs: Mapping[str, RunConfig],
    *,
    steps: int = STEPS,
    rounds: int = LEAST_ROUNDS,
    may_be_busy: bool = False,
) -> dict[str, ExclusiveTiming]:
    """Times configurations by turns on this machine.

    Rounds in which others were at work are timed again, at most as often as there are rounds; where that does not help, all
    rounds count and `exclusive` is False.

    Args:
        configs: By name; of one device, with paths that hold here.
        steps: Measured in each round, after a warm-up.
        rounds: At least LEAST_ROUNDS.
        may_be_busy: Time on a machine that is busy from the start too; then `exclusive` is False.

    Raises:
        ConfigError: Others are at work; a configuration does not fit into memory; its data cannot be read; or they would run
            on different devices.
        ValueError: Fewer than LEAST_ROUNDS rounds, or no step.
    """
    if rounds < LEAST_ROUNDS or steps < 1:
        raise ValueError(f"{rounds} rounds of {steps} steps; it needs at least {LEAST_ROUNDS} rounds of 1 step")
    device = _shared_device(configs)
    watch = OtherLoadWatch(device)
    time.sleep(WAIT_S)
    before = watch.look()
    if not before.is_quiet and not may_be_busy:
        raise ConfigError(
            f"this machine is busy: {before.sentence()}; wait until it is idle, or give --busy to time anyway, which "
            "timing.json then says and comparisons leave out"
        )
    _round(configs, steps=1)  # files come from memory afterwards, and what does not fit is known
    watch.look()
    found, disturbed = _rounds(configs, watch, steps=steps, rounds=rounds, retries=rounds if before.is_quiet else 0)
    is_exclusive = before.is_quiet and all(load.is_quiet for _, load in found)
    most = max([before, *(load for _, load in found)], key=lambda load: load.cores).cores
    return {
        name: _summary(
            config,
            [rates[name] for rates, _ in found],
            device,
            steps=steps,
            exclusive=is_exclusive,
            disturbed_rounds=disturbed,
            other_cores=round(most, 2),
        )
        for name, config in configs.items()
    }


_Round = tuple[dict[str, float], OtherLoad]


def _rounds(
    configs: Mapping[str, RunConfig], watch: OtherLoadWatch, *, steps: int, rounds: int, retries: int
) -> tuple[list[_Round], int]:
    """The rounds that count, and how many were left out."""
    quiet: list[_Round] = []
    busy: list[_Round] = []
    while len(quiet) < rounds and len(quiet) + len(busy) < rounds + retries:
        number = len(quiet) + len(busy)
        names = list(configs)[:: 1 if number % 2 == 0 else -1]
        rates = _round({name: configs[name] for name in names}, steps=steps)
        load = watch.look()
        (quiet if load.is_quiet else busy).append((rates, load))
        log.info("round %d: %s", number + 1, load.sentence())
    return (quiet, len(busy)) if len(quiet) == rounds else (quiet + busy, 0)


def _round(configs: Mapping[str, RunConfig], *, steps: int) -> dict[str, float]:
    """Images a second of each, in the order given."""
    rates = {}
    for name, config in configs.items():
        try:
            seconds = time_steps(config, steps=steps)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise ConfigError(
                f"{name} does not fit into the memory of one worker here: {str(error).partition(chr(10))[0]}; "
                "time it where it fits"
            ) from error
        rates[name] = steps * config.train.global_batch / sum(seconds)
    return rates


def _summary(
    config: RunConfig,
    rates: Sequence[float],
    device: torch.device,
    *,
    steps: int,
    exclusive: bool,
    disturbed_rounds: int,
    other_cores: float,
) -> ExclusiveTiming:
    low, high = median_interval(rates)
    return ExclusiveTiming(
        images_per_s=_short(statistics.median(rates)),
        low=_short(low),
        high=_short(high),
        hardware=f"1 x {device_name(device)}",
        steps=steps,
        date=time.strftime("%Y-%m-%d %H:%M:%S"),
        exclusive=exclusive,
        global_batch=config.train.global_batch,
        precision=resolve_precision(config.train.precision, device.type),
        rounds=tuple(map(_short, rates)),
        disturbed_rounds=disturbed_rounds,
        other_cores=other_cores,
        torch=torch.__version__,
    )


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Two values that hold the median of their distribution between them with at least 95%, whatever that is.

    The k-th smallest and the k-th largest of n, with the largest k for which 2 P(Binomial(n, 1/2) < k) <= 0.05.

    Args:
        values: At least LEAST_ROUNDS.
    """
    ordered = sorted(values)
    n = len(ordered)
    k = max(k for k in range(n // 2) if 2 * sum(math.comb(n, i) for i in range(k + 1)) <= 0.05 * 2**n)
    return ordered[k], ordered[n - 1 - k]


def _shared_device(configs: Mapping[str, RunConfig]) -> torch.device:
    devices = {name: choose_device(config.scale.use_gpu, 0) for name, config in configs.items()}
    if len(set(devices.values())) > 1:
        kinds = ", ".join(f"{name} on {device.type}" for name, device in devices.items())
        raise ConfigError(f"these would run on different devices ({kinds}); time those of one device together")
    return next(iter(devices.values()))


def device_name(device: torch.device) -> str:
    """'NVIDIA H200'; of a CPU its model and the threads that compute: 'AMD EPYC 7B13, 8 threads'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()}, {torch.get_num_threads()} threads"


def _cpu_model() -> str:
    """As the kernel calls it; elsewhere as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
