"""Options that several verbs share."""

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Set = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe; may be repeated.")]
