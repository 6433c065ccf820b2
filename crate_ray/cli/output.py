"""What a verb prints: a table or text for people, one JSON object for programs."""

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

# Without emoji: `:name:` in a path or a message is itself, not a picture.
console = Console(highlight=False, emoji=False)
errors = Console(stderr=True, highlight=False, emoji=False)

_NUMBER = re.compile(r"(\[[a-z ]+\])?[-+~]?[\d.(]|-?$")


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """A table; columns of numbers to the right. Not cut when the output is no terminal."""
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for index, name in enumerate(header):
        is_text = index == 0 or any(not _NUMBER.match(row[index]) for row in rows)
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    target = console if console.is_terminal else Console(width=200, highlight=False, emoji=False)
    target.print(table)
