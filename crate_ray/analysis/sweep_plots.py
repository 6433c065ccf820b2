"""The pictures of a sweep: the objective against each key, the Pareto front, learning curves, importance.

In: rows and what was made of them. Out: the bytes of PNGs. Colours are those of the comparison, one a family, with another
shade for a further arm of it. Screening trials are small and faint, confirmed means large with their intervals: the eye goes
to what a conclusion may rest on. An axis ends where the trials of interest end; what lies beyond is drawn as a triangle at
the border, never dropped.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from crate_ray.analysis.confirmed import Confirmed
from crate_ray.analysis.drawing import LOG_FROM_RATIO, OTHER_SHADES, SHADES, new_figure, plain, png, set_log
from crate_ray.analysis.importance import Importance
from crate_ray.analysis.objectives import MEASURES, Measure, key_names, value_text
from crate_ray.analysis.pareto import front
from crate_ray.analysis.ranking import free_keys
from crate_ray.config import Domain, SweepConfig
from crate_ray.runs import TrialRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vP"
_DPI = 130
_PANEL_INCHES = (4.4, 3.4)
_PANELS_A_ROW = 3
_MAX_TICKS = 9
_ARM_OFFSET = 0.02  # share of the axis between two arms at the same value, so that neither hides the other
_SHOWN_SHARE = 0.85  # of the finished trials, from the best on, lie inside the axis at least
_FAINT = "#b0b0b0"
_BEYOND = "\ntriangles: beyond the axis"


@dataclass(frozen=True)
class ArmStyle:
    """How an arm is drawn."""

    colour: str
    marker: str


@dataclass(frozen=True)
class Line:
    """One trial's values while it trained: `points` are (step, value), in order."""

    row: TrialRow
    points: Sequence[tuple[int, float]]


def arm_styles(families: Mapping[str, str | None]) -> dict[str, ArmStyle]:
    """A style for each arm, from its family."""
    used: dict[str | None, int] = {}
    styles = {}
    for index, (arm, family) in enumerate(families.items()):
        shades = SHADES.get(family or "", OTHER_SHADES)
        number = used[family] = used.get(family, -1) + 1
        styles[arm] = ArmStyle(shades[number % len(shades)], _MARKERS[index % len(_MARKERS)])
    return styles


def plot_keys(rows: Sequence[TrialRow], sweep: SweepConfig, styles: Mapping[str, ArmStyle], *, title: str) -> bytes | None:
    """The primary objective of every screening trial against each key that varies, with the best trial at each value.

    Returns:
        Bytes of a PNG; None where no key varies or no trial has a value.
    """
    measure = MEASURES[sweep.objective[0]]
    rows = [row for row in _measured(rows, measure) if row.stage == "screen"]
    keys = list(dict.fromkeys(key for arm in styles for key in free_keys(sweep, arm)))
    keys = [key for key in keys if len({repr(row.values[key]) for row in rows if key in row.values}) > 1]
    if not keys:
        return None
    figure, panels = _panels(len(keys), sharey=True)
    finished = [_y(row, measure) for row in rows if row.state == "FINISHED"]
    _limit_y(panels[0], finished, measure, others=[_y(row, measure) for row in rows if row.state == "STOPPED"])
    names = key_names(keys)
    for panel, key in zip(panels, keys, strict=True):
        domain = next(domains[key] for arm in styles if key in (domains := sweep.domains_of(arm)))
        _draw_key(panel, [row for row in rows if key in row.values], key, domain, measure, styles)
        panel.set_xlabel(names[key])
    for panel in panels:
        if (place := panel.get_subplotspec()) is not None and place.is_first_col():
            panel.set_ylabel(measure.axis)
    note = "dots: screening trials, one seed; hollow: stopped, at their last step; line: best finished at each value"
    note += _BEYOND if not panels[0].get_autoscaley_on() else ""
    figure.suptitle(f"{title}: {measure.label} against each key", fontsize=12, fontweight="bold")
    _arm_legend(figure, styles, note)
    return png(figure, dpi=_DPI)


