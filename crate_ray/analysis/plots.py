"""The comparison as one picture: accuracy against parameters and against training compute.

In: comparison rows. Out: a PNG. Parameters and compute are shown side by side because CRATE saves
the first and not the second; one panel alone would tell half of it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crate_ray.analysis.drawing import FAMILY_COLOURS, LOG_FROM_RATIO, new_figure, plain
from crate_ray.analysis.table import ComparisonRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OTHER_COLOUR = "#555555"
# Room that a name takes, as shares of a panel.
_LABEL_WIDTH, _LABEL_HEIGHT = 0.3, 0.055


def plot_comparison(rows: Sequence[ComparisonRow], path_png: str | Path) -> None:
    """Draws probe top-1 over trainable encoder parameters and over training GFLOPs an image.

    Filled: trained, with its 95% interval. Hollow: the same architecture untrained, joined to it.
    Dotted: raw pixels without a model.

    Raises:
        ValueError: No rows.
    """
    if not rows:
        raise ValueError("no rows to plot")
    figure = new_figure(10.5, 4.9)
    panels = figure.subplots(1, 2, sharey=True)
    _draw_panel(panels[0], rows, [row.params_encoder / 1e6 for row in rows], "trainable encoder parameters (millions)")
    _draw_panel(panels[1], rows, [row.training_gflops_per_image for row in rows], "training GFLOPs an image")
    panels[0].set_ylabel("linear probe top-1 (%), 95% interval")
    figure.suptitle(_title(rows), fontsize=12, fontweight="bold")
    figure.legend(handles=_legend(rows), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.savefig(path_png, dpi=150)


def _draw_panel(axes: "Axes", rows: Sequence[ComparisonRow], x: Sequence[float], label: str) -> None:
    for row, at in zip(rows, x, strict=True):
        colour = FAMILY_COLOURS.get(row.family, _OTHER_COLOUR)
        value, low, high = (100 * number for number in row.probe_top1)
        axes.plot([at, at], [100 * row.control_top1, value], color=colour, linewidth=0.8, alpha=0.6, zorder=1)
        axes.plot(at, 100 * row.control_top1, "o", markersize=8, markerfacecolor="white", markeredgecolor=colour, zorder=2)
        axes.errorbar(at, value, [[value - low], [high - value]], fmt="o", markersize=8, capsize=4, color=colour, zorder=3)
    raw = [100 * row.raw_pixels_top1 for row in rows if row.raw_pixels_top1 == row.raw_pixels_top1]
    if raw:
        axes.axhline(raw[0], color="#777777", linestyle=":", linewidth=1.4, zorder=0)
    _set_limits(axes, x)
    _label_points(axes, rows, x)
    axes.set_xlabel(label)
    plain(axes)


def _set_limits(axes: "Axes", x: Sequence[float]) -> None:
    smallest, largest = min(x), max(x)
    if smallest > 0 and largest / smallest > LOG_FROM_RATIO:
        axes.set_xscale("log")
        axes.set_xlim(smallest / 2, largest * 3)
        return
    spread = (largest - smallest) or largest or 1.0
    axes.set_xlim(max(0.0, smallest - 0.3 * spread), largest + 0.6 * spread)


def _label_points(axes: "Axes", rows: Sequence[ComparisonRow], x: Sequence[float]) -> None:
    """Names right of the points, pushed apart vertically where they would touch."""
    bottom, top = axes.get_ylim()
    gap = _LABEL_HEIGHT * (top - bottom)
    to_axes = axes.transScale + axes.transLimits
    placed: list[tuple[float, float]] = []
    for row, at in sorted(zip(rows, x, strict=True), key=lambda item: item[0].probe_top1.value):
        across = float(to_axes.transform((at, bottom))[0])
        below = [height for other, height in placed if abs(other - across) < _LABEL_WIDTH]
        height = max([100 * row.probe_top1.value, *(h + gap for h in below)])
        placed.append((across, height))
        axes.annotate(
            row.name,
            (at, height),
            xytext=(11, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            color=FAMILY_COLOURS.get(row.family, _OTHER_COLOUR),
        )


def _title(rows: Sequence[ComparisonRow]) -> str:
    best = max(rows, key=lambda row: row.probe_top1.value)
    rivals = [row.name for row in rows if row is not best and row.probe_top1.high >= best.probe_top1.low]
    head = f"{best.name}: highest probe top-1, {100 * best.probe_top1.value:.1f}%"
    return f"{head}; interval overlaps {', '.join(rivals)}" if rivals else head


def _legend(rows: Sequence[ComparisonRow]) -> list[object]:
    from matplotlib.lines import Line2D

    families = list(dict.fromkeys(row.family for row in rows))
    dots = [
        Line2D(
            [],
            [],
            marker="o",
            linestyle="",
            markersize=8,
            color=FAMILY_COLOURS.get(family, _OTHER_COLOUR),
            label=family.upper() if family == "crate" else "ViT" if family == "vit" else family,
        )
        for family in families
    ]
    control = Line2D(
        [],
        [],
        marker="o",
        linestyle="",
        markersize=8,
        markerfacecolor="white",
        markeredgecolor="#555555",
        label="same model, untrained",
    )
    pixels = Line2D([], [], color="#777777", linestyle=":", label="raw pixels, no model")
    has_pixels = any(row.raw_pixels_top1 == row.raw_pixels_top1 for row in rows)
    return [*dots, control, *([pixels] if has_pixels else [])]
