"""A report as its parts: sections of paragraphs, lists, tables and pictures, without any markup.

In: nothing. Out: types. The report is composed once and rendered twice, as Markdown and as HTML, so that the two never say
different things. Texts are plain; what stands between two backticks is code. Renderers escape everything else.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_LONG_HEADLINE = 140
_NEXT_SENTENCE = re.compile(r"(?<=\.) (?=[A-Z])")


@dataclass(frozen=True)
class Paragraph:
    """One paragraph."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list.

    Attributes:
        items: Text behind a lead in bold, which may be empty.
        is_urgent: Whether it says what must not be concluded.
    """

    items: tuple[tuple[str, str], ...]
    is_urgent: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: What it holds.
        header: Of the columns; the first one names the rows.
        lines: One a row, as many cells as the header has.
        texts: Columns that hold sentences and names; the others hold numbers.
    """

    caption: str
    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    texts: frozenset[int] = frozenset({0})


@dataclass(frozen=True)
class Picture:
    """Where a drawing stands, by its name."""

    name: str


@dataclass(frozen=True)
class Commands:
    """Lines as a shell takes them."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Folded:
    """A long list of names under one sentence; a page may fold it."""

    summary: str
    text: str


Block = Paragraph | Bullets | Table | Picture | Commands | Folded


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it.

    Attributes:
        title: The heading.
        anchor: Its name in links.
        blocks: In order.
    """

    title: str
    anchor: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """A whole report.

    Attributes:
        headline: The first line.
        title: What was compared.
        lead: What was measured on what, in one sentence.
        verdicts: A sentence for each axis by its name.
        warnings: What must be known with the verdicts.
        sections: In order.
    """

    headline: str
    title: str
    lead: str
    verdicts: Mapping[str, str]
    warnings: Bullets | None
    sections: tuple[Section, ...]

    @property
    def headline_parts(self) -> tuple[str, str]:
        """The headline as what stands out and what follows: a long one after its first sentence."""
        if len(self.headline) <= _LONG_HEADLINE:
            return self.headline, ""
        first, *rest = _NEXT_SENTENCE.split(self.headline, maxsplit=1)
        return first, " ".join(rest)


@dataclass(frozen=True)
class Drawing:
    """A picture in all its forms.

    Attributes:
        name: Of its files, without an ending.
        title: Its caption's first words.
        caption: How to read it.
        alt: What it shows, for who does not see it.
        png: Bytes.
        svg: A file of its own.
        wide: SVG for a page, its identifiers unique among all drawings.
        narrow: The same for a phone.
    """

    name: str
    title: str
    caption: str
    alt: str
    png: bytes
    svg: str
    wide: str
    narrow: str
