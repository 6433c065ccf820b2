"""The forecast of a sweep from times that were taken where its trials will run.

In: a SweepConfig and its plan. Out: a Forecast. The smallest and the largest run of every arm are timed, as many side by side as
trials will run, for what neighbours take from one another belongs to a trial's time: on workers of the cluster that this
process is connected to, or in processes of this machine where it is to none, so that a dry run starts no cluster.
"""

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor

from crate_ray.config import RunConfig, SweepConfig
from crate_ray.config.prices import find_price
from crate_ray.config.sweep import TrialResources
from crate_ray.launch.cluster import trial_need
from crate_ray.space.forecast import Forecast, Forecaster, Measured
from crate_ray.space.plan import Plan
from crate_ray.space.planned import PlannedSweep, planned_sweep
from crate_ray.training.prepare import absolute_paths

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
    """Times the runs of every arm that `planned` names."""
    runs = [(arm, absolute_paths(config)) for arm, configs in planned.to_measure.items() for config in configs]
    probe = "probe_top1" in sweep.objective
    times = _time_all([config for _, config in runs], sweep.resources_per_trial, concurrency, limit_s, probe)
    return {arm: tuple(one for (name, _), one in zip(runs, times, strict=True) if name == arm) for arm in planned.to_measure}


def _time_all(
    configs: Sequence[RunConfig], resources: TrialResources, concurrency: int, limit_s: float, probe: bool
) -> list[Measured]:
    import ray

    bodies = [config.model_dump(mode="json") for config in configs]
    if ray.is_initialized():
        need = trial_need(resources)
        task = ray.remote(time_one).options(num_cpus=need["CPU"], num_gpus=need.get("GPU", 0), max_retries=1)
        found: list[Measured] = ray.get([task.remote(body, resources.cpus, limit_s, probe) for body in bodies])
        return found
    side_by_side = min(concurrency, len(bodies))
    with ProcessPoolExecutor(side_by_side, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(time_one, body, resources.cpus, limit_s, probe) for body in bodies]
        return [future.result() for future in futures]


def time_one(body: Mapping[str, object], cpus: float, limit_s: float, probe: bool) -> Measured:
    """Times one run in this process, on as many threads as a worker of a trial has.

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
    timing = time_run(config, limit_s=limit_s, probe=probe)
    return Measured(
        flops_per_step(config) / 1e9,
        timing.step_s,
        timing.evaluation_s,
        timing.whitebox_s,
        timing.probe_s or 0.0,
        timing.frame_s,
    )
