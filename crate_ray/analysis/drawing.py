"""What every picture shares: colours, an empty figure, plain axes, numbers on a logarithmic axis, the bytes of a file.

In: nothing, or axes that were drawn on. Out: the same. One place, so that a sweep's pictures and a comparison's look alike.
"""

import io
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's vermilion and blue: apart for every common form of colour blindness, and in grey.
FAMILY_COLOURS = {"crate": "#d55e00", "vit": "#0072b2"}
SHADES = {"crate": (FAMILY_COLOURS["crate"], "#e69f00", "#8c3d00"), "vit": (FAMILY_COLOURS["vit"], "#56b4e9", "#003f66")}
OTHER_SHADES = ("#555555", "#009e73", "#cc79a7")
LOG_FROM_RATIO = 10
"""Values that span this much stand on a logarithmic axis."""
GRID_COLOUR = "#e6e6e6"


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure in inches, whose parts make room for one another."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(axes: "Axes", *, grid: Literal["x", "y"] = "y") -> None:
    """Axes without a frame, with a faint grid behind."""
    axes.grid(axis=grid, color=GRID_COLOUR, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def set_log(axes: "Axes") -> None:
    """A logarithmic axis with numbers as people write them; minor ticks stay without any."""
    from matplotlib.ticker import NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def png(figure: "Figure", *, dpi: int) -> bytes:
    """The figure as the bytes of a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    figure.set_dpi(dpi)
    FigureCanvasAgg(figure).print_png(buffer)  # type: ignore[no-untyped-call]  # savefig would draw it twice
    return buffer.getvalue()
