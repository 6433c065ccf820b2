"""The forecast of a sweep from times that were taken where its trials will run.

In: a SweepConfig and its plan. Out: a Forecast. The smallest and the largest run of every arm are timed, as many side by side
as trials will run, for what neighbours take from one another belongs to the time of a trial. That happens on workers of the
cluster that this process is connected to, or in processes of this machine where it is to none: a dry run starts no cluster.
"""

import logging
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor

from crate_ray.config import ConfigError, RunConfig, SweepConfig
from crate_ray.config.prices import find_price
from crate_ray.config.sweep import TrialResources
from crate_ray.launch.cluster import trial_need
from crate_ray.space.forecast import Forecast, Forecaster, Measured
from crate_ray.space.plan import Plan
from crate_ray.space.planned import PlannedSweep, planned_sweep
from crate_ray.training.prepare import absolute_paths

log = logging.getLogger(__name__)

LIMIT_S = 5.0
"""Of the steps of one run; see `training.timing`."""


def forecast_sweep(
    sweep: SweepConfig, plan: Plan, *, num_samples: int, concurrency: int, limit_s: float = LIMIT_S
) -> tuple[Forecaster, Forecast]:
    """What a sweep will cost.

    Args:
        sweep: The sweep.
        plan: Its points.
        num_samples: Images of the training data.
        concurrency: Trials at a time.
        limit_s: Of the steps of each run that is timed.

    Returns:
        What predicts the seconds of a single trial, and the forecast of all of them.

    Raises:
        ConfigError: The data cannot be read, or the price of `budget` is not known.
    """
    price = find_price(sweep.budget, sweep.resources_per_trial)
    planned = planned_sweep(sweep, plan, num_samples)
    forecaster = Forecaster(sweep, measure(sweep, planned, concurrency=concurrency, limit_s=limit_s))
    return forecaster, forecaster.forecast(
        planned.screen, confirm=planned.confirm, num_confirm=planned.num_confirm, concurrency=concurrency, price=price
    )


def measure(
    sweep: SweepConfig, planned: PlannedSweep, *, concurrency: int, limit_s: float = LIMIT_S
) -> dict[str, tuple[Measured, ...]]:
    """Times the runs of every arm that `planned` names; one that the device is too small for is left out, with a warning.

    Raises:
        ConfigError: No run of an arm could be timed, or the data cannot be read.
    """
    runs = [(arm, absolute_paths(config)) for arm, configs in planned.to_measure.items() for config in configs]
    probe = "probe_top1" in sweep.objective
    times = _time_all([config for _, config in runs], sweep.resources_per_trial, concurrency, limit_s, probe)
    measured: dict[str, tuple[Measured, ...]] = {}
    for (arm, config), found in zip(runs, times, strict=True):
        if isinstance(found, str):
            log.warning("a run of arm '%s' with width %d could not be timed: %s", arm, config.model.width, found)
        else:
            measured[arm] = (*measured.get(arm, ()), found)
    if missing := [arm for arm in planned.to_measure if arm not in measured]:
        raise ConfigError(
            f"no run of arm {', '.join(missing)} could be timed: {next(found for found in times if isinstance(found, str))}; "
            "lower train.micro_batch or the sizes, or give trials more memory"
        )
    return measured


def _time_all(
    configs: Sequence[RunConfig], resources: TrialResources, concurrency: int, limit_s: float, probe: bool
) -> list[Measured | str]:
    import ray

    bodies = [config.model_dump(mode="json") for config in configs]
    if ray.is_initialized():
        need = trial_need(resources)
        task = ray.remote(time_one).options(num_cpus=need["CPU"], num_gpus=need.get("GPU", 0), max_retries=1)
        found: list[Measured | str] = ray.get([task.remote(body, resources.cpus, limit_s, probe) for body in bodies])
        return found
    side_by_side = min(concurrency, len(bodies))
    with ProcessPoolExecutor(side_by_side, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(time_one, body, resources.cpus, limit_s, probe) for body in bodies]
        return [future.result() for future in futures]


def time_one(body: Mapping[str, object], cpus: float, limit_s: float, probe: bool) -> Measured | str:
    """Times one run in this process, on as many threads as a worker of a trial has; a sentence when there is too little memory.

    Args:
        body: A RunConfig as a mapping.
        cpus: Of a worker.
        limit_s: Of its steps.
        probe: Whether to judge its encoder.
    """
    import torch

    from crate_ray.space.costs import flops_per_step
    from crate_ray.training.timing import time_run

    torch.set_num_threads(max(1, int(cpus)))
    config = RunConfig.parse(dict(body))
    try:
        timing = time_run(config, limit_s=limit_s, probe=probe)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return str(error).partition("\n")[0] or "out of memory"
    return Measured(
        flops_per_step(config) / 1e9,
        timing.step_s,
        timing.evaluation_s,
        timing.whitebox_s,
        timing.probe_s or 0.0,
        timing.frame_s,
    )
