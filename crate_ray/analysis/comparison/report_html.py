"""A report as one HTML file that needs nothing else: no script, no font, no picture from elsewhere.

In: a document, and its drawings. Out: the text of report.html. Pictures are SVG inside it, one for wide pages and print, one
for phones. It follows the reader's light or dark scheme, and wide tables scroll inside themselves.
"""

import re
from collections.abc import Mapping
from functools import singledispatch
from html import escape
from string import Template

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
from crate_ray.analysis.comparison.report_style import STYLE

_LONG = 32  # letters of a cell that gets a wide column
_CODE = re.compile(r"`([^`\n]+)`")
_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="description" content="$headline">
<title>$title</title>
<link rel="icon" href="data:,">
<style>
$style</style>
</head>
<body>
<main>
<header>
<p class="title">$title</p>
<h1>$headline_first</h1>
$headline_rest
<p class="lead">$lead</p>
</header>
<section aria-label="Verdicts">
<dl class="verdicts">
$verdicts
</dl>
$warnings
</section>
<nav aria-label="Sections"><ul>
$links
</ul></nav>
$sections
</main>
</body>
</html>
""")


def html(document: Document, drawings: Mapping[str, Drawing]) -> str:
    """The text of report.html.

    Args:
        document: The report.
        drawings: By name, each that the document shows.
    """
    first, rest = document.headline_parts
    return _PAGE.substitute(
        title=escape(document.title),
        headline=escape(document.headline),
        headline_first=inline(first),
        headline_rest=f"<p>{inline(rest)}</p>" if rest else "",
        lead=inline(document.lead),
        style=STYLE,
        verdicts="\n".join(
            f"<div><dt>{escape(axis)}</dt><dd>{inline(text)}</dd></div>" for axis, text in document.verdicts.items()
        ),
        warnings=_block(document.warnings) if document.warnings else "",
        links="\n".join(f'<li><a href="#{item.anchor}">{escape(item.title)}</a></li>' for item in document.sections),
        sections="\n".join(_section(section, drawings) for section in document.sections),
    )


def inline(text: str) -> str:
    """Plain text as HTML; what stands between two backticks is code."""
    return _CODE.sub(r"<code>\1</code>", escape(text))


def _section(section: Section, drawings: Mapping[str, Drawing]) -> str:
    blocks = [_picture(drawings[block.name]) if isinstance(block, Picture) else _block(block) for block in section.blocks]
    title = f'<h2 id="{section.anchor}-title">{escape(section.title)}</h2>'
    return "\n".join(
        [f'<section id="{section.anchor}" aria-labelledby="{section.anchor}-title">', title, *blocks, "</section>"]
    )


def _picture(drawing: Drawing) -> str:
    caption = f"<figcaption>{inline(drawing.caption)}</figcaption>"
    return f'<figure id="figure-{drawing.name}">\n{drawing.wide}\n{drawing.narrow}\n{caption}\n</figure>'


@singledispatch
def _block(block: Block) -> str:
    raise TypeError(f"no HTML for {type(block).__name__}")


@_block.register
def _paragraph(block: Paragraph) -> str:
    return f"<p>{inline(block.text)}</p>"


@_block.register
def _list(block: Bullets) -> str:
    items = [f"<li><strong>{inline(lead)}</strong> {inline(text)}</li>" if lead else f"<li>{inline(text)}</li>"
             for lead, text in block.items]  # fmt: skip
    kind = ' class="urgent"' if block.is_urgent else ""
    return "\n".join([f"<ul{kind}>", *items, "</ul>"])


@_block.register
def _table(block: Table) -> str:
    long = {index for line in block.lines for index, text in enumerate(line) if index in block.texts and len(text) > _LONG}

    def cell(index: int, text: str) -> str:
        kind = ' class="long"' if index in long else "" if index in block.texts else ' class="number"'
        # A row is named by its first cell, which stays in sight while the others scroll.
        return f'<th scope="row"{kind}>{inline(text)}</th>' if index == 0 else f"<td{kind}>{inline(text)}</td>"

    header = "".join(
        f'<th scope="col"{"" if index in block.texts else " class=number"}>{inline(text)}</th>'
        for index, text in enumerate(block.header)
    )
    lines = ["<tr>" + "".join(cell(index, text) for index, text in enumerate(line)) + "</tr>" for line in block.lines]
    caption = inline(block.caption)
    return "\n".join(
        [
            f'<div class="scroll" role="region" aria-label="{escape(block.caption)}" tabindex="0"><table>',
            f"<caption>{caption}</caption>",
            f"<thead><tr>{header}</tr></thead>",
            "<tbody>",
            *lines,
            "</tbody></table></div>",
        ]
    )


@_block.register
def _commands(block: Commands) -> str:
    return "<pre><code>" + escape("\n".join(block.lines)) + "</code></pre>"


@_block.register
def _folded(block: Folded) -> str:
    return f"<details><summary>{inline(block.summary)}</summary><p>{inline(block.text)}</p></details>"
