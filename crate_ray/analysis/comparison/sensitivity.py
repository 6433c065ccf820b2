"""How a metric depends on the mask ratio and on ISTA's step size and threshold, and on what label-free measures say.

In: configurations and the screening of their sweeps. Out: curves along a setting, and rank correlations. What is confirmed
stands apart from what was screened, which is one seed a run and the best of several: exploratory, and called so.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean

from crate_ray.analysis.comparison.gates import compare_digest, is_loss
from crate_ray.analysis.comparison.result import Configuration, Sensitivity
from crate_ray.analysis.statistics import mean_t_interval, spearman
from crate_ray.runs.rows import Estimate, RunRow

KEYS = ("mask_ratio", "ista_step_size", "ista_threshold")
_LIVE = "eval_knn_top1"
"""What every screening measures; a probe costs more than most of them spend."""
LABEL_FREE = ("rankme", "alpha_req", "coding_rate")
_LABELLED = ("knn_top1", _LIVE, "eval_loss")
_REFERENCE = "probe_top1"


def sensitivities(configurations: Sequence[Configuration], screening: Sequence[RunRow], metric: str) -> tuple[Sensitivity, ...]:
    """Along each setting that varies: of confirmed configurations, and of the screening.

    Args:
        configurations: Those that may be compared with each other.
        screening: Complete screening rows.
        metric: A loss is left out along the mask ratio, where it asks another question at each value.
    """
    confirmed = [row for item in configurations if item.is_confirmed for row in item.rows]
    return (*_curves(confirmed, metric, is_confirmed=True), *_curves(_one_protocol(screening), metric, is_confirmed=False))


def _one_protocol(rows: Sequence[RunRow]) -> list[RunRow]:
    """The largest group of rows that may stand beside each other."""
    groups: dict[tuple[str, str | None, str | None], list[RunRow]] = {}
    for row in rows:
        groups.setdefault((compare_digest(row), *row.judge_of(_REFERENCE)), []).append(row)
    return max(groups.values(), key=len, default=[])


def _curves(rows: Sequence[RunRow], metric: str, *, is_confirmed: bool) -> Iterator[Sensitivity]:
    for key in KEYS:
        for model in dict.fromkeys(row.model for row in rows):
            own = [row for row in rows if row.model == model and setting_of(row, key) is not None]
            for measure in dict.fromkeys([metric, _LIVE]):
                found = _varied([row for row in own if math.isfinite(row.values.get(measure, math.nan))], key)
                if found and not (is_loss(measure) and key == "mask_ratio"):
                    yield _along(key, found, measure, metric, is_confirmed=is_confirmed)
                    break


def _varied(rows: Sequence[RunRow], key: str) -> list[RunRow]:
    """The runs of the sweep with most of them in which a setting varies: another sweep may have had other sizes."""
    sweeps: dict[str | None, list[RunRow]] = {}
    for row in rows:
        sweeps.setdefault(row.sweep, []).append(row)
    varied = [group for group in sweeps.values() if len({setting_of(row, key) for row in group}) > 1]
    return max(varied, key=lambda group: (len(group), group[0].sweep or ""), default=[])


def setting_of(row: RunRow, key: str) -> float | None:
    """The value of one of KEYS; None where the model has none, or one for each layer."""
    if key == "ista_threshold":
        step, weight = setting_of(row, "ista_step_size"), setting_of(row, "ista_lambda")
        return None if step is None or weight is None else float(f"{step * weight:.6g}")
    value = row.settings.get(key)
    return float(value) if isinstance(value, int | float) else None


def _along(key: str, rows: Sequence[RunRow], measure: str, metric: str, *, is_confirmed: bool) -> Sensitivity:
    by_value: dict[float, list[RunRow]] = {value: [] for value in sorted({setting_of(row, key) or 0.0 for row in rows})}
    for row in rows:
        by_value[setting_of(row, key) or 0.0].append(row)
    return Sensitivity(
        key=key,
        family=rows[0].family,
        values=tuple(by_value),
        metric=tuple(_best(rows, measure) for rows in by_value.values()),
        counts=tuple(len(rows) for rows in by_value.values()),
        is_confirmed=is_confirmed,
        model=rows[0].model,
        measure=None if measure == metric else measure,
    )


def _best(rows: Sequence[RunRow], measure: str) -> Estimate:
    """Of the configuration with the best mean over its seeds."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row.configuration, []).append(row.values[measure])
    choose: Callable[..., list[float]] = min if is_loss(measure) else max
    return mean_t_interval(choose(groups.values(), key=fmean))


def correlations(rows: Sequence[RunRow]) -> Mapping[str, Mapping[str, float]]:
    """Spearman's rank correlation of what needs no labels, and of kNN and loss, with the probe, family by family.

    Over complete trained runs that were judged alike; a control is none. A measure that ranks runs as the probe does may steer
    a sweep; across families none of these is compared. A loss is left out where the runs' losses ask different questions.
    """
    trained = [row for row in rows if row.is_complete and row.kind != "control"]
    alike = _one_protocol([row for row in trained if math.isfinite(row.values.get(_REFERENCE, math.nan))])
    found: dict[str, dict[str, float]] = {}
    for family in sorted({row.family for row in alike}):
        own = [row for row in alike if row.family == family]
        has_one_loss = len({repr(sorted(row.loss_target.items())) for row in own}) == 1
        names = [name for name in (*LABEL_FREE, *_LABELLED) if not is_loss(name) or has_one_loss]
        for name in names:
            value = spearman([row.values.get(name, math.nan) for row in own], [row.values[_REFERENCE] for row in own])
            if value is not None:
                found.setdefault(family, {})[name] = value
    return found
