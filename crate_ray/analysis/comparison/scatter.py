"""The metric against what it costs: encoder parameters, all parameters, training compute, time.

In: a comparison and a page. Out: a figure. The models stand in a panel of their own scale; their untrained controls and raw
pixels stand below in a strip where they lie far off, so that what is compared is not pressed flat. Confirmed means are large,
others small and faint. Interval ends of fewer than three seeds do not stretch the axis: with two, t is 12.7.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from crate_ray.analysis.comparison.canvas import INK, MUTED, PAPER, Page, Style, legend, model_style, short, title
from crate_ray.analysis.comparison.configurations import model_names
from crate_ray.analysis.comparison.labels import Named, place_labels
from crate_ray.analysis.comparison.result import Axis, Comparison, Configuration, Curve
from crate_ray.analysis.comparison.wording import (
    AXIS_UNITS,
    BASELINES,
    MODEL_NAMES,
    has_interval,
    is_against_mae,
    metric_measure,
    model_name,
    sentence,
    source_interval,
)
from crate_ray.analysis.drawing import new_figure, plain
from crate_ray.analysis.objectives import Measure

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALL_IN_DETAIL = 200
"""Configurations; of more, intervals and seeds are drawn of the leading ones alone."""
MOST_LEADING = 60
"""Configurations that are named, the best of each family and of the fronts, where there are many."""
_ALL_NAMED = 14  # configurations; of more, the leading ones
_STRIP_FROM = 0.6  # of the models' own range: references further off stand in a strip
_SAME_PLACE = 0.018  # share of the axis
_BAR: Mapping[str, Any] = {"marker": "|", "markersize": 12, "markeredgewidth": 1.3}
_MANTISSAS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0), tuple(n / 10 for n in range(10, 100)))


@dataclass(frozen=True)
class Cost:
    """What stands on the horizontal axis.

    Attributes:
        name: Of the picture.
        axis: Of curves and verdicts; None for what has none.
        label: Of the axis.
        noun: In sentences.
        scale: From the comparison's unit to the label's.
        of: The cost of a configuration; None where it was not measured.
    """

    name: str
    axis: Axis | None
    label: str
    noun: str
    scale: float
    of: Callable[[Configuration], float | None]


COSTS = (
    Cost("encoder_params", "params", "trainable encoder parameters (millions)", AXIS_UNITS["params"], 1e-6,
         lambda item: item.positions.get("params")),
    Cost("total_params", None, "all trainable parameters (millions)", "all trainable parameters", 1e-6,
         lambda item: item.params_total),
    Cost("train_pflops", "flops", "training compute (PFLOPs)", AXIS_UNITS["flops"], 1.0,
         lambda item: item.positions.get("flops")),
    Cost("hours", "time", "training time (hours, exclusive)", AXIS_UNITS["time"], 1.0,
         lambda item: item.positions.get("time")),
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A configuration in the picture's units.

    Attributes:
        item: The configuration.
        x: Its cost.
        y: Mean metric.
        ends: Of the interval; None without one.
        is_over_images: Whether the interval is one seed's over test images.
        seeds: Metric of each seed.
        control: Metric untrained.
    """

    item: Configuration
    x: float
    y: float
    ends: tuple[float, float] | None
    is_over_images: bool
    seeds: tuple[float, ...]
    control: float | None

    @property
    def style(self) -> Style:
        """Of its model."""
        return model_style(self.item.model, self.item.family)


def points_of(comparison: Comparison, cost: Cost) -> list[Point]:
    """The configurations that have a cost above 0."""
    measure = metric_measure(comparison)
    return [
        _point(item, cost.scale * x, comparison.metric, measure)
        for item in comparison.configurations
        if (x := cost.of(item)) is not None and x > 0
    ]


def _point(item: Configuration, x: float, metric: str, measure: Measure) -> Point:
    over_images = source_interval(item, metric)
    estimate = over_images or item.metric
    ends = (measure.scale * estimate.low, measure.scale * estimate.high) if has_interval(estimate) else None
    return Point(
        item=item,
        x=x,
        y=measure.scale * item.metric.value,
        ends=ends,
        is_over_images=over_images is not None,
        seeds=tuple(measure.scale * row.values[metric] for row in item.rows),
        control=None if item.control is None else measure.scale * item.control,
    )


