"""All pictures of a comparison, and why one is not there.

In: a comparison. Out: drawings by name, and a sentence for each that has nothing to show.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crate_ray.analysis.comparison.canvas import Page, drawing
from crate_ray.analysis.comparison.document import Drawing
from crate_ray.analysis.comparison.panels import (
    plot_differences,
    plot_layers,
    plot_sensitivity,
    shown_differences,
    with_intervals,
)
from crate_ray.analysis.comparison.result import Comparison
from crate_ray.analysis.comparison.scatter import ALL_IN_DETAIL, COSTS, MOST_LEADING, Cost, plot_cost, points_of
from crate_ray.analysis.comparison.wording import (
    MEASURE_NAMES,
    NO_TIME,
    SETTING_NAMES,
    family_names,
    metric_measure,
    model_name,
    sentence,
)
from crate_ray.analysis.objectives import amount_text, count_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAIN = COSTS[0].name
DIFFERENCES, SENSITIVITY, LAYERS = "differences", "sensitivity", "layers"
NAMES = (*(cost.name for cost in COSTS), DIFFERENCES, SENSITIVITY, LAYERS)
"""Of all pictures there may be."""


@dataclass(frozen=True)
class Plan:
    """A picture to be drawn: how, and the words with it."""

    plot: Callable[[Comparison, Page], "Figure"]
    title: str
    caption: str
    alt: str


@dataclass(frozen=True)
class Drawings:
    """What was drawn.

    Attributes:
        by_name: Drawings.
        absent: Why there is none, by the names of the others.
    """

    by_name: Mapping[str, Drawing]
    absent: Mapping[str, str]


def draw(comparison: Comparison, *, dpi: int = 150) -> Drawings:
    """Draws what there is to draw.

    Args:
        comparison: What was found.
        dpi: Of the PNG.
    """
    plans = plan(comparison)
    drawn = {name: _drawn(comparison, name, item, dpi) for name, item in plans.items() if isinstance(item, Plan)}
    return Drawings(drawn, {name: item for name, item in plans.items() if isinstance(item, str)})


def plan(comparison: Comparison) -> dict[str, Plan | str]:
    """What is to be drawn, by name; for the rest the sentence that says why there is no picture."""
    return {
        **{cost.name: _cost_plan(comparison, cost) for cost in COSTS},
        DIFFERENCES: _differences_plan(comparison),
        SENSITIVITY: _sensitivity_plan(comparison),
        LAYERS: _layers_plan(comparison),
    }


def _drawn(comparison: Comparison, name: str, item: Plan, dpi: int) -> Drawing:
    words = {"title": item.title, "caption": item.caption, "alt": item.alt}
    return drawing(name, lambda page: item.plot(comparison, page), dpi=dpi, **words)


def _cost_plan(comparison: Comparison, cost: Cost) -> Plan | str:
    points = points_of(comparison, cost)
    if not points:
        if cost.axis == "time":
            return f"No picture against time. {NO_TIME}"
        return f"No picture against {cost.noun}: no configuration is compared."
    if cost.axis == "time" and (why := hardware_refusal(comparison)):
        return f"No picture against time: {why}"
    measure = metric_measure(comparison)
    num_seeds = {len(point.seeds) for point in points}
    what = "one run" if num_seeds == {1} else "a configuration, at its mean over seeds"
    caption = f"Each point is {what}; the axis of {cost.noun} is logarithmic."
    if 1 in num_seeds:
        caption += " One seed tells nothing of the luck of training."
    if cost.axis is None:
        caption += " Decoders count here and are no part of what is used later; no curve is fitted."
    if refused := [finding.key for finding in comparison.findings if finding.severity == "refused"]:
        caption += (
            f" Not all of them may be compared, for {', '.join(f'`{key}`' for key in dict.fromkeys(refused))} (see below)."
        )
    if len(points) > ALL_IN_DETAIL:
        caption += (
            f" Of more than {ALL_IN_DETAIL} configurations, intervals, seeds and names are drawn of the best of each family "
            f"and of those on a front alone, {MOST_LEADING} at most; the table has all."
        )
    left_out = len(comparison.configurations) - len(points)
    if left_out:
        caption += f" {count_text(left_out, 'configuration')} without this number left out."
    by_model: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        by_model.setdefault(point.item.model, []).append((point.x, point.y))
    parts = []
    for model, at in by_model.items():
        xs, ys = zip(*at, strict=True)
        parts.append(
            f"{model_name(model)}: {count_text(len(at), 'configuration')}, {amount_text(min(xs))} to {amount_text(max(xs))}, "
            f"{measure.label} {amount_text(min(ys))} to {amount_text(max(ys))}"
        )
    name = f"{sentence(measure.label)} against {cost.noun}"
    alt = f"{name}. {'; '.join(parts)}. Horizontal: {cost.label}; vertical: {measure.axis}."
    return Plan(lambda found, page: plot_cost(found, cost, page), name, caption, alt)


def hardware_refusal(comparison: Comparison) -> str | None:
    """Why times are not compared; None where they are."""
    refusals = (item.text for item in comparison.findings if item.severity == "refused" and item.key == "hardware")
    return next(refusals, None)


def _differences_plan(comparison: Comparison) -> Plan | str:
    shown = with_intervals(comparison)
    if not shown:
        return "No picture of differences: none has two pairs of seeds."
    crate, vit = family_names(comparison).values()
    caption = (
        f"{crate} minus {vit} at equal cost, with its 95% interval over paired seeds; the interval is not corrected, p is."
    )
    num_drawn = sum(len(items) for items in shown_differences(comparison).values())
    if num_drawn < len(shown):
        caption += f" The first of each axis in the order declared, {num_drawn} of {len(shown)}; the table has all."
    firm = sum(item.why_no_verdict is None for item in shown)
    found = f"{count_text(len(shown), 'difference')} between {crate} and {vit} with intervals; {firm} with a verdict."
    return Plan(plot_differences, "Differences, paired by seed", caption, f"{found} All are in the table.")


def _sensitivity_plan(comparison: Comparison) -> Plan | str:
    keys = list(dict.fromkeys(item.key for item in comparison.sensitivities))
    if not keys:
        return "No picture of sensitivity: neither mask ratio nor ISTA step nor threshold was varied."
    names = [SETTING_NAMES.get(key, key) for key in keys]
    caption = (
        "Best of the rest of the space at each value. Hollow: of screening runs, exploratory, and flattered by the choice."
    )
    alt = f"What was measured along {', '.join(names)}, by model. All values are in the table."
    return Plan(plot_sensitivity, "Sensitivity", caption, alt)


def _layers_plan(comparison: Comparison) -> Plan | str:
    curves = [curve for curve in comparison.layers if any(math.isfinite(value) for value in curve.trained)]
    if not curves:
        return "No picture by layer: no compared run has white-box measures."
    names = [MEASURE_NAMES.get(name, name) for name in dict.fromkeys(curve.measure for curve in curves)]
    caption = "Solid: after training. Dashed: the same model at initialisation, without which a falling curve says nothing."
    alt = f"By encoder layer, trained and at initialisation: {', '.join(names)}. All values are in the table."
    return Plan(plot_layers, "White-box measures by layer", caption, alt)
