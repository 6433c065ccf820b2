"""Whether a sweep can give what it asks for, found out before anything starts.

In: a SweepConfig. Out: nothing, or one ConfigError with the keys, the values and the fix. The schema refuses what is wrong by
itself; here is what is wrong only together: metrics that no run reports, losses that answer different questions, pairs that are
none, schedulers that could never act.
"""

import math
from collections.abc import Iterable, Mapping

from crate_ray.config import LIVE_OBJECTIVES, LOSS_TARGET, ConfigError, RunConfig, SweepConfig
from crate_ray.config.domain import SAME_FLOPS_KEY, depending_on, value_at
from crate_ray.space.arms import ArmSpace, arm_config, arms
from crate_ray.space.constraints import parse_constraint
from crate_ray.space.plan import Plan, make_plan
from crate_ray.space.point import canonical

_PAIRED = (
    "task",
    *("data.train", "data.mix", "data.eval", "data.lanes", "data.window", "data.augment", "data.crop_scale", "data.flip"),
    *("data.mean", "data.std", "train.global_batch", "train.steps", "train.epochs"),
)
"""What arms that are paired share, so that step k of each sees the same images."""
_ONE_PLACE = ("storage.path", "tracking.uri")
_NOT_PERTURBABLE = ("optimizer.name",)  # another optimizer's state does not fit
_PERTURBABLE = ("model.mask_ratio", "model.ista_step_size", "model.ista_lambda", "train.clip_norm")


def check_sweep(sweep: SweepConfig, num_samples: int | None = None) -> None:
    """Refuses a sweep that could not give what it asks for.

    Args:
        sweep: The sweep.
        num_samples: Images of the training data; None where they are not known.

    Raises:
        ConfigError: One problem: the keys, their values, what is valid, the fix.
    """
    for text in sweep.constraints:
        parse_constraint(text)
    configs = {arm: arm_config(sweep, arm) for arm in arms(sweep)}
    _check_metrics(sweep, configs)
    _check_one_place(configs)
    if sweep.pair:
        _check_pair(sweep, configs)
    plan = make_plan(sweep, num_samples)
    runs = [run for arm in plan.points for run in _distinct_runs(sweep, plan, arm, num_samples)]
    _check_losses(sweep, runs)
    lengths = [steps for run in runs if (steps := run.train.num_steps(num_samples)) is not None]
    _check_scheduler(sweep, plan, min(lengths, default=None))


def scheduler_metric(sweep: SweepConfig) -> str | None:
    """What rungs are judged by: the scheduler's own metric, or the first objective that is reported while training."""
    return sweep.scheduler.metric or next((name for name in sweep.objective if name in LIVE_OBJECTIVES), None)


def _distinct_runs(sweep: SweepConfig, plan: Plan, arm: str, num_samples: int | None) -> list[RunConfig]:
    """A run for each combination of the keys of model and length; hundreds of points mostly share a few."""
    space = ArmSpace(sweep, arm, num_samples=num_samples)
    parts = {}
    for point in plan.points[arm]:
        part = {key: value for key, value in point.values.items() if key.startswith(("model.", "train.", "task"))}
        parts[canonical(part)] = part
    return [space.config(part) for part in parts.values()]


def _check_metrics(sweep: SweepConfig, configs: Mapping[str, RunConfig]) -> None:
    asked = {*sweep.objective, *([sweep.scheduler.metric] if sweep.scheduler.metric else [])}
    measured = sorted(asked & {"eval_loss", "knn_top1", "probe_top1"})
    blind = [arm for arm, config in configs.items() if config.data.eval is None]
    if measured and blind:
        raise ConfigError(
            f"no run of arm '{blind[0]}' reports {', '.join(measured)}: its data.eval is null; set data.eval to validation "
            "shards, or choose an objective that needs none (images_per_s, gflops, params_m)"
        )
    if sweep.search.method == "nsga2" and len(sweep.objective) < 2:
        raise ConfigError(
            f"search.method = nsga2 searches for a front of two objectives or more, and objective = {sweep.objective[0]} is "
            "one; add one, such as params_m, or use tpe"
        )
    if sweep.scheduler.type != "none" and scheduler_metric(sweep) is None:
        raise ConfigError(
            f"scheduler.type = {sweep.scheduler.type} judges trials while they train, and of objective = "
            f"{', '.join(sweep.objective)} nothing is known until the end; set scheduler.metric to one of "
            f"{', '.join(LIVE_OBJECTIVES)}"
        )


def _check_one_place(configs: Mapping[str, RunConfig]) -> None:
    for key in _ONE_PLACE:
        differing = _differing(configs, key)
        if differing:
            raise ConfigError(f"{key} differs between arms ({differing}), and a sweep lies in one place; set it under set")


def _check_pair(sweep: SweepConfig, configs: Mapping[str, RunConfig]) -> None:
    solved = {arm for arm in configs if _kind(sweep, arm, SAME_FLOPS_KEY) == "same_flops_as"}
    for key in _PAIRED:
        is_length = key in ("train.steps", "train.epochs")
        compared = {arm: config for arm, config in configs.items() if not (is_length and arm in solved)}
        varied = {arm for arm in compared if key in sweep.domains_of(arm)}
        domains = {repr(sweep.domains_of(arm).get(key)) for arm in compared}
        fix = "make it equal, or set pair: false"
        if is_length:
            fix = "make it equal, let train.steps follow training FLOPs (same_flops_as), or set pair: false"
        if len(domains) > 1:
            raise ConfigError(f"pair: {key} varies in arm '{min(varied)}' and not alike in every arm; {fix}")
        differing = "" if varied else _differing(compared, key)
        if differing:
            raise ConfigError(
                f"pair: {key} differs between arms ({differing}), so their runs differ in more than the arm; {fix}"
            )