def plot_cost(comparison: Comparison, cost: Cost, page: Page) -> "Figure":
    """The metric against a cost, with fronts, fits and references.

    Args:
        comparison: With at least one configuration that has this cost.
        cost: On the horizontal axis, which is logarithmic.
        page: Wide or narrow.
    """
    measure = metric_measure(comparison)
    points = points_of(comparison, cost)
    curves = [_scaled(curve, cost, measure) for curve in comparison.curves if curve.axis == cost.axis]
    leading = _leading(points, curves, is_larger_better=comparison.is_larger_better)
    if len(points) > ALL_IN_DETAIL:
        points = [point if point.item.label in leading else replace(point, ends=None, seeds=()) for point in points]
    pixels = None if comparison.raw_pixels is None else measure.scale * comparison.raw_pixels
    figure, main, strip = _panels(points, pixels, page)
    x_ends = _limit_x(main, [point.x for point in points])
    placed = _apart(points, x_ends)
    main.set_ylim(_trained_range(points, [*_controls(points), pixels] if strip is None else []))
    for curve in curves:
        _draw_curve(main, curve)
    _draw_points(main, placed, page)
    _draw_references(strip or main, placed, pixels)
    bottom = strip or main
    bottom.set_xlabel(cost.label, fontsize=page.font_pt)
    main.set_ylabel(measure.axis, fontsize=page.font_pt)
    baselines = tuple(BASELINES) if is_against_mae(comparison) else ()
    legend(figure, _handles(points, curves, pixels, baselines), page)
    title(figure, f"{sentence(measure.label)} against {cost.noun}", page)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    _name_points(main, placed, curves, leading, page)
    return figure


def _panels(points: Sequence[Point], pixels: float | None, page: Page) -> tuple["Figure", "Axes", "Axes | None"]:
    """The panel of the models, and the strip of the references where they lie far off."""
    references = [value for value in [*_controls(points), pixels] if value is not None]
    low, high = _trained_range(points, [])
    is_far = any(value < low - _STRIP_FROM * (high - low) or value > high + _STRIP_FROM * (high - low) for value in references)
    figure = new_figure(page.width, 5.3 if is_far else 4.7)
    if not is_far:
        main, strip = figure.subplots(), None
    else:
        main, strip = figure.subplots(2, sharex=True, height_ratios=(4, 1))
        strip.set_ylabel("untrained", fontsize=page.font_pt - 1)
        main.tick_params(axis="x", which="both", labelbottom=False)
    for axes in (main, strip):
        if axes is not None:
            axes.tick_params(labelsize=page.font_pt - 1)
            plain(axes)
    return figure, main, strip


def _controls(points: Sequence[Point]) -> list[float]:
    return [point.control for point in points if point.control is not None and math.isfinite(point.control)]


def _trained_range(points: Sequence[Point], others: Sequence[float | None]) -> tuple[float, float]:
    shown = [value for value in others if value is not None]
    for point in points:
        shown += [point.y, *point.seeds]
        if point.ends is not None and (point.is_over_images or len(point.seeds) > 2):
            shown += point.ends
    finite = [value for value in shown if math.isfinite(value)]
    low, high = min(finite), max(finite)
    room = 0.08 * (high - low) or 0.02 * abs(high) or 1.0
    return low - room, high + 1.5 * room


def _limit_x(axes: "Axes", values: Sequence[float]) -> tuple[float, float]:
    """A logarithmic axis from the smallest to the largest value and a little further, with ticks as people write them."""
    low, high = min(values), max(values)
    room = max((high / low) ** 0.12, 1.15)
    ends = (low / room, high * room**1.5)
    axes.set_xscale("log")
    axes.set_xlim(*ends)
    ticks = log_ticks(*ends)
    axes.set_xticks(ticks, [f"{tick:,.10g}" for tick in ticks])
    axes.minorticks_off()
    return ends


