"""Runs that differ in their seed alone, as one configuration each, with a name of its own.

In: rows, and what is compared. Out: configurations, and why each other run is none of theirs. Of a sweep only its confirmed
runs count; one that confirmed nothing gives its best trial of each size, which is called exploratory everywhere.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

from crate_ray.analysis.comparison.gates import compare_digest, hardware_of, is_loss, judged_data_of
from crate_ray.analysis.comparison.result import Axis, Configuration
from crate_ray.analysis.comparison.wording import model_name
from crate_ray.analysis.objectives import value_text
from crate_ray.analysis.statistics import mean_t_interval
from crate_ray.runs.rows import Estimate, RunRow

# What the control and the gain of a metric are called, where they are not called after it.
_CONTROLS = {"probe_top1": "control_top1"}
_GAINS = {"probe_top1": "gain", "published_probe_top1": "published_gain"}
_LABEL_KEYS = {
    "mask_ratio": "mask",
    "ista_step_size": "step",
    "ista_lambda": "lambda",
    "lr": "lr",
    "wd": "wd",
    "patch": "patch",
    "heads": "heads",
    "global_batch": "batch",
    "precision": "",
    "dataset": "",
}


Judge = tuple[str | None, str | None]
"""Split and protocol."""


@dataclass(frozen=True)
class Sorted:
    """Rows in their places.

    Attributes:
        rows: All, each run once.
        configurations: By family, then by encoder parameters.
        screening: Complete rows of a sweep's first stage.
        excluded: Why each other row is not compared, by its name.
        judged_split: What the metric was judged on, in all configurations; None for a metric without a judge.
    """

    rows: tuple[RunRow, ...]
    configurations: tuple[Configuration, ...]
    screening: tuple[RunRow, ...]
    excluded: Mapping[str, str]
    judged_split: str | None


def model_names(models: Iterable[str]) -> dict[str, str]:
    """What the models of a comparison are called; facebook's MAE is MAE where no other is beside it."""
    present = set(models)
    names = {model: model_name(model) for model in sorted(present)}
    return names | ({"mae": "MAE"} if "mae" in present and "mae_all_tokens" not in present else {})


def sort_rows(rows: Sequence[RunRow], metric: str) -> Sorted:
    """Puts every row into its configuration, or says why it is in none.

    Screening trials are configurations only of a family that has nothing else.

    Args:
        rows: Of any kind and state; the same run twice counts once.
        metric: Name in RunRow.values.
    """
    unique = list({row.run_uid: row for row in sorted(rows, key=_order)}.values())
    names = unique_names(unique)
    confirmed_sweeps = {row.sweep for row in unique if row.stage == "confirm"}
    reasons: dict[str, str] = {}
    kept = unique
    for sieve in (
        _without_end,
        partial(_screened, confirmed_sweeps=confirmed_sweeps),
        partial(_without_number, metric=metric),
        partial(_unlucky, metric=metric),
        partial(_judged_otherwise, metric=metric),
        partial(_judged_on_others, metric=metric),
        partial(_twice, names=names),
    ):
        found = sieve(kept)
        reasons |= found
        kept = [row for row in kept if row.run_uid not in found]
    return Sorted(
        rows=tuple(unique),
        configurations=_configurations(kept, unique, reasons, metric),
        screening=tuple(row for row in unique if row.stage == "screen" and row.is_complete),
        excluded={names[uid]: reason for uid, reason in reasons.items()},
        judged_split=kept[0].judge_of(metric)[0] if kept else None,
    )


def _order(row: RunRow) -> tuple[str, str, int, str, str]:
    return row.family, row.configuration, row.seed, row.run_uid, row.judged_split or ""


def unique_names(rows: Sequence[RunRow]) -> dict[str, str]:
    """The name of each run, or where it lies, where two are called alike."""
    counts = Counter(row.name for row in rows)
    return {row.run_uid: row.name if counts[row.name] == 1 else f"{row.uri} ({row.run_uid[:8]})" for row in rows}


def _without_end(rows: Sequence[RunRow]) -> dict[str, str]:
    """Runs that did not take the last step of their schedule, and controls, which took none."""
    found = {row.run_uid: row.incomplete or row.state.lower() for row in rows if not row.is_complete}
    return found | {row.run_uid: "a control, not a trained model" for row in rows if row.kind == "control"}


def _without_number(rows: Sequence[RunRow], metric: str) -> dict[str, str]:
    """Runs without the number that is compared."""
    fix = " (`crate-ray probe` measures it)" if metric.endswith("top1") else ""
    missing = {row.run_uid: f"{metric} was not measured{fix}" for row in rows if metric not in row.values}
    bad = [row for row in rows if not math.isfinite(row.values.get(metric, 0))]
    return missing | {row.run_uid: f"{metric} is {'NaN' if math.isnan(row.values[metric]) else 'infinite'}" for row in bad}


