"""Differences with their intervals, sensitivities, and white-box measures layer by layer.

In: a comparison and a page. Out: figures. A difference whose Holm-corrected test rejects equality is filled in the colour of
the better family; all others are hollow, whatever side they lie on.
"""

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from crate_ray.analysis.comparison.canvas import INK, MUTED, PAPER, Page, legend, model_style, short, title
from crate_ray.analysis.comparison.hypotheses import at_words, is_distinguished
from crate_ray.analysis.comparison.result import Comparison, Difference, LayerCurve, Sensitivity
from crate_ray.analysis.comparison.wording import (
    FAMILY_NAMES,
    MEASURE_NAMES,
    SETTING_NAMES,
    difference_text,
    family_names,
    has_interval,
    metric_measure,
    model_name,
    p_text,
    sensitivity_measure,
    sentence,
)
from crate_ray.analysis.drawing import FAMILY_COLOURS, new_figure, plain
from crate_ray.analysis.objectives import Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_DIFFERENCES = 24
"""In a picture; the table has all."""
_LINE_INCHES = 0.46
_HEADING_LINES = 0.8
_LOG_FROM = 4  # settings such as 0.05, 0.1, 0.2 are ratios
_MOST_TICKS = 8
_TICK_GAP = 0.14  # of the axis, so that the numbers below it do not touch
_MARKERS = "^vP*XhD"
_FAMILY_MARKERS = {"crate": "o", "vit": "s"}


def plot_differences(comparison: Comparison, page: Page) -> "Figure":
    """Each difference with its 95% interval over seeds and, thin below it, that over test images; a group an axis.

    Args:
        comparison: With a difference that has an interval.
        page: Wide or narrow.
    """
    measure = metric_measure(comparison)
    groups = shown_differences(comparison)
    shown = [item for items in groups.values() for item in items]
    num_lines = len(shown) + _HEADING_LINES * len(groups)
    figure = new_figure(page.width, 1.7 + _LINE_INCHES * num_lines + (0.3 if page.is_narrow else 0))
    axes = figure.subplots()
    axes.set_xlim(*_limits(shown, measure))
    axes.set_ylim(num_lines - 0.4, -0.3)
    axes.axvline(0, color=MUTED, linewidth=0.9, zorder=1)
    place = 0.0
    for items in groups.values():
        heading: dict[str, Any] = {"fontsize": page.font_pt - 0.5, "fontweight": "bold", "va": "center"}
        axes.text(0, place, sentence(at_words(items[0])), transform=axes.get_yaxis_transform(), **heading)
        place += _HEADING_LINES
        for item in items:
            _draw_difference(axes, place, item, measure, is_larger_better=comparison.is_larger_better)
            _write_difference(axes, place, item, measure, page)
            place += 1
    axes.set_yticks([])
    axes.tick_params(labelsize=page.font_pt - 1)
    plain(axes, grid="x")
    axes.spines["left"].set_visible(False)
    unit = f" ({measure.difference_unit})" if measure.difference_unit else ""
    crate, vit = family_names(comparison).values()
    left, right = (vit, crate) if comparison.is_larger_better else (crate, vit)
    axes.set_xlabel(f"← {left} better  ·  {right} better →\n{crate} minus {vit}{unit}", fontsize=page.font_pt)
    legend(figure, _difference_handles(shown), page)
    title(figure, f"Differences in {measure.label}, paired by seed", page)
    return figure


def with_intervals(comparison: Comparison) -> list[Difference]:
    """The differences that have an interval over seeds."""
    return [item for item in comparison.differences if item.interval is not None and has_interval(item.interval)]


