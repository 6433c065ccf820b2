"""The paper that a comparison's pictures are drawn on, and the forms in which they leave it.

In: a function that draws on a page. Out: PNG, an SVG file, and two SVG for a web page, wide and narrow: a picture that is
merely shrunk to a phone cannot be read there. Text stays text. For the page, ink and paper become the page's own colours, so
that they follow a dark scheme, and identifiers get the picture's name, so that several stand in one document.
"""

import io
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from crate_ray.analysis.comparison.document import Drawing
from crate_ray.analysis.drawing import FAMILY_COLOURS, GRID_COLOUR, OTHER_SHADES, SHADES, png

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

INK, MUTED, PAPER = "#1f2328", "#656d76", "#ffffff"
_PAGE_COLOURS = {INK: "ink", MUTED: "muted", PAPER: "paper", GRID_COLOUR: "grid"}
_MAX_LABEL = 30


@dataclass(frozen=True)
class Page:
    """Where a picture is shown.

    Attributes:
        name: wide or narrow.
        width: Of the picture in inches.
        font_pt: Of its text.
        title_letters: After which a title breaks.
    """

    name: str
    width: float
    font_pt: float
    title_letters: int

    @property
    def is_narrow(self) -> bool:
        """Whether it is a phone."""
        return self.name == "narrow"


WIDE = Page("wide", 7.8, 9.5, 90)
NARROW = Page("narrow", 3.7, 8.5, 42)


@dataclass(frozen=True)
class Style:
    """How a model is drawn: the colour of its family, and a marker that tells it apart in grey."""

    colour: str
    marker: str


_STYLES = {
    "crate_mae": Style(SHADES["crate"][0], "o"),
    "crate_mae_visible": Style(SHADES["crate"][1], "P"),
    "mae": Style(SHADES["vit"][0], "s"),
    "mae_all_tokens": Style(SHADES["vit"][1], "D"),
}
_FAMILY_MARKERS = {"crate": "X", "vit": "^"}


def model_style(model: str, family: str) -> Style:
    """The style of a model; of one without its own, its family's."""
    other = Style(FAMILY_COLOURS.get(family, OTHER_SHADES[0]), _FAMILY_MARKERS.get(family, "v"))
    return _STYLES.get(model, other)


def short(label: str, letters: int = _MAX_LABEL) -> str:
    """A name as a picture can hold it: printable, in one line, of at most so many letters."""
    clean = " ".join("".join(letter if letter.isprintable() else " " for letter in label).split())
    return clean if len(clean) <= letters else clean[: letters - 1] + "…"


def drawing(name: str, draw: Callable[[Page], "Figure"], *, title: str, caption: str, alt: str, dpi: int) -> Drawing:
    """A picture in all its forms.

    Args:
        name: Of its files.
        draw: Makes the figure for a page.
        title: Of the caption.
        caption: How to read it.
        alt: What it shows.
        dpi: Of the PNG.
    """
    with _paper(name):
        figure = _laid_out(draw(WIDE))
        image, file = png(figure, dpi=dpi), _svg(figure)
        wide, narrow = _for_page(file, name, WIDE, alt), _for_page(_svg(draw(NARROW)), name, NARROW, alt)
    return Drawing(name, title, caption, alt, image, _with_title(file, alt), wide, narrow)


def _laid_out(figure: "Figure") -> "Figure":
    """The figure with its layout computed once, not again for every file."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return figure


@contextmanager
def _paper(name: str) -> Iterator[None]:
    """Colours and fonts, whatever the user's own matplotlib settings are; a dollar sign in a name is no formula."""
    import matplotlib as mpl

    ours: Any = {
        "font.family": "DejaVu Sans",
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,
        "text.usetex": False,
        "text.color": INK,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.facecolor": PAPER,
        "figure.facecolor": PAPER,
        "savefig.facecolor": PAPER,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with mpl.rc_context(ours), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of a name in letters that the font lacks; SVG shows them
        yield


def _svg(figure: "Figure") -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)  # type: ignore[no-untyped-call]
    return buffer.getvalue()


def _with_title(svg: str, alt: str) -> str:
    return re.sub(r"(<svg\b[^>]*>)", lambda found: f"{found[1]}\n <title>{escape(alt)}</title>", svg, count=1)


def _for_page(svg: str, name: str, page: Page, alt: str) -> str:
    """The drawing for the inside of a web page, as wide as its place."""
    prefix = f"{name}-{page.name}-"
    body = svg[svg.index("<svg") :]
    view = re.search(r'viewBox="([^"]+)"', body)
    assert view is not None
    body = body[body.index(">") + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', body)
    body = re.sub(r'(?:xlink:)?href="#([^"]+)"', rf'href="#{prefix}\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", body)
    body = re.sub(r"(font: [^;\"']*?px) [^;\"]*", r"\1 var(--font)", body)
    for colour, variable in _PAGE_COLOURS.items():
        body = body.replace(colour, f"var(--{variable})")
    return f'<svg class="{page.name}" viewBox="{view[1]}" role="img" aria-label="{escape(alt)}">{body.strip()}'


def legend(figure: "Figure", handles: Sequence["Artist"], page: Page) -> None:
    """A legend below everything, in as many columns as the page has room for."""
    columns = 1 if page.is_narrow else min(3, len(handles))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=page.font_pt - 1)


def title(figure: "Figure", text: str, page: Page) -> None:
    """A title, broken where the page ends."""
    figure.suptitle("\n".join(textwrap.wrap(text, page.title_letters)), fontsize=page.font_pt + 1, fontweight="bold")