def _screened(rows: Sequence[RunRow], confirmed_sweeps: Set[str | None]) -> dict[str, str]:
    """Screening trials of a sweep that confirmed, or of a family that has trained runs anyway."""
    trained = {row.family for row in rows if row.stage != "screen"}
    chose = "a screening trial: it chose what was confirmed, and tells of sensitivities alone"
    alone = "a screening trial, of a sweep that confirmed nothing: it tells of sensitivities alone"
    screened = [row for row in rows if row.stage == "screen"]
    left_out = [row for row in screened if row.sweep in confirmed_sweeps or row.family in trained]
    return {row.run_uid: chose if row.sweep in confirmed_sweeps else alone for row in left_out}


def _unlucky(rows: Sequence[RunRow], metric: str) -> dict[str, str]:
    """Of screening trials that stand for themselves, all but the best of their model and size."""
    groups: dict[tuple[object, ...], list[RunRow]] = {}
    for row in rows:
        if row.stage == "screen":
            groups.setdefault((row.sweep, row.model, row.params_encoder, row.images), []).append(row)
    sign = -1 if is_loss(metric) else 1
    reason = "a screening trial that another one of its model and size did better than"
    return {
        row.run_uid: reason
        for group in groups.values()
        for row in sorted(group, key=lambda row: (-sign * row.values[metric], row.configuration))[1:]
    }


def _judge_of(rows: Sequence[RunRow], metric: str) -> Judge:
    """How most of the rows were judged; test before validation and the newer protocol, where as many."""
    counts = Counter(row.judge_of(metric) for row in rows)
    return max(counts, key=lambda judge: (counts[judge], judge[0] == "test", _version(judge[1])), default=(None, None))


def _version(protocol: str | None) -> tuple[int, str]:
    """Number and name of a protocol, "house/10", by which the newer one is the larger."""
    name, _, number = (protocol or "").rpartition("/")
    return (int(number) if number.isdecimal() else -1), name


def _judged_otherwise(rows: Sequence[RunRow], metric: str) -> dict[str, str]:
    judge = _judge_of(rows, metric)
    found = {}
    for row in rows:
        split, protocol = row.judge_of(metric)
        if split != judge[0]:
            found[row.run_uid] = f"judged on {split or 'nothing'}, and the comparison is on {judge[0] or 'nothing'}"
        elif protocol != judge[1]:
            found[row.run_uid] = f"judged by protocol {protocol}, and the comparison by {judge[1]}"
    return found


def _judged_on_others(rows: Sequence[RunRow], metric: str) -> dict[str, str]:
    """Runs judged on other shards than most seeds of their configuration, or than most of all runs where it has no majority."""
    groups: dict[tuple[str, str], list[RunRow]] = {}
    for row in rows:
        if row.judge_of(metric)[0] is not None:
            groups.setdefault((row.configuration, compare_digest(row)), []).append(row)
    overall = Counter(judged_data_of(row, metric) for group in groups.values() for row in group)
    found = {}
    for group in groups.values():
        counts = Counter(judged_data_of(row, metric) for row in group)
        most = max(counts, key=lambda data: (counts[data], overall[data], data or ""))
        for row in group:
            if (own := judged_data_of(row, metric)) != most:
                words = f"judged on shards {_shards(own)}, and most seeds of its configuration on {_shards(most)}"
                found[row.run_uid] = words
    return found


def _shards(data: str | None) -> str:
    return "that were not recorded" if data is None else data[:8]


def _twice(rows: Sequence[RunRow], names: Mapping[str, str]) -> dict[str, str]:
    """Two runs of one configuration and seed are one draw, not two: the first counts."""
    first: dict[tuple[str, str, int], RunRow] = {}
    found = {}
    for row in sorted(rows, key=lambda row: (row.created or 0, row.run_uid)):
        held = first.setdefault((row.configuration, compare_digest(row), row.seed), row)
        if held is not row:
            found[row.run_uid] = f"the same configuration and seed as {names[held.run_uid]}"
    return found


def _configurations(
    kept: Sequence[RunRow], rows: Sequence[RunRow], reasons: Mapping[str, str], metric: str
) -> tuple[Configuration, ...]:
    groups: dict[tuple[str, str], list[RunRow]] = {}
    for row in sorted(kept, key=lambda row: row.seed):
        groups.setdefault((row.configuration, compare_digest(row)), []).append(row)
    siblings: dict[str, list[RunRow]] = {}
    for row in rows:
        siblings.setdefault(row.configuration, []).append(row)
    planned: dict[str, set[int]] = {}
    for row in rows:
        if row.stage == "confirm" and row.sweep is not None:
            planned.setdefault(row.sweep, set()).add(row.seed)
    made = [
        _configuration(group, _missing(group, siblings[group[0].configuration], planned, reasons), metric)
        for group in groups.values()
    ]
    labelled = _labelled(made)
    return tuple(sorted(labelled, key=lambda item: (item.family, item.positions["params"] or 0, item.label)))


