"""Comparisons made by hand, for tests of what is written about them: invented numbers of a plausible size."""

import math
from statistics import fmean, stdev
from typing import Any

from crate_ray.analysis.comparison.result import (
    AXES,
    Axis,
    Comparison,
    Configuration,
    Curve,
    Difference,
    Finding,
    LayerCurve,
    Ratio,
    Sensitivity,
)
from crate_ray.runs.rows import Estimate, RunRow

T_95 = {2: 12.706, 3: 4.303, 5: 2.776, 10: 2.262}
FAMILY = {"crate_mae": "crate", "mae": "vit", "mae_all_tokens": "vit"}
TITLE = {"crate_mae": "CRATE-MAE", "mae": "MAE", "mae_all_tokens": "MAE all tokens"}


def make_row(
    name: str, *, seed: int = 0, top1: float = 0.9, model: str = "crate_mae", params: float = 5e5, **how: Any
) -> RunRow:
    """A finished run."""
    shape = how.pop("shape", (4, 128))
    fields: dict[str, Any] = {
        "run_uid": f"uid-{name}",
        "name": name,
        "uri": f"/runs/{name}",
        "kind": "train",
        "family": FAMILY[model],
        "model": model,
        "recipe": "digits",
        "seed": seed,
        "state": "FINISHED",
        "is_complete": True,
        "configuration": f"{hash((model, shape)) & 0xFFFFFFFF:08x}",
        "settings": {"depth": shape[0], "width": shape[1], "mask_ratio": 0.75, "ista_step_size": 0.1},
        "compare": {"data": {"digest": "d1"}, "precision": "float32"},
        "commit": "0123abc",
        "is_dirty": False,
        "tuning_trials": 12,
        "params_total": int(2 * params),
        "params_encoder": int(params),
        "params_paper": int(params * 1.1),
        "train_flops_per_image": 6 * params * 64,
        "images": 500_000,
        "train_pflops": 6 * params * 64 * 5e5 / 1e15,
        "train_hours": 0.4,
        "hardware": "1 x NVIDIA H200",
        "images_per_s": 9e8 / params,
        "timing": "exclusive",
        "values": {"probe_top1": top1, "knn_top1": top1 - 0.03, "eval_loss": 1 - top1 / 2},
        "intervals": {"probe_top1": Estimate(top1, top1 - 0.02, top1 + 0.02)},
        "judged_split": "test",
        "probe_protocol": 2,
    }  # fmt: skip
    return RunRow(**{**fields, **how})


def over_seeds(values: list[float]) -> Estimate:
    """Mean with its t interval, by the formula of the textbook."""
    mean, n = fmean(values), len(values)
    half = T_95[n] * stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(mean, mean - half, mean + half)


def make_configuration(
    model: str, shape: tuple[int, int], params: float, top1: float, *, seeds: int = 5, label: str | None = None, **how: Any
) -> Configuration:
    """A configuration of so many seeds, each a little off the mean."""
    label = label or f"{TITLE[model]} {shape[0]}x{shape[1]}"
    control = how.pop("control", 0.55)
    is_confirmed = how.pop("is_confirmed", True)
    trials = how.pop("tuning_trials", 12)
    noise = [0.004 * math.sin(7 * seed + params) for seed in range(seeds)]
    rows = tuple(
        make_row(f"{label}-s{seed}", seed=seed, top1=top1 + noise[seed], model=model, params=params, shape=shape, **how)
        for seed in range(seeds)
    )
    positions: dict[Axis, float | None] = {
        "params": params,
        "flops": rows[0].train_pflops,
        "time": rows[0].exclusive_hours,
    }
    return Configuration(
        key=rows[0].configuration,
        label=label,
        family=FAMILY[model],
        model=model,
        arm=None,
        rows=rows,
        missing={},
        metric=over_seeds([row.values["probe_top1"] for row in rows]),
        control=control,
        positions=positions,
        params_total=int(2 * params),
        is_confirmed=is_confirmed,
        tuning_trials=trials,
        gain=None if control is None else over_seeds([row.values["probe_top1"] - control for row in rows]),
    )


def make_difference(first: Configuration, second: Configuration, axis: Any = "params", **how: Any) -> Difference:
    """Paired over the seeds that both have."""
    pairs = [a.values["probe_top1"] - b.values["probe_top1"] for a, b in zip(first.rows, second.rows, strict=False)]
    interval = over_seeds(pairs) if len(pairs) > 1 else None
    points = f"{100 * fmean(pairs):+.1f} points"
    fields: dict[str, Any] = {
        "axis": axis,
        "first": first,
        "second": second,
        "seeds": tuple(range(len(pairs))),
        "dropped": {},
        "interval": interval,
        "p_value": 0.004 if interval else None,
        "p_holm": 0.02 if interval else None,
        "test_noise": Estimate(fmean(pairs), fmean(pairs) - 0.012, fmean(pairs) + 0.012),
        "why_no_verdict": None if len(pairs) >= 5 else f"{len(pairs)} pairs, fewer than 5",
        "verdict": f"{first.label} against {second.label}: {points}.",
    }
    return Difference(**{**fields, **how})


