"""Differences with their intervals, sensitivities, and white-box measures layer by layer.

In: a comparison and a page. Out: figures. A difference whose Holm-corrected test rejects equality is filled in the colour of
the better family; all others are hollow, whatever side they lie on.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from crate_ray.analysis.comparison.canvas import INK, MUTED, PAPER, Page, legend, short, title
from crate_ray.analysis.comparison.result import Comparison, Difference, LayerCurve, Sensitivity
from crate_ray.analysis.comparison.wording import (
    AXIS_NAMES,
    FAMILY_NAMES,
    MEASURE_NAMES,
    SETTING_NAMES,
    difference_text,
    has_interval,
    metric_measure,
    p_text,
    sentence,
)
from crate_ray.analysis.drawing import FAMILY_COLOURS, LOG_FROM_RATIO, OTHER_SHADES, SHADES, new_figure, plain
from crate_ray.analysis.objectives import Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_DIFFERENCES = 24
"""In a picture; the table has all."""
SIGNIFICANT = 0.05
_LINE_INCHES = 0.46
_HEADING_LINES = 0.8
_FAMILY_MARKERS = {"crate": "o", "vit": "s"}


def plot_differences(comparison: Comparison, page: Page) -> "Figure":
    """Each difference with its 95% interval over seeds and, thin below it, that over test images; a group an axis.

    Args:
        comparison: With a difference that has an interval.
        page: Wide or narrow.
    """
    measure = metric_measure(comparison)
    shown = with_intervals(comparison)[:MOST_DIFFERENCES]
    groups = {axis: [item for item in shown if item.axis == axis] for axis in dict.fromkeys(item.axis for item in shown)}
    num_lines = len(shown) + _HEADING_LINES * len(groups)
    figure = new_figure(page.width, 1.7 + _LINE_INCHES * num_lines + (0.3 if page.is_narrow else 0))
    axes = figure.subplots()
    limit = _limit(shown, measure)
    axes.set_xlim(-limit, limit)
    axes.set_ylim(num_lines - 0.4, -0.3)
    axes.axvline(0, color=MUTED, linewidth=0.9, zorder=1)
    place = 0.0
    for axis, items in groups.items():
        heading: dict[str, Any] = {"fontsize": page.font_pt - 0.5, "fontweight": "bold", "va": "center"}
        axes.text(0, place, sentence(AXIS_NAMES[axis]), transform=axes.get_yaxis_transform(), **heading)
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
    left, right = ("MAE", "CRATE") if comparison.is_larger_better else ("CRATE", "MAE")
    axes.set_xlabel(f"← {left} better  ·  {right} better →\nCRATE minus MAE{unit}", fontsize=page.font_pt)
    legend(figure, _difference_handles(shown), page)
    title(figure, f"Differences in {measure.label}, paired by seed", page)
    return figure


def with_intervals(comparison: Comparison) -> list[Difference]:
    """The differences that have an interval over seeds."""
    return [item for item in comparison.differences if item.interval is not None and has_interval(item.interval)]


def _limit(shown: Sequence[Difference], measure: Measure) -> float:
    """Where the axis ends: intervals of two pairs, with t = 12.7, do not stretch it unless there are no others."""
    firm = [item for item in shown if len(item.seeds) > 2] or shown
    ends = [abs(end) for item in firm if item.interval for end in item.interval]
    ends += [abs(item.interval.value) for item in shown if item.interval]
    ends += [abs(end) for item in firm if item.test_noise for end in item.test_noise]
    return 1.15 * measure.scale * max(end for end in ends if math.isfinite(end)) or 1.0


def _draw_difference(axes: "Axes", place: float, item: Difference, measure: Measure, *, is_larger_better: bool) -> None:
    assert item.interval is not None
    value, low, high = (measure.scale * number for number in item.interval)
    is_clear = item.why_no_verdict is None and item.p_holm is not None and item.p_holm < SIGNIFICANT
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
    letters = 19 if page.is_narrow else 30
    pair = f"{short(item.first.label, letters)} \N{MINUS SIGN} {short(item.second.label, letters)}"
    found = f"p {p_text(item.p_holm)}" if page.is_narrow else _found(item, measure)
    size = page.font_pt - (2 if page.is_narrow else 1.5)
    options: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "fontsize": size, "va": "bottom"}
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
    """The metric along each setting that was varied, a panel a setting.

    Args:
        comparison: With a sensitivity.
        page: Wide or narrow.
    """
    from matplotlib.lines import Line2D

    measure = metric_measure(comparison)
    keys = list(dict.fromkeys(item.key for item in comparison.sensitivities))
    figure, panels = _grid(len(keys), page)
    for axes, key in zip(panels, keys, strict=True):
        for item in comparison.sensitivities:
            if item.key == key:
                _draw_sensitivity(axes, item, measure)
        axes.set_xlabel(SETTING_NAMES.get(key, key), fontsize=page.font_pt)
        axes.tick_params(labelsize=page.font_pt - 1)
        plain(axes)
    figure.supylabel(measure.axis, fontsize=page.font_pt)
    families = dict.fromkeys(item.family for item in comparison.sensitivities)
    handles = [
        Line2D(
            [],
            [],
            marker=_FAMILY_MARKERS.get(f, "^"),
            color=FAMILY_COLOURS.get(f, OTHER_SHADES[0]),
            label=FAMILY_NAMES.get(f, f),
        )
        for f in families
    ]
    if not all(item.is_confirmed for item in comparison.sensitivities):
        hollow = Line2D([], [], marker="o", color=INK, markerfacecolor=PAPER, linestyle="--", label="hollow: exploratory")
        handles.append(hollow)
    legend(figure, handles, page)
    title(figure, f"{sentence(measure.label)} along one setting, best over the rest", page)
    return figure


def _draw_sensitivity(axes: "Axes", item: Sensitivity, measure: Measure) -> None:
    colour = FAMILY_COLOURS.get(item.family, OTHER_SHADES[0])
    ys = [measure.scale * estimate.value for estimate in item.metric]
    form: dict[str, Any] = {"color": colour, "markerfacecolor": colour if item.is_confirmed else PAPER, "markersize": 6.0}
    line = "-" if item.is_confirmed else "--"
    axes.plot(item.values, ys, line, marker=_FAMILY_MARKERS.get(item.family, "^"), linewidth=1.4, zorder=3, **form)
    for x, estimate in zip(item.values, item.metric, strict=True):
        if has_interval(estimate):
            ends = [measure.scale * estimate.low, measure.scale * estimate.high]
            axes.plot([x, x], ends, color=colour, linewidth=1.1, zorder=2)
    if min(item.values) > 0 and max(item.values) / min(item.values) >= LOG_FROM_RATIO:
        axes.set_xscale("log")
    if len(item.values) <= 8:
        ticks = sorted({*item.values, *(axes.get_xticks() if axes.get_label() == "valued" else ())})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_label("valued")
        axes.minorticks_off()


def plot_layers(comparison: Comparison, page: Page) -> "Figure":
    """White-box measures layer by layer beside initialisation, a panel a measure.

    Args:
        comparison: With a layer curve.
        page: Wide or narrow.
    """
    from matplotlib.lines import Line2D

    measures = list(dict.fromkeys(curve.measure for curve in comparison.layers))
    styles = _layer_styles(comparison.layers)
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


def _layer_styles(layers: Sequence[LayerCurve]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each configuration: its family's, in shades."""
    styles: dict[str, tuple[str, str]] = {}
    used: dict[str, int] = {}
    for curve in layers:
        if curve.label not in styles:
            shades = SHADES.get(curve.family, OTHER_SHADES)
            number = used[curve.family] = used.get(curve.family, -1) + 1
            styles[curve.label] = (shades[number % len(shades)], "osD^vP"[len(styles) % 6])
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
