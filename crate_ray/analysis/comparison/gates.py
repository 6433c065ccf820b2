"""What may be compared with what: the keys in which runs differ, and what that forbids.

In: configurations. Out: for two of them the reasons against a verdict, and findings over all of them that name the key and who
has which value. The trade-off: a difference in any part of the compare digest refuses a pair, also where it might be
harmless, for nobody can tell from the numbers.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from crate_ray.analysis.comparison.result import Axis, Configuration, Finding, Severity
from crate_ray.analysis.objectives import count_text, value_text
from crate_ray.config import digest
from crate_ray.runs.rows import RunRow

LEAST_SEEDS = 5
"""Of a configuration, or of pairs; with fewer there is no verdict."""
IMAGES_WITHIN = 0.01
"""Images seen, on the axis of parameters."""
_MANY = 4  # names in a sentence
_NOTHING = "nothing"


def compare_digest(row: RunRow) -> str:
    """The same for rows whose parts of the compare digest agree."""
    return digest(dict(row.compare))


def parts_of(item: Configuration, metric: str) -> dict[str, Any]:
    """What two configurations must share: the compare parts, how they were judged and, of a loss, its question."""
    row = item.rows[0]
    split, protocol = row.judge_of(metric)
    data = {"judged_data": judged_data_of(row, metric)} if split is not None else {}
    target = {f"loss_target.{key}": value for key, value in row.loss_target.items()} if is_loss(metric) else {}
    return {**row.compare, "judged_split": split, "protocol": protocol, **data, **target}


def judged_data_of(row: RunRow, metric: str) -> str | None:
    """Digest of the shards that a metric was judged on; None where it was not recorded."""
    return row.judged_data.get(row.data_of(metric))


def is_loss(metric: str) -> bool:
    """Whether a metric is a loss: smaller is better, and it compares only where it asks the same."""
    return "loss" in metric


def is_quality(metric: str) -> bool:
    """Whether a metric may rank one family against the other: accuracies and losses, no cost and nothing label-free."""
    return "top1" in metric or is_loss(metric)


def refusals(first: Configuration, second: Configuration, metric: str, axis: str) -> list[str]:
    """Why no verdict may be given between two configurations on an axis, whatever they measured; the gravest first."""
    a, b = parts_of(first, metric), parts_of(second, metric)
    reasons = [
        f"{key} differs ({_value(a.get(key))} and {_value(b.get(key))})"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]
    if axis == "params" and not is_within(images_of(first), images_of(second), IMAGES_WITHIN):
        reasons.append(f"images seen differ ({images_of(first):,.0f} and {images_of(second):,.0f})")
    if axis == "time" and hardware_of(first) != hardware_of(second):
        reasons.append(f"hardware differs ({_value(hardware_of(first))} and {_value(hardware_of(second))})")
    if first.tuning_trials != second.tuning_trials:
        reasons.append(f"unequal tuning budgets ({_budget(first.tuning_trials)} and {_budget(second.tuning_trials)})")
    reasons += [
        f"{item.label} was screened, not confirmed with fresh seeds" for item in (first, second) if not item.is_confirmed
    ]
    return reasons


def flags(first: Configuration, second: Configuration) -> tuple[str, ...]:
    """What a verdict between two configurations must say with it."""
    rows = (*first.rows, *second.rows)
    found = []
    if first.tuning_trials is None and second.tuning_trials is None:
        found.append("tuning budget not recorded")
    if any(row.untuned for row in rows):
        found.append("learning rates not tuned alike")
    if len({row.commit for row in rows}) > 1:
        found.append("trained by different versions of the code")
    if any(row.rollbacks or row.skipped_steps for row in rows):
        found.append("some runs were helped past steps without finite numbers")
    return tuple(found)


def is_within(a: float | None, b: float | None, share: float) -> bool:
    """Whether the larger of two positive numbers is at most `share` above the smaller."""
    return a is not None and b is not None and min(a, b) > 0 and max(a, b) <= (1 + share) * min(a, b)


def images_of(item: Configuration) -> float:
    """Images seen by a run of a configuration."""
    return sum(row.images for row in item.rows) / len(item.rows)


def hardware_of(item: Configuration) -> str | None:
    """What all its runs were timed on; None where they were not, or on different hardware."""
    found = {row.hardware for row in item.rows if row.timing == "exclusive"}
    return found.pop() if len(found) == 1 else None


def largest_comparable(configurations: Sequence[Configuration], metric: str) -> list[Configuration]:
    """The configurations that agree in all parts with most others; those of both families before those of one."""
    groups: dict[str, list[Configuration]] = {}
    for item in configurations:
        groups.setdefault(digest(parts_of(item, metric)), []).append(item)
    return max(groups.values(), key=lambda group: (len({item.family for item in group}), len(group)), default=[])


def findings_of(
    configurations: Sequence[Configuration], rows: Sequence[RunRow], metric: str, axes: Sequence[Axis]
) -> tuple[Finding, ...]:
    """Everything that configurations do not share or lack, and which of all rows ended without a number; refusals first."""
    found = [
        *_unequal_judges(rows, metric),
        *_unequal_parts(configurations, metric),
        *_unequal("refused", "tuning_trials", configurations, lambda item: _budget(item.tuning_trials), _TUNING),
        *_hardware(configurations, axes),
        *_code(configurations),
        *_untold_tuning(configurations),
        *_untuned(configurations),
        *_unconfirmed(configurations),
        *_seeds(configurations),
        *_finals(rows, metric),
        *_control(configurations),
        *_helped(configurations),
        *_dirty(configurations),
    ]
    order: dict[Severity, int] = {"refused": 0, "flagged": 1, "noted": 2}
    return tuple(sorted(found, key=lambda item: order[item.severity]))


_TUNING = "The tuning budgets differ: the side with more trials had more chances to be lucky, so no verdict is given across it."


def _unequal_judges(rows: Sequence[RunRow], metric: str) -> Iterator[Finding]:
    """Of all runs: those that were judged otherwise than most are in no configuration."""
    judged = [row for row in rows if row.is_complete and row.stage != "screen" and metric in row.values]
    for place, key, words in ((0, "judged_split", "splits"), (1, "protocol", "protocols")):
        values: dict[str, list[str]] = {}
        for row in judged:
            values.setdefault(row.judge_of(metric)[place] or _NOTHING, []).append(row.name)
        if len(values) > 1:
            told = {value: tuple(sorted(names)) for value, names in sorted(values.items())}
            text = f"Judged on different {words}; only runs that were judged as most were are compared"
            yield Finding("refused", key, told, f"{text}. {_listed(told)}.")


def _unequal_parts(configurations: Sequence[Configuration], metric: str) -> Iterator[Finding]:
    parts = [parts_of(item, metric) for item in configurations]
    for key in sorted({key for item in parts for key in item}):
        yield from _unequal(
            "refused",
            key,
            configurations,
            partial(_part, metric, key),
            f"`{key}` differs, so no verdict is given across it.",
        )


def _part(metric: str, key: str, item: Configuration) -> str:
    return _value(parts_of(item, metric).get(key))


def _unequal(
    severity: Severity,
    key: str,
    configurations: Sequence[Configuration],
    value_of: Callable[[Configuration], str],
    sentence: str,
) -> Iterator[Finding]:
    values = _holders(configurations, value_of)
    if len(values) > 1:
        yield Finding(severity, key, values, f"{sentence} {_listed(values)}.")


def _holders(configurations: Sequence[Configuration], value_of: Callable[[Configuration], str]) -> dict[str, tuple[str, ...]]:
    values: dict[str, list[str]] = {}
    for item in configurations:
        values.setdefault(value_of(item), []).append(item.label)
    return {value: tuple(labels) for value, labels in values.items()}


def _hardware(configurations: Sequence[Configuration], axes: Sequence[Axis]) -> Iterator[Finding]:
    if "time" not in axes:
        return
    untimed = tuple(item.label for item in configurations if item.positions["time"] is None)
    if untimed:
        text = (
            "Without an exclusive timing pass on one kind of hardware (`crate-ray time RUN...`), and so not on the axis of time"
        )
        yield Finding("noted", "timing", {_NOTHING: untimed}, f"{text}: {names_text(untimed)}.")
    timed = [item for item in configurations if item.positions["time"] is not None]
    sentence = "They were timed on different hardware, so hours are not compared across it."
    yield from _unequal("refused", "hardware", timed, lambda item: str(hardware_of(item)), sentence)


def _code(configurations: Sequence[Configuration]) -> Iterator[Finding]:
    values = _by_run(configurations, lambda row: row.commit or "not recorded")
    if len(values) > 1:
        text = "The runs were trained by different versions of the code; verdicts across them are given with this caution."
        yield Finding("flagged", "code", values, f"{text} {_listed({key[:8]: names for key, names in values.items()})}.")


def _by_run(configurations: Sequence[Configuration], value_of: Callable[[RunRow], str]) -> dict[str, tuple[str, ...]]:
    values: dict[str, list[str]] = {}
    for item in configurations:
        for row in item.rows:
            values.setdefault(value_of(row), []).append(row.name)
    return {value: tuple(names) for value, names in values.items()}


def _untold_tuning(configurations: Sequence[Configuration]) -> Iterator[Finding]:
    labels = tuple(item.label for item in configurations if item.tuning_trials is None)
    if labels:
        text = "How much these were tuned is not recorded: no trials of a sweep, or its screening cannot be read; judge it"
        yield Finding("flagged", "tuning_budget", {"not recorded": labels}, f"{text}: {names_text(labels)}.")


def _untuned(configurations: Sequence[Configuration]) -> Iterator[Finding]:
    values: dict[str, list[str]] = {}
    for item in configurations:
        for reason in sorted({row.untuned for row in item.rows if row.untuned}):
            values.setdefault(reason, []).append(item.label)
    if values:
        told = {reason: tuple(labels) for reason, labels in values.items()}
        text = "A model that loses here may win at a learning rate of its own, for the sweep compared"
        yield Finding("flagged", "learning_rate", told, f"{text} {_listed(told)}.")


def _unconfirmed(configurations: Sequence[Configuration]) -> Iterator[Finding]:
    labels = tuple(item.label for item in configurations if not item.is_confirmed)
    if labels:
        text = "Screened and not trained again with fresh seeds, so exploratory: the best of many single runs is flattered"
        yield Finding(
            "refused", "confirm", {_NOTHING: labels}, f"{text}: {names_text(labels)}. Give the sweep a `confirm` section."
        )


def _seeds(configurations: Sequence[Configuration]) -> Iterator[Finding]:
    few = [item for item in configurations if item.is_confirmed and len(item.rows) < LEAST_SEEDS]
    values = _holders(few, lambda item: count_text(len(item.rows), "seed"))
    if values:
        text = f"Fewer than {LEAST_SEEDS} seeds, so in no verdict and in no ratio"
        yield Finding("flagged", "seeds", values, f"{text}: {_listed(values)}.")


def _helped(configurations: Sequence[Configuration]) -> Iterator[Finding]:
    names = tuple(row.name for item in configurations for row in item.rows if row.rollbacks or row.skipped_steps)
    if names:
        text = "Helped past steps without finite numbers, so not the runs of their configuration alone"
        yield Finding("flagged", "interventions", {"rollbacks or skipped steps": names}, f"{text}: {names_text(names)}.")


def _dirty(configurations: Sequence[Configuration]) -> Iterator[Finding]:
    names = tuple(row.name for item in configurations for row in item.rows if row.is_dirty)
    if names:
        text = "Trained from a checkout with changes that no commit holds"
        yield Finding("noted", "dirty", {"changed": names}, f"{text}: {names_text(names)}.")


def without_gain(configurations: Sequence[Configuration]) -> list[str]:
    """Labels of those that are not shown to beat the same encoder untrained, where that was measured."""
    return [item.label for item in configurations if item.beats_control is False]


def _control(configurations: Sequence[Configuration]) -> Iterator[Finding]:
    labels = tuple(without_gain(configurations))
    if labels:
        text = "Not shown to beat the same encoder untrained, so what is compared may not have been learned"
        yield Finding("flagged", "control", {"no gain shown": labels}, f"{text}: {names_text(labels)}.")


def _finals(rows: Sequence[RunRow], metric: str) -> Iterator[Finding]:
    """Without these runs the mean of their configuration is that of the luckier part."""
    ended = [row for row in rows if row.is_complete and row.stage != "screen"]
    bad = sorted((row.name, row.values[metric]) for row in ended if not math.isfinite(row.values.get(metric, 0)))
    values = {
        word: names
        for word, is_such in (("NaN", math.isnan), ("infinite", math.isinf))
        if (names := tuple(name for name, value in bad if is_such(value)))
    }
    if values:
        text = f"Came to their end without a finite {metric}, so that the means are those of the luckier runs"
        yield Finding("flagged", "finals", values, f"{text}: {_listed(values)}.")


def _budget(trials: int | None) -> str:
    return "not recorded" if trials is None else f"{trials} trials"


def _value(value: Any) -> str:
    """A value short enough for a sentence: digests by their beginning."""
    if value is None:
        return _NOTHING
    text = value_text(value)
    return f"{text[:8]}..." if len(text) > 32 and text.isalnum() else text


def _listed(values: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{value}: {names_text(names)}" for value, names in values.items())


def names_text(names: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    shown = ", ".join(names[:_MANY])
    return f"{shown} and {len(names) - _MANY} more" if len(names) > _MANY else shown
