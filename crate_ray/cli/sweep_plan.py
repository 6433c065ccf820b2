"""`crate-ray sweep --dry-run`: what a sweep would try, where, and what that would cost; nothing is written.

In: a SweepConfig. Out: text or one JSON object. The data's index is read, and training steps of the smallest and the largest
run of every arm are timed unless that is unwanted. A cluster is asked only where RAY_ADDRESS names one: for its capacity, and
for the time of those steps. Else this machine stands for it, and no cluster is started for the question.
"""

import os
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from crate_ray.cli.output import console, errors, print_json, print_table, print_text
from crate_ray.cli.progress import duration
from crate_ray.cli.sweep_table import shape_of, varying_keys
from crate_ray.config import SweepConfig, is_exploratory
from crate_ray.config.prices import NO_PRICE, find_price
from crate_ray.space import Plan, describe_refusals, make_plan
from crate_ray.space.check import check_sweep
from crate_ray.space.planned import PlannedSweep, planned_sweep

if TYPE_CHECKING:
    from crate_ray.space.forecast import Forecast

FIRST_POINTS = 3  # of each arm
_UNITS = {"gpu_hours": "GPU-hours", "cpu_hours": "CPU-hours", "wall_hours": "wall time", "usd": "USD"}


def plan(sweep: SweepConfig, *, measure: bool, as_json: bool) -> None:
    """Prints what a sweep would be.

    Args:
        sweep: The sweep.
        measure: Whether to time training steps.
        as_json: Print one JSON object.

    Raises:
        ConfigError: The sweep could not run.
    """
    from crate_ray.launch.sweeps.driver import num_samples_of
    from crate_ray.launch.sweeps.folder import locate_sweep

    folder, samples = locate_sweep(sweep), num_samples_of(sweep)
    check_sweep(sweep, samples)
    found = make_plan(sweep, samples)
    planned = planned_sweep(sweep, found, samples)
    room = _room(sweep)
    facts = {"sweep": sweep.name, "folder": folder.uri, **_points(sweep, found, planned), "capacity": room}
    price = find_price(sweep.budget, sweep.resources_per_trial)
    facts |= {"price": NO_PRICE if price is None else price.said, "forecast": None, "beyond_budget": []}
    if measure:
        forecast = _forecast(sweep, found, samples, room["trials_at_a_time"])
        facts |= {"forecast": forecast.as_dict(), "beyond_budget": forecast.beyond(sweep)}
    if as_json:
        print_json(facts)
    else:
        _print(sweep, facts)


def _room(sweep: SweepConfig) -> dict[str, Any]:
    """Where trials would run, and how many at a time.

    Raises:
        ConfigError: No cluster answers at RAY_ADDRESS, or a trial could never fit.
    """
    from crate_ray.launch.cluster import check_trial_fits, connect, this_machine, trial_room
    from crate_ray.launch.sweeps.driver import sweep_capacity

    if os.environ.get("RAY_ADDRESS"):
        where, have = f"the cluster at {connect()}", sweep_capacity(sweep)
    else:
        where, have = "this machine", this_machine()
    check_trial_fits(sweep.resources_per_trial, have)
    fit = trial_room(sweep.resources_per_trial, have)
    return {
        "where": where,
        "nodes": len(have.nodes),
        "cpus": have.total("CPU"),
        "gpus": have.total("GPU"),
        "trials_at_a_time": min(fit, sweep.max_concurrent or fit),
    }


def _points(sweep: SweepConfig, found: Plan, planned: PlannedSweep) -> dict[str, Any]:
    keys = varying_keys(sweep)
    tried, refused = len(planned.screen), found.refused.total()
    feasible = sum(map(len, found.points.values()))
    return {
        "trials": tried,
        "confirm_trials": planned.num_confirm,
        "feasible_points": feasible,
        "feasible_share": feasible / (feasible + refused),
        "refused": dict(found.refused),
        "exploratory": is_exploratory(sweep),
        "arms": {
            arm: {
                "points": len(points),
                "first": [{"shape": shape_of(point.values, keys), **point.as_dict()} for point in points[:FIRST_POINTS]],
            }
            for arm, points in found.points.items()
        },
    }


def _forecast(sweep: SweepConfig, found: Plan, samples: int, concurrency: int) -> "Forecast":
    from crate_ray.launch.sweeps.measure import forecast_sweep

    errors.print("[dim]timing the smallest and the largest run of every arm ...[/dim]")
    _, forecast = forecast_sweep(sweep, found, num_samples=samples, concurrency=concurrency)
    return forecast


def _print(sweep: SweepConfig, facts: dict[str, Any]) -> None:
    for line in (*_trial_lines(sweep, facts), *_place_lines(facts)):
        print_text(line)
    if facts["exploratory"]:
        print_text(f"exploratory, {facts['exploratory']}", style="yellow")
    console.print()
    _print_first(facts)
    _print_forecast(facts)


def _trial_lines(sweep: SweepConfig, facts: dict[str, Any]) -> list[str]:
    per_arm = ", ".join(f"{arm} {body['points']}" for arm, body in facts["arms"].items())
    lines = [f"{sweep.name}: {facts['trials']} screening trials; feasible points: {per_arm}"]
    if sweep.confirm is not None:
        lines[0] += f"; then {facts['confirm_trials']} runs to confirm, {sweep.confirm.seeds} seeds each"
    if facts["refused"]:
        lines.append(f"feasible {facts['feasible_share']:.0%}; refused: {describe_refusals(facts['refused'])}")
    if facts["trials"] < facts["feasible_points"]:
        lines.append(f"budget.trials = {sweep.budget.trials} leaves out {facts['feasible_points'] - facts['trials']} of them")
    return lines


def _place_lines(facts: dict[str, Any]) -> list[str]:
    room = facts["capacity"]
    nodes = f" in {room['nodes']} nodes" if room["nodes"] != 1 else ""
    has = f"{room['cpus']:g} CPUs and {room['gpus']:g} GPUs{nodes}"
    return [f"on {room['where']}, {has}: {room['trials_at_a_time']} trials at a time", f"folder {facts['folder']}"]


def _print_first(facts: dict[str, Any]) -> None:
    rows = [
        (escape(arm), escape(first["shape"]), str(first["seed"]))
        for arm, body in facts["arms"].items()
        for first in body["first"]
    ]
    print_table(("arm", "first points", "seed"), rows)
    console.print()


def _print_forecast(facts: dict[str, Any]) -> None:
    forecast = facts["forecast"]
    if forecast is None:
        print_text(f"no forecast without a measurement; price: {facts['price']}")
        return
    total, stages = forecast["total"], forecast["stages"]
    parts = {**stages, "total": total} if len(stages) > 1 else {"total": total}
    rows = [(name, *(_range(part[unit], unit) for unit in total)) for name, part in parts.items()]
    print_table(("forecast", *(_UNITS[unit] for unit in total)), rows)
    print_text(f"expected [least, most]; price: {facts['price']}")
    for text in facts["beyond_budget"]:
        print_text(f"past the budget: {text}: no trial starts that would go past it", style="yellow")


def _range(amount: dict[str, float] | str, unit: str) -> str:
    if isinstance(amount, str):  # no price
        return "-"
    low, expected, high = (
        duration(3600 * amount[key]) if unit == "wall_hours" else f"{amount[key]:.3g}" for key in ("low", "expected", "high")
    )
    return escape(f"{expected} [{low}, {high}]")
