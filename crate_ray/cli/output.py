"""What a verb prints: a table or text for people, one JSON object for programs."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

# Without emoji: `:name:` in a path or a message is itself, not a picture.
console = Console(highlight=False, emoji=False)
errors = Console(stderr=True, highlight=False, emoji=False)

TO_MLFLOW = "`crate-ray tracking sync` sends these to MLflow"
"""Below numbers that were written into run folders."""

_NUMBER = re.compile(r"(\[[a-z ]+\])?[-+~]?[\d.(]|-?$")


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")


def link_lines(serve: str, links: Mapping[str, str]) -> list[str]:
    """How to look at something in MLflow: the command that serves its pages, then their titles and addresses."""
    return [serve, *(f"{'then' if number == 0 else '':<4} {row}" for number, row in enumerate(link_rows(links)))]


def link_rows(links: Mapping[str, str]) -> list[str]:
    """Titles and addresses, one below the other."""
    width = max(map(len, links), default=0)
    return [f"{title:<{width}}  {address}" for title, address in links.items()]


def print_text(text: str, *, style: str | None = None) -> None:
    """Text as it is, without markup: broken at words on a terminal, a line for each of its lines elsewhere."""
    console.print(text, style=style, markup=False, soft_wrap=not console.is_terminal)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """A table; columns of numbers to the right. Not cut when the output is no terminal; a number is never broken over lines."""
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    is_text = [index == 0 or any(not _NUMBER.match(row[index]) for row in rows) for index in range(len(header))]
    for name, text in zip(header, is_text, strict=True):
        table.add_column(name, justify="left" if text else "right", overflow="fold", no_wrap=not text)
    for row in rows:
        table.add_row(*row)
    is_wide = not console.is_terminal or not any(is_text[1:])
    target = Console(width=max(console.width, 200), highlight=False, emoji=False) if is_wide else console
    target.print(table, soft_wrap=False)