def make_comparison(configurations: list[Configuration] | None = None, **how: Any) -> Comparison:
    """A full comparison of five seeds; every part can be replaced."""
    if configurations is None:
        configurations = default_configurations()
    rows = tuple(row for item in configurations for row in item.rows)
    crate = [item for item in configurations if item.family == "crate"]
    vit = [item for item in configurations if item.family == "vit"]
    excluded = {
        "old-run": "it did not take the last step of its schedule",
        "lost-run": "FAILED: worker lost",
        "other-run": "it did not take the last step of its schedule",
    }
    fields: dict[str, Any] = {
        "name": "digits-sweep",
        "metric": "probe_top1",
        "is_larger_better": True,
        "judged_split": "test",
        "rows": rows + tuple(make_row(name, seed=9) for name in excluded),
        "excluded": excluded,
        "findings": (
            Finding("flagged", "code", {"0123abc": ("a",), "4567def": ("b", "c")}, "The runs are of 2 commits."),
            Finding("noted", "timing", {"exclusive": ("a",)}, "Timings are of an exclusive pass."),
        ),
        "configurations": tuple(configurations),
        "differences": tuple(make_difference(a, b, axis) for axis in AXES for a, b in zip(crate, vit, strict=False)),
        "curves": tuple(curve for axis in AXES for curve in (front_of(crate, axis), front_of(vit, axis)) if curve),
        "ratios": (
            Ratio("params", "mae", 0.9, Estimate(0.42, 0.36, 0.51), None,
                  "CRATE-MAE needs 0.42x [0.36, 0.51] of the parameters of MAE at 90% probe accuracy."),
            Ratio("flops", "mae", None, None, "the fronts do not overlap", "No ratio of compute: the fronts do not overlap."),
        ),
        "total_ratios": (Ratio("params", "mae", None, None, "too few", "No ratio of all parameters: too few seeds."),),
        "sensitivities": sensitivities(),
        "layers": layer_curves(crate[0].label) if crate else (),
        "correlations": {"crate": {"knn_top1": 0.93, "rankme": 0.41}, "vit": {"knn_top1": 0.9, "rankme": math.nan}},
        "raw_pixels": 0.62,
        "verdicts": {
            "params": "At equal encoder parameters CRATE-MAE 4x128 is better than MAE by 1.2 points [0.3, 2.1].",
            "flops": "At equal training compute the two are not distinguishable: +0.1 points [-0.8, 1.0].",
            "time": "At equal time MAE is better by 0.9 points [0.2, 1.6].",
        },
        "headline": "CRATE-MAE needs 0.42x [0.36, 0.51] of the encoder parameters of MAE at 90% probe accuracy.",
        "commands": ("crate-ray sweep sweep.yaml", "crate-ray compare digits-sweep"),
    }  # fmt: skip
    return Comparison(**{**fields, **how})


def default_configurations() -> list[Configuration]:
    """Three sizes a model, both MAE."""
    return [
        make_configuration("crate_mae", (2, 96), 1.2e5, 0.868),
        make_configuration("crate_mae", (4, 128), 3.0e5, 0.902),
        make_configuration("crate_mae", (6, 192), 9.8e5, 0.921),
        make_configuration("mae", (2, 64), 1.22e5, 0.851),
        make_configuration("mae", (4, 80), 3.05e5, 0.897),
        make_configuration("mae", (6, 128), 9.9e5, 0.925),
        make_configuration("mae_all_tokens", (4, 80), 3.04e5, 0.894),
    ]


def front_of(items: list[Configuration], axis: Axis) -> Curve | None:
    """Through all of them, as a test needs no more."""
    points = sorted((x, item) for item in items if (x := item.positions[axis]) is not None and item.model != "mae_all_tokens")
    if len(points) < 2:
        return None
    x, y = tuple(x for x, _ in points), tuple(item.metric.value for _, item in points)
    return Curve(points[0][1].family, axis, "log_linear", tuple(item.label for _, item in points), x, y)


def estimates(*values: float, half: float = math.nan) -> tuple[Estimate, ...]:
    """Values with a common half width."""
    return tuple(Estimate(value, value - half, value + half) for value in values)


def layer_curves(label: str) -> tuple[LayerCurve, ...]:
    """Coding rate and sparsity of four layers."""
    return (
        LayerCurve(label, "crate", "coding_rate_post_nats", (210.0, 180.0, 120.0, 90.0), (190.0, 140.0, 70.0, 50.0)),
        LayerCurve(label, "crate", "nonzero_fraction", (0.42, 0.36, math.nan, 0.21), (0.49, 0.48, 0.47, 0.47)),
    )


def sensitivities() -> tuple[Sensitivity, ...]:
    """Two of screening runs, one confirmed."""
    ratios, steps = (0.5, 0.6, 0.75, 0.9), (0.05, 0.1, 0.2)
    crate, mae = estimates(0.86, 0.88, 0.885, 0.84), estimates(0.87, 0.885, 0.89, 0.86)
    confirmed = estimates(0.87, 0.886, 0.85, half=0.01)
    return (
        Sensitivity("mask_ratio", "crate", ratios, crate, (4, 4, 4, 4), False, "crate_mae"),
        Sensitivity("mask_ratio", "vit", ratios, mae, (4, 4, 4, 4), False, "mae"),
        Sensitivity("ista_step_size", "crate", steps, confirmed, (3, 3, 3), True, "crate_mae"),
    )
