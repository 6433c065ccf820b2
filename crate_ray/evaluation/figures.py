"""Numbers and grids of tiles as labelled figures.

In: tiles, or values by layer. Out: the bytes of a PNG. Drawn by matplotlib, imported inside: a bare machine has none and
draws the plain grids of `evaluation.pictures`. Trained is a filled marker on a solid line, untrained a hollow one on a
dashed line, as in the comparison's figures; colours are Okabe and Ito's, apart for every common form of colour blindness.
"""

import importlib.util
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crate_ray.config import ConfigError
from crate_ray.evaluation.intervals import Interval
from crate_ray.evaluation.pictures import GAP, default_tile, tile_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION = "#0072B2", "#D55E00"

_DPI = 100
_LEFT_PX, _TITLE_PX, _LINE_PX, _SIDE_PX = 96, 34, 18, 8
_TITLE_CHARACTER_PX, _NOTE_CHARACTER_PX = 9.5, 6.5  # on average, so that no text is cut
_PANEL_INCHES = (4.6, 3.5)
_PANELS_A_ROW = 3
_LEVEL_STYLES = (("#222222", ":"), ("#777777", "-."), ("#aaaaaa", "-"))


@dataclass(frozen=True)
class Curve:
    """A quantity by layer: numbers, or intervals that are drawn as a band; None where a layer has none."""

    label: str
    values: Sequence[float | Interval | None]
    colour: str
    is_trained: bool = True


@dataclass(frozen=True)
class Panel:
    """Curves that share their axes, and horizontal lines by name: bounds, or what needs no model."""

    title: str
    unit: str
    curves: Sequence[Curve]
    levels: Mapping[str, float] = field(default_factory=dict)


def label_grid(
    columns: Mapping[str, Tensor], rows: Sequence[str], *, title: str, note: Sequence[str] = (), tile_side: int | None = None
) -> bytes:
    """A grid of tiles, one image pixel on one pixel, with names above its columns and left of its rows.

    Args:
        columns: Name and uint8 tiles (B, 3, S, S) of each column.
        rows: Name of each of the B rows.
        title: One line above.
        note: Lines below.
        tile_side: See `tile_grid`.

    Returns:
        Bytes of a PNG.
    """
    tiles = list(columns.values())
    grid = tile_grid(tiles, tile_side=tile_side)
    height, width = grid.shape[:2]
    tile = tile_side or default_tile(tiles[0].shape[-1])
    longest = max([_TITLE_CHARACTER_PX * len(title), *(_NOTE_CHARACTER_PX * len(line) for line in note)])
    canvas_width = _SIDE_PX + max(_LEFT_PX + width, _SIDE_PX + round(longest))
    top = _TITLE_PX + _LINE_PX * max(1 + name.count("\n") for name in columns)
    canvas_height = top + height + _LINE_PX * len(note) + _SIDE_PX
    figure = _new_figure(canvas_width / _DPI, canvas_height / _DPI)
    bottom = canvas_height - top - height
    axes = figure.add_axes((_LEFT_PX / canvas_width, bottom / canvas_height, width / canvas_width, height / canvas_height))
    axes.imshow(grid, interpolation="none", aspect="auto")
    axes.set_axis_off()
    middle = GAP + tile / 2
    for index, name in enumerate(columns):
        axes.text(middle + index * (tile + GAP), -4, name, ha="center", va="bottom", fontsize=8.5)
    for index, name in enumerate(rows):
        axes.text(-6, middle + index * (tile + GAP), name, ha="right", va="center", fontsize=8.5)
    figure.text(_SIDE_PX / canvas_width, 1 - 6 / canvas_height, title, ha="left", va="top", fontsize=11, fontweight="bold")
    for index, line in enumerate(note):
        y = (bottom - 2 - index * _LINE_PX) / canvas_height
        figure.text(_SIDE_PX / canvas_width, y, line, ha="left", va="top", fontsize=8.5, color="#333333")
    return _png(figure)