def plot_front(
    rows: Sequence[TrialRow],
    configurations: Sequence[Confirmed],
    sweep: SweepConfig,
    styles: Mapping[str, ArmStyle],
    *,
    title: str,
) -> bytes | None:
    """The primary objective against trainable encoder parameters and against GFLOPs, with the Pareto front.

    The front is of the confirmed means where there are any, else of the screening trials, as the legend says.

    Returns:
        Bytes of a PNG; None where trials with a value do not differ in size or cost.
    """
    measure = MEASURES[sweep.objective[0]]
    finished = [row for row in _measured(rows, measure) if row.state == "FINISHED" and row.stage == "screen"]
    candidates: list[TrialRow | Confirmed] = [*finished, *configurations]
    costs = [
        MEASURES[name]
        for name in ("encoder_params_m", "gflops")
        if name != measure.name and len({item.value_of(name) for item in candidates} - {None}) > 1
    ]
    if not costs:
        return None
    figure, panels = _panels(len(costs), sharey=True)
    ends = [measure.scale * end for item in configurations if item.interval for end in (item.interval.low, item.interval.high)]
    _limit_y(panels[0], [_y(row, measure) for row in finished], measure, shown=ends)
    for panel, cost in zip(panels, costs, strict=True):
        for arm, style in styles.items():
            points = _at_cost([row for row in finished if row.arm == arm], cost, measure)
            _draw_cloud(panel, points, style, is_faint=bool(configurations))
            _draw_means(panel, [item for item in configurations if item.arm == arm], cost, measure, style)
        _draw_front(panel, configurations or finished, cost, measure)
        _scale_x(panel, [x for row in finished if (x := row.value_of(cost.name)) is not None])
        panel.set_xlabel(cost.axis)
    panels[0].set_ylabel(measure.axis)
    figure.suptitle(f"{title}: {measure.label} against size and cost", fontsize=12, fontweight="bold")
    large = "large: mean over the confirm seeds, 95% interval; " if configurations else ""
    of_what = "confirmed means" if configurations else "screening trials, not confirmed"
    note = f"small: screening trials, one seed; {large}rings: Pareto front of {of_what}"
    note += _BEYOND if not panels[0].get_autoscaley_on() else ""
    _arm_legend(figure, styles, note)
    return png(figure, dpi=_DPI)


def plot_learning(lines: Sequence[Line], objective: str, styles: Mapping[str, ArmStyle], *, title: str) -> bytes | None:
    """Learning curves of the screening trials, a panel an arm: stopped ones faint, finished ones coloured, the best one bold.

    Args:
        lines: One a trial.
        objective: What their values are of.
        styles: One an arm.
        title: What the picture is of.

    Returns:
        Bytes of a PNG; None where no trial was evaluated twice.
    """
    measure = MEASURES[objective]
    lines = [line for line in lines if line.points]
    arms = [arm for arm in styles if any(line.row.arm == arm and len(line.points) > 1 for line in lines)]
    if not arms:
        return None
    figure, panels = _panels(len(arms), sharey=True)
    _limit_y(panels[0], [measure.scale * value for line in lines for _, value in line.points], measure)
    for panel, arm in zip(panels, arms, strict=True):
        of_arm = [line for line in lines if line.row.arm == arm]
        _draw_lines(panel, of_arm, measure, styles[arm])
        panel.set_title(f"{arm}: {len(of_arm)} trials", fontsize=10.5)
        panel.set_xlabel("step")
        panel.set_xlim(left=0)
    panels[0].set_ylabel(measure.axis)
    figure.suptitle(f"{title}: {measure.label} while training", fontsize=12, fontweight="bold")
    figure.supxlabel("grey: stopped early, cross where; coloured: went to the end; bold: best at the end", fontsize=9)
    return png(figure, dpi=_DPI)


def plot_importance(found: Sequence[Importance], objective: str, styles: Mapping[str, ArmStyle], *, title: str) -> bytes | None:
    """Share of the objective's variance by key, an arm beside the other; what is left to 100% are interactions.

    Returns:
        Bytes of a PNG; None where no arm has an importance.
    """
    found = [item for item in found if item.shares]
    keys = list(dict.fromkeys(key for item in found for key in item.shares))
    if not keys:
        return None
    keys.sort(key=lambda key: max(item.shares.get(key, 0.0) for item in found))
    height = 0.8 / len(found)
    figure = new_figure(7.0, 1.5 + 0.5 * len(keys) + 0.12 * len(keys) * len(found))
    axes = figure.subplots()
    for index, item in enumerate(found):
        at = [place + 0.4 - (index + 0.5) * height for place in range(len(keys))]
        shares = [100 * item.shares.get(key, 0.0) for key in keys]
        label = f"{item.arm}, {item.num_trials} trials"
        bars = axes.barh(at, shares, height=0.9 * height, color=styles[item.arm].colour, label=label)
        axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
    names = key_names(keys)
    axes.set_yticks(range(len(keys)), [names[key] for key in keys])
    axes.set_xlabel("share of the variance that the key explains alone (%)")
    axes.set_xlim(0, 105)
    plain(axes, grid="x")
    figure.suptitle(f"{title}: importance for {MEASURES[objective].label}", fontsize=12, fontweight="bold")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return png(figure, dpi=_DPI)