def _check_losses(sweep: SweepConfig, runs: Iterable[RunConfig]) -> None:
    users = ["objective"] if "eval_loss" in sweep.objective else []
    if sweep.scheduler.type != "none" and scheduler_metric(sweep) == "eval_loss":
        users.append("scheduler.metric")
    if not users:
        return
    runs = list(runs)
    for key in (f"model.{name}" for name in LOSS_TARGET):
        values = sorted({value_at(run, key) for run in runs})
        if len(values) > 1:
            raise ConfigError(
                f"{' and '.join(users)} = eval_loss, but {key} takes {', '.join(map(str, values[:6]))} over the trials: their "
                f"losses answer different questions; choose knn_top1 or probe_top1, or hold {key} equal "
                f"(--set {key}={values[0]})"
            )


def _check_scheduler(sweep: SweepConfig, plan: Plan, steps: int | None) -> None:
    scheduler, cadence = sweep.scheduler, sweep.report_every_steps
    if scheduler.bracket_by is not None and scheduler.type not in ("asha", "median"):
        raise ConfigError(f"scheduler.bracket_by does nothing for scheduler.type = {scheduler.type}; use asha or median")
    if scheduler.perturb and scheduler.type != "pbt":
        raise ConfigError(f"scheduler.perturb has no effect with scheduler.type = {scheduler.type}; use pbt, or drop it")
    if scheduler.type == "pbt":
        _check_population(sweep, plan, steps)
    elif scheduler.type != "none":
        grace = scheduler.grace_steps
        assert grace is not None
        if grace < cadence:
            raise ConfigError(
                f"scheduler.grace_steps = {grace} comes before the first report, at report_every_steps = {cadence}; raise "
                f"the one to {cadence}, or report every {grace} steps"
            )
        if steps is not None and steps <= grace:
            raise ConfigError(
                f"scheduler.type = {scheduler.type} stops no trial before step {grace}, and the shortest runs have "
                f"{steps} steps; lower scheduler.grace_steps (and report_every_steps), train longer, or use scheduler.type none"
            )
        if scheduler.type in ("asha", "hyperband") and steps is not None:
            _check_rungs(grace, scheduler.reduction_factor, cadence, steps)


def _check_rungs(grace: int, factor: float, cadence: int, steps: int) -> None:
    """Each rung needs a report of its own: the first one at or after it."""
    rung, judged = float(grace), 0
    while rung < steps:
        report = math.ceil(rung / cadence) * cadence
        if report == judged:
            raise ConfigError(
                f"report_every_steps = {cadence} is too coarse for rungs at {rung / factor:g} and {rung:g} steps: both are "
                f"judged at step {report}; report every {max(1, int(rung - rung / factor))} steps or more often, or raise "
                "scheduler.grace_steps or scheduler.reduction_factor"
            )
        rung, judged = rung * factor, report


def _check_population(sweep: SweepConfig, plan: Plan, steps: int | None) -> None:
    scheduler, cadence = sweep.scheduler, sweep.report_every_steps
    interval = scheduler.interval_steps
    if not scheduler.perturb:
        raise ConfigError(
            "scheduler.type = pbt changes nothing without scheduler.perturb; give it keys, such as "
            "{optimizer.lr: {loguniform: [1e-4, 1e-2]}}"
        )
    for key in scheduler.perturb:
        _check_perturbed(sweep, plan, key)
    if interval is None or interval < cadence or interval % cadence:
        raise ConfigError(
            f"scheduler.interval_steps = {interval}: pbt looks at its population at reports, every "
            f"report_every_steps = {cadence}; give a multiple of {cadence}"
        )
    if steps is not None and steps <= interval:
        raise ConfigError(
            f"scheduler.interval_steps = {interval} and the shortest runs have {steps} steps: no trial could copy another one; "
            "lower the interval or train longer"
        )
    if sweep.search.method in ("tpe", "nsga2"):
        raise ConfigError(
            f"search.method = {sweep.search.method} with pbt: two searches of the same trials; use random or grid"
        )
    for arm, points in plan.points.items():
        if len(points) != scheduler.population:
            raise ConfigError(
                f"scheduler.population = {scheduler.population}, and arm '{arm}' has {len(points)} feasible points; let them "
                "agree, or set search.method to random, which draws as many"
            )


def _check_perturbed(sweep: SweepConfig, plan: Plan, key: str) -> None:
    """A trial that copies another one changes this key alone, in the middle of its training."""
    if key in _NOT_PERTURBABLE or not (key.startswith("optimizer.") or key in _PERTURBABLE):
        raise ConfigError(
            f"scheduler.perturb.{key}: a trial goes on with another one's weights, which this key does not fit; valid: keys of "
            f"optimizer but its name, {', '.join(_PERTURBABLE)}"
        )
    for arm in plan.points:
        if followers := depending_on(key, sweep.domains_of(arm))[1:]:
            raise ConfigError(
                f"scheduler.perturb.{key}: {', '.join(followers)} of arm '{arm}' follows it, and would keep its old value in a "
                "trial that copies another one; give what follows values of its own, or do not perturb this key"
            )


def _kind(sweep: SweepConfig, arm: str, key: str) -> str | None:
    domain = sweep.domains_of(arm).get(key)
    return domain.kind if domain else None


def _differing(configs: Mapping[str, RunConfig], key: str) -> str:
    """Arms with their values of a key, where these differ; else nothing."""
    values = {arm: value_at(config, key) for arm, config in configs.items()}
    if len({repr(value) for value in values.values()}) < 2:
        return ""
    return ", ".join(f"{arm}: {value}" for arm, value in values.items())