def shown_differences(comparison: Comparison) -> dict[str, list[Difference]]:
    """By axis the first of those with an interval, in the order declared, as many of each as there is room for."""
    found = with_intervals(comparison)
    axes = list(dict.fromkeys(item.axis for item in found))
    return {axis: [item for item in found if item.axis == axis][: MOST_DIFFERENCES // len(axes)] for axis in axes}


def _limits(shown: Sequence[Difference], measure: Measure) -> tuple[float, float]:
    """Where the axis ends: intervals of two pairs, with t = 12.7, do not stretch it unless there are no others."""
    firm = [item for item in shown if len(item.seeds) > 2] or shown
    ends = [0.0, *(item.interval.value for item in shown if item.interval)]
    ends += [end for item in firm for estimate in (item.interval, item.test_noise) if estimate for end in estimate]
    finite = [measure.scale * end for end in ends if math.isfinite(end)]
    low, high = min(finite), max(finite)
    room = 0.1 * (high - low) or 1.0
    least = 0.2 * max(high, -low)  # on either side of 0, so that both are seen
    return min(low, -least) - room, max(high, least) + room


def _draw_difference(axes: "Axes", place: float, item: Difference, measure: Measure, *, is_larger_better: bool) -> None:
    assert item.interval is not None
    value, low, high = (measure.scale * number for number in item.interval)
    is_clear = is_distinguished(item)
    better = "crate" if (value > 0) == is_larger_better else "vit"
    colour = FAMILY_COLOURS[better] if is_clear else INK
    left, right = axes.get_xlim()
    axes.plot([max(low, left), min(high, right)], [place, place], color=colour, linewidth=1.8, zorder=2)
    for end, border, marker in ((low, left, "<"), (high, right, ">")):
        if not left <= end <= right:
            axes.plot(border, place, marker, color=colour, markersize=5, clip_on=False, zorder=3)
    face = colour if is_clear else PAPER
    axes.plot(value, place, _FAMILY_MARKERS[better], color=colour, markerfacecolor=face, markersize=7, zorder=4)
    if item.test_noise is not None and has_interval(item.test_noise):
        ends = [min(max(measure.scale * end, left), right) for end in item.test_noise[1:]]
        axes.plot(ends, [place + 0.2] * 2, color=MUTED, linewidth=1.0, linestyle=":", zorder=2)


def _write_difference(axes: "Axes", place: float, item: Difference, measure: Measure, page: Page) -> None:
    """What is compared on the left above the line, how it ended on the right."""
    first, second = item.first.label, item.second.label
    if page.is_narrow:
        first = first.removeprefix(model_name(item.first.model)).strip() or first  # the axis says that it is CRATE's
    pair = f"{short(first, 16 if page.is_narrow else 30)} \N{MINUS SIGN} {short(second, 32)}"
    found = f"p {p_text(item.p_holm)}" if page.is_narrow else _found(item, measure)
    size = page.font_pt - (2 if page.is_narrow else 1.5)
    options: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "fontsize": size, "va": "bottom"}
    options["bbox"] = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.4}
    axes.text(0, place - 0.18, pair, ha="left", **options)
    axes.text(1, place - 0.18, found, ha="right", color=MUTED, **options)


def _found(item: Difference, measure: Measure) -> str:
    return f"{difference_text(measure, item.interval)}, {len(item.seeds)} pairs, Holm p {p_text(item.p_holm)}"


def _difference_handles(shown: Sequence[Difference]) -> list[Any]:
    from matplotlib.lines import Line2D

    filled = Line2D([], [], marker="o", color=INK, linestyle="-", label="filled: told apart (Holm p < 0.05)")
    hollow = Line2D([], [], marker="o", color=INK, markerfacecolor=PAPER, label="hollow: not told apart, or no verdict")
    noise = Line2D([], [], color=MUTED, linestyle=":", label="dotted: 95% over test images")
    return [filled, hollow, *([noise] if any(item.test_noise for item in shown) else [])]


def plot_sensitivity(comparison: Comparison, page: Page) -> "Figure":
    """What was measured along each setting that was varied, a panel a setting and measure.

    Args:
        comparison: With a sensitivity.
        page: Wide or narrow.
    """
    panels = list(dict.fromkeys((item.key, _measure_axis(comparison, item)) for item in comparison.sensitivities))
    figure, grid = _grid(len(panels), page)
    for axes, (key, label) in zip(grid, panels, strict=True):
        shown = [item for item in comparison.sensitivities if (item.key, _measure_axis(comparison, item)) == (key, label)]
        for item in shown:
            _draw_sensitivity(axes, item, sensitivity_measure(comparison, item))
        _scale_setting(axes, sorted({value for item in shown for value in item.values}))
        axes.set_xlabel("\n".join(textwrap.wrap(SETTING_NAMES.get(key, key), 24)), fontsize=page.font_pt)
        axes.set_ylabel("\n".join(textwrap.wrap(label, 30)), fontsize=page.font_pt - 1)
        axes.tick_params(labelsize=page.font_pt - 1)
        plain(axes)
    legend(figure, _sensitivity_handles(comparison.sensitivities), page)
    title(figure, "Sensitivity: one setting, best over the rest", page)
    return figure


def _measure_axis(comparison: Comparison, item: Sensitivity) -> str:
    return sensitivity_measure(comparison, item).axis