def _measured(rows: Sequence[TrialRow], measure: Measure) -> list[TrialRow]:
    """Trials that ended by themselves with a finite value."""
    return [row for row in rows if row.state in ("FINISHED", "STOPPED") and math.isfinite(_y(row, measure))]


def _y(row: TrialRow | Confirmed, measure: Measure) -> float:
    value = row.value_of(measure.name)
    return math.nan if value is None else measure.scale * value


def _draw_key(
    axes: "Axes", rows: Sequence[TrialRow], key: str, domain: Domain, measure: Measure, styles: Mapping[str, ArmStyle]
) -> None:
    values = [row.values[key] for row in rows]
    is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    distinct = sorted(set(values)) if is_number else list({repr(value): value for value in values}.values())
    place = {repr(value): float(value) if is_number else float(index) for index, value in enumerate(distinct)}
    is_log = domain.loguniform is not None or (domain.uniform is None and is_number and _is_geometric(distinct))
    for index, (arm, style) in enumerate(styles.items()):
        shift = _ARM_OFFSET * (index - (len(styles) - 1) / 2)
        at = {name: _shifted(x, list(place.values()), shift, is_log=is_log) for name, x in place.items()}
        of_arm = [(at[repr(row.values[key])], row) for row in rows if row.arm == arm]
        _draw_trials(axes, of_arm, measure, style)
        _mark_beyond(axes, [(x, _y(row, measure)) for x, row in of_arm], style.colour)
        if len(distinct) <= _MAX_TICKS:
            finished = [(x, row) for x, row in of_arm if row.state == "FINISHED"]
            _draw_best(axes, finished, measure, style, is_ordered=is_number)
    if is_log:
        set_log(axes)
    if len(distinct) <= _MAX_TICKS:
        axes.set_xticks(list(place.values()), [value_text(value) for value in distinct])
        axes.minorticks_off()
    plain(axes)


def _is_geometric(distinct: Sequence[float]) -> bool:
    """Whether a logarithmic axis shows the values better: they span much, or each step is larger than the one before."""
    if distinct[0] <= 0:
        return False
    gaps = [after - before for before, after in pairwise(distinct)]
    is_growing = len(distinct) <= _MAX_TICKS and len(gaps) > 1 and max(gaps) >= 2 * min(gaps) and gaps == sorted(gaps)
    return is_growing or distinct[-1] / distinct[0] >= LOG_FROM_RATIO


def _shifted(x: float, places: Sequence[float], share: float, *, is_log: bool) -> float:
    low, high = min(places), max(places)
    return x * (high / low) ** share if is_log else x + share * (high - low)


def _draw_trials(axes: "Axes", at: Sequence[tuple[float, TrialRow]], measure: Measure, style: ArmStyle) -> None:
    for state, face in (("STOPPED", "none"), ("FINISHED", style.colour)):
        points = [(x, _y(row, measure)) for x, row in at if row.state == state]
        if points:
            xs, ys = zip(*points, strict=True)
            axes.scatter(xs, ys, s=20, marker=style.marker, facecolor=face, edgecolor=style.colour, alpha=0.55, linewidth=0.9)


def _draw_best(
    axes: "Axes", at: Sequence[tuple[float, TrialRow]], measure: Measure, style: ArmStyle, *, is_ordered: bool
) -> None:
    """A line through the best value at each place; a dash at each where they have no order."""
    best = max if measure.is_larger_better else min
    by_x: dict[float, list[float]] = {}
    for x, row in at:
        by_x.setdefault(x, []).append(_y(row, measure))
    xs = sorted(by_x)
    form = "-" if is_ordered else "_"
    axes.plot(xs, [best(by_x[x]) for x in xs], form, color=style.colour, linewidth=1.6, markersize=18, markeredgewidth=1.6)


def _at_cost(rows: Sequence[TrialRow], cost: Measure, measure: Measure) -> list[tuple[float, float]]:
    return [(x, _y(row, measure)) for row in rows if (x := row.value_of(cost.name)) is not None]


def _draw_cloud(axes: "Axes", points: Sequence[tuple[float, float]], style: ArmStyle, *, is_faint: bool) -> None:
    if points:
        xs, ys = zip(*points, strict=True)
        size, alpha = (16, 0.3) if is_faint else (30, 0.7)
        axes.scatter(xs, ys, s=size, marker=style.marker, color=style.colour, alpha=alpha, linewidth=0)
        _mark_beyond(axes, points, style.colour)


def _draw_means(axes: "Axes", items: Sequence[Confirmed], cost: Measure, measure: Measure, style: ArmStyle) -> None:
    for item in items:
        x, y = item.value_of(cost.name), _y(item, measure)
        if x is None or not math.isfinite(y):
            continue
        half = measure.scale * (item.interval.high - item.interval.mean) if item.interval else 0.0
        options: dict[str, Any] = {"markeredgecolor": "white", "capsize": 4, "zorder": 4}
        axes.errorbar(x, y, half, fmt=style.marker, markersize=9, color=style.colour, **options)


