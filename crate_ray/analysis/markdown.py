"""Tables, lists and plain text as Markdown.

In: text, some of it made of names that users chose. Out: Markdown that shows it as it was written.
"""

import re
from collections.abc import Collection, Sequence

_CODE = re.compile(r"(`[^`\n]+`)")
# Emphasis, strikethrough, a backslash that would escape, HTML, an entity, a link. Brackets of an interval stay as they are.
_SPECIAL = re.compile(r"[*`~]|\\(?=[!-/:-@\[-`{-~])|(?<!\w)_|_(?!\w)|<(?=[A-Za-z/!?])|&(?=#?\w+;)|(?<=\])[(:]|(?<=\])\[")
_STARTS_BLOCK = re.compile(r"^(\s*)([#>+-]|\d+[.)](?=\s))")


def escape(text: str) -> str:
    """Plain text in one line, so that Markdown shows it as it is; what stands between two backticks is code."""
    parts = _CODE.split(" ".join(text.split()))
    return "".join(part if index % 2 else _SPECIAL.sub(r"\\\g<0>", part) for index, part in enumerate(parts))


def escape_line(text: str) -> str:
    """The same at the beginning of a line, where a dash or a number would begin a list."""
    return _STARTS_BLOCK.sub(_escape_start, escape(text))


def _escape_start(found: re.Match[str]) -> str:
    mark = found[2]
    return found[1] + (f"\\{mark}" if len(mark) == 1 else f"{mark[:-1]}\\{mark[-1]}")


def table(header: Sequence[str], lines: Sequence[Sequence[str]], *, numbers: Collection[int] = ()) -> str:
    """A Markdown table; a bar or a line break inside a cell would end it.

    Args:
        header: Of the columns.
        lines: Cells, as many a line as the header has.
        numbers: Columns that are set flush right.
    """
    rule = ["---:" if index in numbers else "---" for index in range(len(header))]
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in (header, rule, *lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def bullets(lines: Sequence[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)