def _scale_setting(axes: "Axes", values: Sequence[float]) -> None:
    if values[0] > 0 and values[-1] / values[0] >= _LOG_FROM:
        axes.set_xscale("log")
    if len(values) > _MOST_TICKS:
        return
    at = [float(math.log(value)) if axes.get_xscale() == "log" else value for value in values]
    ticks = [values[0]]
    for value, place in zip(values[1:], at[1:], strict=True):
        if place - at[values.index(ticks[-1])] > _TICK_GAP * (at[-1] - at[0]):
            ticks.append(value)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _sensitivity_handles(shown: Sequence[Sensitivity]) -> list[Any]:
    from matplotlib.lines import Line2D

    models = dict.fromkeys((item.model, item.family) for item in shown)
    styles = [(model_style(model, family), model_name(model) or FAMILY_NAMES.get(family, family)) for model, family in models]
    handles = [Line2D([], [], marker=style.marker, color=style.colour, label=name) for style, name in styles]
    if not all(item.is_confirmed for item in shown):
        handles.append(
            Line2D([], [], marker="o", color=INK, markerfacecolor=PAPER, linestyle="--", label="hollow: exploratory")
        )
    return handles


def _draw_sensitivity(axes: "Axes", item: Sensitivity, measure: Measure) -> None:
    style = model_style(item.model, item.family)
    ys = [measure.scale * estimate.value for estimate in item.metric]
    face = style.colour if item.is_confirmed else PAPER
    form: dict[str, Any] = {"color": style.colour, "marker": style.marker, "markerfacecolor": face, "markersize": 6.0}
    axes.plot(item.values, ys, linestyle="-" if item.is_confirmed else "--", linewidth=1.4, zorder=3, **form)
    for x, estimate in zip(item.values, item.metric, strict=True):
        if has_interval(estimate):
            ends = [measure.scale * estimate.low, measure.scale * estimate.high]
            axes.plot([x, x], ends, color=style.colour, linewidth=1.1, zorder=2)


def plot_layers(comparison: Comparison, page: Page) -> "Figure":
    """White-box measures layer by layer beside initialisation, a panel a measure.

    Args:
        comparison: With a layer curve.
        page: Wide or narrow.
    """
    from matplotlib.lines import Line2D

    measures = list(dict.fromkeys(curve.measure for curve in comparison.layers))
    styles = _layer_styles(comparison)
    figure, panels = _grid(len(measures), page)
    for axes, name in zip(panels, measures, strict=True):
        for curve in comparison.layers:
            if curve.measure == name:
                _draw_layers(axes, curve, *styles[curve.label])
        axes.set_ylabel(MEASURE_NAMES.get(name, name.replace("_", " ")), fontsize=page.font_pt)
        axes.set_xlabel("encoder layer", fontsize=page.font_pt)
        axes.locator_params(axis="x", integer=True)
        axes.tick_params(labelsize=page.font_pt - 1)
        plain(axes)
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=5, label=short(label))
        for label, (colour, marker) in styles.items()
    ]
    if any(curve.initial for curve in comparison.layers):
        handles.append(Line2D([], [], color=INK, linestyle="--", label="dashed: the same at initialisation"))
    legend(figure, handles, page)
    title(figure, "White-box measures by encoder layer", page)
    return figure


def _layer_styles(comparison: Comparison) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each configuration: its model's, with another marker for a further one of it."""
    models = {item.label: item.model for item in comparison.configurations}
    styles: dict[str, tuple[str, str]] = {}
    for curve in comparison.layers:
        if curve.label not in styles:
            style = model_style(models.get(curve.label, ""), curve.family)
            used = {marker for colour, marker in styles.values() if colour == style.colour}
            marker = next((m for m in (style.marker, *_MARKERS) if m not in used), style.marker)
            styles[curve.label] = (style.colour, marker)
    return styles


def _draw_layers(axes: "Axes", curve: LayerCurve, colour: str, marker: str) -> None:
    for values, form in ((curve.trained, "-"), (curve.initial, "--")):
        if values:
            size = 4.5 if form == "-" else 0.0
            axes.plot(range(1, len(values) + 1), values, form, marker=marker, markersize=size, color=colour, linewidth=1.5)


def _grid(count: int, page: Page) -> tuple["Figure", "list[Axes]"]:
    """Panels beside each other, on a phone below each other."""
    columns = 1 if page.is_narrow else min(count, 3) if count != 4 else 2
    lines = -(-count // columns)
    figure = new_figure(page.width, 2.6 * lines + (1.5 if page.is_narrow else 1.1))
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    return figure, list(grid.flat[:count])
