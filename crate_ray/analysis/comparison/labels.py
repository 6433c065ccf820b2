"""Names beside points, none upon another.

In: axes that are drawn and laid out, and points with their names. Out: annotations. Each name, the important first, takes the
best of a few places around its point: upon no other name or marker, then upon as little of bars and curves as can be. One that
must stand may lie further off, with a line to its point; another that finds no free place is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from crate_ray.analysis.comparison.canvas import PAPER

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Box = tuple[float, float, float, float]  # left, bottom, right, top in pixels
_MARKER = 5.0
_GAP = 8.0
_DISTANCES = (1.0, 1.9, 3.0, 4.5)
# Across and up: where the name's middle lies from its point, in halves of its own size.
_DIRECTIONS = ((1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1))
_UPON_NAME, _UPON_MARKER, _UPON_LINE = 1e5, 300.0, 4.0


@dataclass(frozen=True)
class Named:
    """A point with its name.

    Attributes:
        text: The name.
        x: In data units.
        y: In data units.
        colour: Of the name.
        must: Whether it stands even where no place is free.
    """

    text: str
    x: float
    y: float
    colour: str
    must: bool


def place_labels(
    axes: "Axes",
    named: Sequence[Named],
    *,
    markers: Sequence[tuple[float, float]],
    lines: Sequence[Sequence[tuple[float, float]]] = (),
    font_pt: float,
) -> list[str]:
    """Writes names beside their points.

    Args:
        axes: Laid out, its limits final.
        named: By importance, the first first.
        markers: All points drawn, in data units.
        lines: Bars and curves to keep clear of, each a few points in data units.
        font_pt: Of the names.

    Returns:
        The names that found no place.
    """
    pixel = axes.figure.dpi / 72  # type: ignore[union-attr]
    inside: Box = tuple(axes.get_window_extent().extents)  # type: ignore[assignment]
    points = axes.transData.transform(np.asarray(markers, dtype=float).reshape(-1, 2))
    taken_by_markers = np.array([_around(x, y, _MARKER * pixel) for x, y in points]).reshape(-1, 4)
    dots = np.concatenate([_dots(axes, line) for line in lines]) if lines else np.empty((0, 2))
    names: list[Box] = []
    lost = []
    for item in named:
        x, y = axes.transData.transform((item.x, item.y))
        width, height = _text_size(axes, item.text, font_pt)
        distances = _DISTANCES if item.must else _DISTANCES[:1]
        places = [
            (step, _beside(x, y, width, height, direction, _GAP * pixel * distance))
            for step, (distance, direction) in enumerate((d, way) for d in distances for way in _DIRECTIONS)
        ]
        costs = [step + _cost(box, inside, np.array(names).reshape(-1, 4), taken_by_markers, dots) for step, box in places]
        best = int(np.argmin(costs))
        if costs[best] >= _UPON_MARKER and not item.must:
            lost.append(item.text)
            continue
        names.append(places[best][1])
        _write(axes, item, places[best][1], (x, y), font_pt, is_far=best >= len(_DIRECTIONS))
    return lost


def _around(x: float, y: float, radius: float) -> Box:
    return (x - radius, y - radius, x + radius, y + radius)


def _beside(x: float, y: float, width: float, height: float, direction: tuple[int, int], gap: float) -> Box:
    across, up = direction
    middle_x = x + across * (width / 2 + gap) if across else x
    middle_y = y + up * (height / 2 + gap * (0.5 if across else 0.9))
    return (middle_x - width / 2, middle_y - height / 2, middle_x + width / 2, middle_y + height / 2)


def _text_size(axes: "Axes", text: str, font_pt: float) -> tuple[float, float]:
    from matplotlib.font_manager import FontProperties

    renderer = axes.figure.canvas.get_renderer()  # type: ignore[union-attr,attr-defined]
    font = FontProperties(size=font_pt)
    width = renderer.get_text_width_height_descent(text, font, False)[0]
    height = renderer.get_text_width_height_descent("lp", font, False)[1]  # as matplotlib lays out a line
    return width + 2, height + 2


def _dots(axes: "Axes", line: Sequence[tuple[float, float]]) -> np.ndarray:
    """Points every few pixels along a line."""
    ends: np.ndarray = axes.transData.transform(np.asarray(line, dtype=float))
    ends = ends[np.isfinite(ends).all(axis=1)]
    if len(ends) < 2:
        return ends.reshape(-1, 2)
    pieces = [np.linspace(a, b, 2 + min(200, int(np.abs(b - a).max() // 6))) for a, b in pairwise(ends)]
    return np.concatenate(pieces)


def _cost(box: Box, inside: Box, names: np.ndarray, markers: np.ndarray, dots: np.ndarray) -> float:
    left, bottom, right, top = box
    outside = left < inside[0] or right > inside[2] or bottom < inside[1] or top > inside[3]
    on_line = ((dots[:, 0] > left) & (dots[:, 0] < right) & (dots[:, 1] > bottom) & (dots[:, 1] < top)).sum()
    return (
        _UPON_NAME * (_meets(box, names) + outside) + _UPON_MARKER * _meets(box, markers) + _UPON_LINE * float(min(on_line, 20))
    )


def _meets(box: Box, others: np.ndarray) -> int:
    left, bottom, right, top = box
    return int(((others[:, 0] < right) & (others[:, 2] > left) & (others[:, 1] < top) & (others[:, 3] > bottom)).sum())


def _write(axes: "Axes", item: Named, box: Box, at: tuple[float, float], font_pt: float, *, is_far: bool) -> None:
    left, bottom, right, top = box
    scale = 72 / axes.figure.dpi  # type: ignore[union-attr]
    offset = (((left + right) / 2 - at[0]) * scale, ((bottom + top) / 2 - at[1]) * scale)
    leader = {"arrowstyle": "-", "color": item.colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4} if is_far else None
    axes.annotate(
        item.text,
        (item.x, item.y),
        xytext=offset,
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=font_pt,
        color=item.colour,
        arrowprops=leader,
        bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.7, "pad": 0.4},
        zorder=6,
    )