def log_ticks(low: float, high: float) -> list[float]:
    """At most seven round numbers between two positive ends, and at least three where there are."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in _MANTISSAS:
        ticks = [round(m * 10.0**d, 10 - d) for d in decades for m in mantissas if low <= m * 10.0**d <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: math.ceil(len(ticks) / 7)] if ticks else [low]


def _leading(points: Sequence[Point], curves: Sequence["_Line"], *, is_larger_better: bool) -> list[str]:
    """Labels of the best of each family, then of those on a front, the best first."""
    on_front = {label for line in curves for label in line.curve.front}
    ordered = sorted(points, key=lambda point: -point.y if is_larger_better else point.y)
    best = {point.item.family: point.item.label for point in reversed(ordered)}
    front = [point.item.label for point in ordered if point.item.label in on_front]
    return list(dict.fromkeys([*best.values(), *front]))[:MOST_LEADING]


def _apart(points: Sequence[Point], ends: tuple[float, float]) -> list[Point]:
    """The points, those of different models at the same place beside each other."""
    width = _SAME_PLACE * math.log(ends[1] / ends[0])
    places: dict[str, list[float]] = {}
    for point in sorted(points, key=lambda point: point.x):
        places.setdefault(point.item.model, []).append(math.log(point.x))
    models = list(dict.fromkeys(point.item.model for point in points))

    def placed(point: Point) -> Point:
        low, high = math.log(point.x) - width, math.log(point.x) + width
        order = [model for model in models if bisect_right(places[model], low) < bisect_left(places[model], high)]
        steps = order.index(point.item.model) - (len(order) - 1) / 2
        return replace(point, x=point.x * math.exp(width * steps))

    return [placed(point) for point in points]


@dataclass(frozen=True)
class _Line:
    curve: Curve
    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]


def _scaled(curve: Curve, cost: Cost, measure: Measure) -> _Line:
    def up(values: Sequence[float]) -> list[float]:
        return [measure.scale * value for value in values]

    return _Line(curve, [cost.scale * value for value in curve.x], up(curve.y), up(curve.low), up(curve.high))


def _draw_curve(axes: "Axes", line: _Line) -> None:
    colour = model_style(line.curve.model or "", line.curve.family).colour
    is_law = line.curve.kind == "power_law"
    axes.plot(line.x, line.y, color=colour, linewidth=1.3, linestyle="-" if is_law else "--", zorder=2)
    if line.low and line.high:
        bottom, top = axes.get_ylim()
        low, high = ([min(max(value, bottom), top) for value in values] for values in (line.low, line.high))
        axes.fill_between(line.x, low, high, color=colour, alpha=0.13, linewidth=0, zorder=1)


def _draw_points(axes: "Axes", points: Sequence[Point], page: Page) -> None:
    """Means with their intervals and seeds; those that are drawn alike at once."""
    alike: dict[tuple[Style, bool, bool], list[Point]] = {}
    for point in points:
        alike.setdefault((point.style, point.item.is_confirmed, point.is_over_images), []).append(point)
    for (style, is_large, is_over_images), group in alike.items():
        size = (8.5 if is_large else 5.5) - (1 if page.is_narrow else 0)
        form: dict[str, Any] = {"color": style.colour, "alpha": 1.0 if is_large else 0.6}
        _draw_intervals(axes, [p for p in group if p.ends is not None], form, is_over_images=is_over_images)
        seeds = [(p.x, value) for p in group if len(p.seeds) > 1 for value in p.seeds]
        if seeds:
            axes.plot(*zip(*seeds, strict=True), ".", color=style.colour, markersize=3.2, alpha=0.5, zorder=3)
        edge: dict[str, Any] = {"markeredgecolor": PAPER, "markeredgewidth": 0.8, "linestyle": "", "zorder": 4}
        axes.plot([p.x for p in group], [p.y for p in group], marker=style.marker, markersize=size, **form, **edge)


def _draw_intervals(axes: "Axes", points: Sequence[Point], form: Mapping[str, Any], *, is_over_images: bool) -> None:
    ends = [(max(0.0, p.y - p.ends[0]), max(0.0, p.ends[1] - p.y)) for p in points if p.ends is not None]
    if not ends:
        return
    bars = axes.errorbar(
        [p.x for p in points], [p.y for p in points], list(zip(*ends, strict=True)),
        fmt="none", capsize=0 if is_over_images else 3.5, elinewidth=1.3, zorder=3, **form,
    )  # fmt: skip
    if is_over_images:
        bars[2][0].set_linestyle(":")


def _draw_references(axes: "Axes", points: Sequence[Point], pixels: float | None) -> None:
    for style in dict.fromkeys(point.style for point in points):
        at = [(point.x, point.control) for point in points if point.style == style and point.control is not None]
        if at:
            hollow: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": style.colour, "markersize": 5.5}
            axes.plot(*zip(*at, strict=True), linestyle="", marker=style.marker, zorder=2, **hollow)
    if pixels is not None:
        axes.axhline(pixels, color=MUTED, linestyle=":", linewidth=1.2, zorder=1)
    axes.margins(y=0.25)


def _handles(
    points: Sequence[Point], curves: Sequence[_Line], pixels: float | None, baselines: Sequence[str]
) -> list["Artist"]:
    """Models first, the baselines by name; one that is not there is said to be absent."""
    from matplotlib.lines import Line2D

    models = {point.item.model: point.style for point in points}
    order = [*(model for model in MODEL_NAMES if model in models), *(model for model in models if model not in MODEL_NAMES)]
    handles: list[Artist] = [
        Line2D([], [], marker=models[m].marker, color=models[m].colour, linestyle="", markersize=7, label=model_name(m))
        for m in order
    ]
    handles += [
        Line2D([], [], linestyle="", label=f"{model_name(model)}: not in this comparison")
        for model in baselines
        if model not in models
    ]
    if any(point.ends and not point.is_over_images for point in points):
        handles.append(Line2D([], [], color=INK, **_BAR, linestyle="", label="95% interval over seeds; dots: seeds"))
    if any(point.ends and point.is_over_images for point in points):
        handles.append(Line2D([], [], color=INK, linestyle=":", label="one seed: 95% interval over test images"))
    if any(not point.item.is_confirmed for point in points):
        handles.append(
            Line2D([], [], color=MUTED, marker="o", linestyle="", markersize=4, alpha=0.6, label="small: not confirmed")
        )
    kinds = {line.curve.kind: bool(line.low) for line in curves}
    if "power_law" in kinds:
        handles.append(Line2D([], [], color=INK, label="power law, 95% band" if kinds["power_law"] else "power law"))
    if "log_linear" in kinds:
        handles.append(Line2D([], [], color=INK, linestyle="--", label="front, joined"))
    if any(point.control is not None for point in points):
        hollow = Line2D([], [], marker="o", linestyle="", markersize=6, markerfacecolor="none", markeredgecolor=INK)
        hollow.set_label("hollow: same encoder, untrained")
        handles.append(hollow)
    if pixels is not None:
        handles.append(Line2D([], [], color=MUTED, linestyle=":", label="raw pixels, no model"))
    return handles


def _name_points(axes: "Axes", points: Sequence[Point], curves: Sequence[_Line], leading: Sequence[str], page: Page) -> None:
    are_few = len(points) <= _ALL_NAMED
    families = {point.item.family for point in points}
    names = model_names(p.item.model for p in points)
    rank = {label: place for place, label in enumerate(leading)}
    named = [
        Named(_short_name(p.item, names), p.x, p.y, INK, must=are_few or rank[p.item.label] < len(families))
        for p in sorted(points, key=lambda p: (rank.get(p.item.label, len(rank)), -p.y))
        if are_few or p.item.label in rank
    ]
    bars = [[(p.x, p.ends[0]), (p.x, p.ends[1])] for p in points if p.ends is not None]
    paths = [list(zip(line.x, line.y, strict=True)) for line in curves]
    place_labels(axes, named, markers=[(p.x, p.y) for p in points], lines=[*bars, *paths], font_pt=page.font_pt - 1.5)


def _short_name(item: Configuration, names: Mapping[str, str]) -> str:
    """The label without the model's name, which the marker tells."""
    return short(item.label.removeprefix(names[item.model]).strip() or item.label)