def plot_layers(panels: Sequence[Panel], *, title: str, note: str = "") -> bytes:
    """Panels of curves over the encoder's layers, numbered from 1.

    Returns:
        Bytes of a PNG.

    Raises:
        ValueError: No panels.
    """
    if not panels:
        raise ValueError("no panels to plot")
    num_columns = min(len(panels), _PANELS_A_ROW)
    num_rows = -(-len(panels) // num_columns)
    figure = _new_figure(_PANEL_INCHES[0] * num_columns, _PANEL_INCHES[1] * num_rows + 0.9, layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw_panel(axes, panel)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=12, fontweight="bold")
    if note:
        figure.supxlabel(note, fontsize=9, color="#333333")
    return _png(figure)


def colour_maps(weights_BN: Tensor, side: int) -> Tensor:
    """Maps over a square grid of patches as uint8 images (B, 3, side, side), each by itself from its least to its largest.

    Enlarged by the nearest patch, so that nothing finer than a patch appears; matplotlib's viridis, which is even in
    lightness: it reads in grey, and for every common form of colour blindness.
    """
    from matplotlib import colormaps

    viridis = torch.from_numpy(colormaps["viridis"](range(256))[:, :3])
    low_B1, high_B1 = weights_BN.amin(dim=1, keepdim=True), weights_BN.amax(dim=1, keepdim=True)
    scaled_BN = (weights_BN - low_B1) / (high_B1 - low_B1).clamp(min=1e-12)
    colours_BN3 = viridis[(scaled_BN * (len(viridis) - 1)).round().long()]
    return enlarge_patches(colours_BN3, side)


def enlarge_patches(colours_BN3: Tensor, side: int) -> Tensor:
    """One colour in [0, 1] a patch as uint8 images (B, 3, side, side); side is a multiple of the grid's."""
    grid = round(colours_BN3.shape[1] ** 0.5)
    small = (colours_BN3 * 255).round().to(torch.uint8).reshape(-1, grid, grid, 3).permute(0, 3, 1, 2)
    return small.repeat_interleave(side // grid, dim=2).repeat_interleave(side // grid, dim=3)


def _draw_panel(axes: "Axes", panel: Panel) -> None:
    for curve in panel.curves:
        defined = [(layer, value) for layer, value in enumerate(curve.values, start=1) if value is not None]
        layers = [layer for layer, _ in defined]
        bands = [value for _, value in defined if isinstance(value, Interval)]
        middle = [value.value if isinstance(value, Interval) else value for _, value in defined]
        # Untrained is a ring around the trained dot where the two agree.
        name, style, size, face, order = (
            ("trained", "-", 4.5, curve.colour, 3) if curve.is_trained else ("untrained", "--", 8, "white", 2)
        )
        axes.plot(
            layers,
            middle,
            style,
            marker="o",
            markersize=size,
            color=curve.colour,
            markerfacecolor=face,
            zorder=order,
            label=", ".join(filter(None, [curve.label, name])),
        )
        if bands:
            low, high = [value.low for value in bands], [value.high for value in bands]
            axes.fill_between(layers, low, high, color=curve.colour, alpha=0.15, linewidth=0)
    for index, (name, level) in enumerate(panel.levels.items()):
        colour, style = _LEVEL_STYLES[index % len(_LEVEL_STYLES)]
        axes.axhline(level, color=colour, linestyle=style, linewidth=1.5, label=name, zorder=1)
    axes.set_title(panel.title, fontsize=10.5)
    axes.set_ylabel(panel.unit)
    axes.set_xlabel("encoder layer")
    axes.locator_params(axis="x", integer=True)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(0, 1.05 * axes.dataLim.y1)  # from 0: a small difference looks small
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def _new_figure(width: float, height: float, **options: Any) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, **options)
    FigureCanvasAgg(figure)
    return figure


def require_matplotlib() -> None:
    """Refuses at once what would fail after minutes of work.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("pictures with labels need matplotlib, which is not installed; pip install matplotlib")


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()