def _draw_front(axes: "Axes", candidates: Sequence[TrialRow] | Sequence[Confirmed], cost: Measure, measure: Measure) -> None:
    on_front: list[TrialRow | Confirmed] = front(candidates, [cost.name, measure.name])
    points = sorted((item.value_of(cost.name) or 0.0, _y(item, measure)) for item in on_front)
    if points:
        xs, ys = zip(*points, strict=True)
        axes.step(xs, ys, where="post", color="#333333", linewidth=1.1, linestyle="--", zorder=1)
        axes.plot(xs, ys, "o", markersize=14, markerfacecolor="none", markeredgecolor="#333333", markeredgewidth=1.1, zorder=5)


def _draw_lines(axes: "Axes", lines: Sequence[Line], measure: Measure, style: ArmStyle) -> None:
    finished = [line for line in lines if line.row.state == "FINISHED"]
    sign = -1 if measure.is_larger_better else 1
    best = min(finished, key=lambda line: sign * line.points[-1][1], default=None)
    for line in lines:
        steps, values = zip(*line.points, strict=True)
        scaled = [measure.scale * value for value in values]
        if line.row.state != "FINISHED":
            axes.plot(steps, scaled, color=_FAINT, linewidth=0.7, zorder=1)
            axes.plot(steps[-1], scaled[-1], "x", color="#808080", markersize=4, zorder=2)
        elif line is best:
            axes.plot(steps, scaled, color=style.colour, linewidth=2.4, zorder=4)
        else:
            axes.plot(steps, scaled, color=style.colour, linewidth=0.7, alpha=0.4, zorder=3)
    plain(axes)


def _limit_y(
    axes: "Axes", values: Sequence[float], measure: Measure, *, others: Sequence[float] = (), shown: Sequence[float] = ()
) -> None:
    """Ends the axis where most of the values end, so that one that diverged does not press the others flat.

    Before anything is drawn; what lies beyond is marked by `_mark_beyond`. `others` may lie outside altogether, `shown` must
    lie inside.
    """
    ordered = sorted((v for v in values if math.isfinite(v)), reverse=measure.is_larger_better)
    if len(ordered) < 4:
        return
    best, limit = ordered[0], ordered[math.ceil(_SHOWN_SHARE * len(ordered)) - 1]
    worst = (min if measure.is_larger_better else max)([*ordered, *others])
    if abs(worst - best) > 3 * abs(limit - best) > 0:
        span = limit - best
        ends = (best - 0.12 * span, limit + 0.25 * span)
        room = 0.05 * abs(span)
        axes.set_ylim(min(*ends, *(v - room for v in shown)), max(*ends, *(v + room for v in shown)))


def _mark_beyond(axes: "Axes", points: Sequence[tuple[float, float]], colour: str) -> None:
    """A triangle at the border for each point above or below an axis that `_limit_y` ended."""
    if axes.get_autoscaley_on():
        return
    low, high = axes.get_ylim()
    for x, y in points:
        if not low <= y <= high:
            border, marker = (high, "^") if y > high else (low, "v")
            axes.plot(x, border, marker, color=colour, markersize=5, alpha=0.7, clip_on=False, zorder=5)


def _scale_x(axes: "Axes", values: Sequence[float]) -> None:
    if values and min(values) > 0 and max(values) / min(values) >= LOG_FROM_RATIO:
        set_log(axes)
    else:
        axes.locator_params(axis="x", nbins=5)
    plain(axes)


def _arm_legend(figure: "Figure", styles: Mapping[str, ArmStyle], note: str) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=style.colour, marker=style.marker, linestyle="", markersize=7, label=arm)
        for arm, style in styles.items()
    ]
    options: dict[str, Any] = {"frameon": False, "fontsize": 9, "title": note, "title_fontsize": 8.5}
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=6, **options)
    legend.get_title().set_multialignment("center")


def _panels(count: int, *, sharey: bool = False) -> tuple["Figure", list["Axes"]]:
    """Panels in rows; the places that the last row leaves stay empty."""
    num_columns = 2 if count == 4 else min(count, _PANELS_A_ROW)
    num_rows = -(-count // num_columns)
    figure = new_figure(max(7.0, _PANEL_INCHES[0] * num_columns), _PANEL_INCHES[1] * num_rows + 0.9)
    grid = figure.subplots(num_rows, num_columns, squeeze=False, sharey=sharey)
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    return figure, list(grid.flat[:count])
