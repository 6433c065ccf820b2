"""Tables, lists and plain text as Markdown.

In: text, some of it made of names that users chose. Out: Markdown that shows it as it was written.
"""

from collections.abc import Sequence


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar or a line break inside a cell would end it."""
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in (header, ["---"] * len(header), *lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def bullets(lines: Sequence[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)
