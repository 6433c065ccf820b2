"""The comparison of CRATE-MAE with MAE: rows in, everything that a report says out.

In: rows of runs, from folders or from MLflow. Out: a Comparison. Nothing is read here but the rows and, through a function
of the caller, the records of a few chosen runs: the same rows, in any order, give the same comparison wherever they come from.
"""

from collections.abc import Mapping, Sequence
from statistics import median

from crate_ray.analysis.comparison.configurations import Sorted, model_names, sort_rows
from crate_ray.analysis.comparison.fronts import curves_of, ratios_of, total_ratios_of
from crate_ray.analysis.comparison.gates import (
    findings_of,
    is_loss,
    is_quality,
    largest_comparable,
)
from crate_ray.analysis.comparison.hypotheses import choices_of, declare, judge
from crate_ray.analysis.comparison.layers import ReadLayers, layer_curves
from crate_ray.analysis.comparison.noise import Answers
from crate_ray.analysis.comparison.result import AXES, Axis, Comparison, Configuration
from crate_ray.analysis.comparison.sensitivity import correlations, sensitivities
from crate_ray.analysis.comparison.verdicts import headline, verdicts
from crate_ray.analysis.comparison.wording import measure_of
from crate_ray.analysis.objectives import count_text
from crate_ray.config import ConfigError
from crate_ray.runs.rows import RunRow

_RAW_PIXELS = "raw_pixels_top1"
_FEW = 4  # configurations whose layers are all shown


def compare(
    rows: Sequence[RunRow],
    *,
    name: str,
    metric: str = "probe_top1",
    axes: Sequence[Axis] = AXES,
    answers: Answers | None = None,
    layers: ReadLayers | None = None,
    unread: Mapping[str, str] | None = None,
    commands: Sequence[str] = (),
) -> Comparison:
    """Compares runs of the two families.

    Args:
        rows: All that there are; those that cannot be compared are named with the reason.
        name: Of what is compared.
        metric: A name in RunRow.values.
        axes: The first one makes the headline.
        answers: By run_uid: what the run's probe answered on each source image, for the noise of the test set.
        layers: Reads the layers of a run; asked for those of the choices alone.
        unread: Why something has no row, by its name; it is named with the rest.
        commands: That produced the comparison.

    Raises:
        ConfigError: No rows, no finished run, one family alone, a metric that no run measured, or only as NaN, or one that is
            neither accuracy nor loss.
    """
    _check(rows, name, metric)
    sorted_rows = sort_rows(rows, metric)
    configurations = sorted_rows.configurations
    _check_compared(configurations, sorted_rows, name, metric)
    comparable = largest_comparable(configurations, metric)
    larger = not is_loss(metric)
    measure = measure_of(metric, sorted_rows.judged_split)
    hypotheses = declare(configurations, metric, axes)
    differences = judge(hypotheses, metric, measure, answers or {}, larger=larger)
    names = model_names(item.model for item in configurations)
    ratios = ratios_of(comparable, metric, axes, measure, names, larger=larger)
    sentences = verdicts(axes, configurations, differences, larger=larger)
    return Comparison(
        name=name,
        metric=metric,
        is_larger_better=larger,
        judged_split=sorted_rows.judged_split,
        rows=tuple(sorted(sorted_rows.rows, key=lambda row: (row.name, row.run_uid))),
        excluded=_together(unread or {}, sorted_rows.excluded),
        findings=findings_of(configurations, sorted_rows.rows, metric, axes),
        configurations=configurations,
        differences=differences,
        curves=curves_of(comparable, metric, axes, larger=larger),
        ratios=ratios,
        sensitivities=sensitivities(comparable, sorted_rows.screening, metric),
        layers=layer_curves(_shown(configurations), layers) if layers is not None else (),
        correlations=correlations(sorted_rows.rows),
        raw_pixels=_raw_pixels(comparable) if metric == "probe_top1" else None,
        verdicts=sentences,
        headline=headline(axes[0], sentences[axes[0]], ratios, differences, configurations, measure),
        commands=tuple(commands),
        total_ratios=total_ratios_of(comparable, metric, measure, names, larger=larger),
    )


def _together(unread: Mapping[str, str], excluded: Mapping[str, str]) -> dict[str, str]:
    """Both under names of their own: something without a row may be called as a run is."""
    return {f"{name} (not read)" if name in excluded else name: reason for name, reason in unread.items()} | dict(excluded)


def _check(rows: Sequence[RunRow], name: str, metric: str) -> None:
    """Refuses what holds nothing to compare, before anything is made of it."""
    if not rows:
        raise ConfigError(f"'{name}' holds no runs; name run folders, the folder above them, a sweep or an experiment")
    complete = [row for row in rows if row.is_complete and row.kind != "control"]
    if not complete:
        reasons = sorted({row.incomplete or row.state.lower() for row in rows})
        raise ConfigError(
            f"'{name}' holds {count_text(len(rows), 'run')} and none that has come to its end ({'; '.join(reasons[:3])}); "
            "only ends of completed schedules are compared: start them again and they go on"
        )
    known = sorted({key for row in complete for key in row.values})
    if metric not in known:
        fix = " `crate-ray probe RUN...` measures the probes." if metric.endswith("top1") else ""
        raise ConfigError(
            f"no finished run of '{name}' has {metric}; measured were: {', '.join(known) or 'no final values'}.{fix}"
        )
    if not is_quality(metric):
        comparable = ", ".join(filter(is_quality, known))
        raise ConfigError(f"{metric} says of no family that it is better; of '{name}' compare one of: {comparable or 'none'}")


def _check_compared(configurations: Sequence[Configuration], found: Sorted, name: str, metric: str) -> None:
    if not configurations:
        reasons = sorted(set(found.excluded.values()))
        raise ConfigError(f"no run of '{name}' can be compared by {metric}: {'; '.join(reasons[:4])}")
    families = {item.family for item in configurations}
    if len(families) == 1:
        only = "CRATE" if families == {"crate"} else "ViT"
        others = sorted({reason for reason in found.excluded.values() if "screening" not in reason})
        why = f" (excluded: {'; '.join(others[:3])})" if others else ""
        raise ConfigError(
            f"'{name}' has runs of one family alone with {metric}, {only}: a comparison needs both; name the runs of the other "
            f"family too{why}"
        )


def _shown(configurations: Sequence[Configuration]) -> list[Configuration]:
    """Whose layers are read: all of a few; else the choices of the screening, and the largest of a model without one."""
    if len(configurations) <= _FEW:
        return list(configurations)
    chosen = choices_of(configurations)
    rest = [item for item in configurations if item.model not in {other.model for other in chosen}]
    largest = {item.model: item for item in sorted(rest, key=lambda item: (item.positions["params"] or 0, item.label))}
    return [*chosen, *largest.values()]


def _raw_pixels(configurations: Sequence[Configuration]) -> float | None:
    found = [row.values[_RAW_PIXELS] for item in configurations for row in item.rows if _RAW_PIXELS in row.values]
    return median(found) if found else None
