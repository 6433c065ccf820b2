"""A report as Markdown.

In: a document, and its drawings. Out: the text of report.md, whose first line is the headline. Pictures are files beside it.
"""

from collections.abc import Mapping
from functools import singledispatch

from crate_ray.analysis.comparison.document import (
    Block,
    Bullets,
    Commands,
    Document,
    Drawing,
    Folded,
    Paragraph,
    Picture,
    Section,
    Table,
)
from crate_ray.analysis.markdown import bullets, escape, escape_line, table


def markdown(document: Document, drawings: Mapping[str, Drawing], *, folder: str = "figures") -> str:
    """The text of report.md.

    Args:
        document: The report.
        drawings: By name, each that the document shows.
        folder: Where their files lie, seen from the report.
    """
    verdicts = bullets([f"**{escape(axis)}:** {escape(text)}" for axis, text in document.verdicts.items()])
    first, rest = document.headline_parts
    headline = f"**{escape(first)}** {escape(rest)}".strip()
    parts = [headline, f"# {escape(document.title)}", escape_line(document.lead), verdicts]
    if document.warnings is not None:
        parts.append(_list(document.warnings))
    parts += [_section(section, drawings, folder) for section in document.sections]
    return "\n\n".join(parts) + "\n"


def _section(section: Section, drawings: Mapping[str, Drawing], folder: str) -> str:
    blocks = [
        _picture(drawings[block.name], folder) if isinstance(block, Picture) else _text(block) for block in section.blocks
    ]
    return "\n\n".join([f"## {escape(section.title)}", *blocks])


def _picture(drawing: Drawing, folder: str) -> str:
    alt = escape(drawing.alt).replace("]", "\\]")
    return f"![{alt}]({folder}/{drawing.name}.png)\n\n{escape_line(drawing.caption)}"


@singledispatch
def _text(block: Block) -> str:
    raise TypeError(f"no Markdown for {type(block).__name__}")


@_text.register
def _paragraph(block: Paragraph) -> str:
    return escape_line(block.text)


@_text.register
def _list(block: Bullets) -> str:
    return bullets([f"**{escape(lead)}** {escape(text)}" if lead else escape_line(text) for lead, text in block.items])


@_text.register
def _table(block: Table) -> str:
    lines = [[escape(cell) for cell in line] for line in block.lines]
    numbers = [index for index in range(len(block.header)) if index not in block.texts]
    return f"{escape(block.caption)}\n\n{table([escape(cell) for cell in block.header], lines, numbers=numbers)}"


@_text.register
def _commands(block: Commands) -> str:
    lines = "\n".join(block.lines)
    fence = "```"
    while fence in lines:
        fence += "`"
    return f"{fence}\n{lines}\n{fence}"


@_text.register
def _folded(block: Folded) -> str:
    return f"{escape_line(block.summary)}\n\n{escape_line(block.text)}"