def _missing(
    group: Sequence[RunRow], siblings: Sequence[RunRow], planned: Mapping[str, set[int]], reasons: Mapping[str, str]
) -> dict[int, str]:
    """Why a seed that was planned for the configuration, or started, is not among its rows."""
    kept = {row.seed for row in group}
    started = {row.seed: reasons[row.run_uid] for row in siblings if row.run_uid in reasons and row.stage != "screen"}
    never = dict.fromkeys(planned.get(group[0].sweep or "", set()) if group[0].stage == "confirm" else set(), "never started")
    return {seed: reason for seed, reason in sorted({**never, **started}.items()) if seed not in kept}


def _configuration(group: Sequence[RunRow], missing: Mapping[int, str], metric: str) -> Configuration:
    row = group[0]
    controls = {item.seed: value for item in group if (value := control_of(item, metric)) is not None}
    unlabelled = Configuration(
        key=row.configuration,
        label="",
        family=row.family,
        model=row.model,
        arm=row.arm,
        rows=tuple(group),
        missing=missing,
        metric=mean_t_interval([item.values[metric] for item in group]),
        control=fmean(controls.values()) if controls else None,
        positions={},
        params_total=row.params_total,
        is_confirmed=all(item.stage != "screen" for item in group),
        tuning_trials=max((item.tuning_trials for item in group if item.tuning_trials is not None), default=None),
        gain=_gain(group, controls, metric),
    )
    return replace(unlabelled, positions=_positions(unlabelled))


def control_of(row: RunRow, metric: str) -> float | None:
    """The metric of the same encoder untrained, by the same protocol; None where it was not measured."""
    name = _named_as(row, metric, _CONTROLS, "control_{}")
    value = row.intervals[name].value if name in row.intervals else row.values.get(name, math.nan)
    return value if math.isfinite(value) else None


def _gain(group: Sequence[RunRow], controls: Mapping[int, float], metric: str) -> Estimate | None:
    gains = [row.values[metric] - controls[row.seed] for row in group if row.seed in controls]
    if len(gains) > 1:
        return mean_t_interval(gains)
    return group[0].intervals.get(_named_as(group[0], metric, _GAINS, "{}_gain")) if len(group) == 1 else None


def _named_as(row: RunRow, metric: str, names: Mapping[str, str], otherwise: str) -> str:
    """What stands beside a metric, on the same shards."""
    prefix = f"{data}_" if (data := row.data_of(metric)) else ""
    own = metric.removeprefix(prefix)
    return prefix + names.get(own, otherwise.format(own))


def _positions(item: Configuration) -> dict[Axis, float | None]:
    hours = [hours for row in item.rows if (hours := row.exclusive_hours) is not None]
    return {
        "params": float(item.rows[0].params_encoder),
        "flops": fmean(row.train_pflops for row in item.rows),
        "time": fmean(hours) if hours and hardware_of(item) is not None else None,
    }


def _labelled(items: Sequence[Configuration]) -> list[Configuration]:
    """Labels as short as they can be and still tell all apart."""
    names = model_names(item.model for item in items)
    labels = [_shape_label(item.rows[0], names) for item in items]
    by_label: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        by_label.setdefault(label, []).append(index)
    for same in by_label.values():
        if len(same) > 1:
            for index, extra in zip(same, _distinctions([items[i] for i in same]), strict=True):
                labels[index] += f", {extra}"
    counts = Counter(labels)
    unique = [label if counts[label] == 1 else f"{label} #{item.key[:4]}" for label, item in zip(labels, items, strict=True)]
    again = Counter(unique)
    return [
        replace(item, label=label if again[label] == 1 else f"{label}-{compare_digest(item.rows[0])[:4]}")
        for label, item in zip(unique, items, strict=True)
    ]


def _shape_label(row: RunRow, names: Mapping[str, str]) -> str:
    """'CRATE-MAE 4x128', 'CRATE-MAE untied 4x128'; the words of an ablation and the shape are those of `arch`."""
    words = str(row.settings.get("arch", "")).split()[1:]
    return " ".join([names[row.model], *words])


def _distinctions(items: Sequence[Configuration]) -> list[str]:
    """What tells configurations of one shape apart: settings, then length, then the parts of the compare digest."""
    facts = [_facts(item.rows[0]) for item in items]
    keys = [key for key in dict.fromkeys(key for fact in facts for key in fact) if len({fact.get(key) for fact in facts}) > 1]
    chosen: list[str] = []
    for key in keys:  # as few as tell them apart
        spelled = {tuple(fact.get(other) for other in (*chosen, key)) for fact in facts}
        if len(spelled) > len({tuple(fact.get(other) for other in chosen) for fact in facts}):
            chosen.append(key)
    return [
        ", ".join(f"{key} {fact.get(key, 'none')}".strip() for key in chosen) or item.key[:4]
        for fact, item in zip(facts, items, strict=True)
    ]


def _facts(row: RunRow) -> dict[str, str]:
    settings = {
        name or key: value_text(row.settings[key]) for key, name in _LABEL_KEYS.items() if row.settings.get(key) is not None
    }
    parts = {key.rpartition(".")[2]: str(value)[:8] for key, value in row.compare.items()}
    return {**settings, "images": f"{row.images:,}", **parts, "sweep": (row.sweep or "none")[:6]}
