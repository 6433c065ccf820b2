"""`crate-ray sweep --coord-check`: do activations change as much in a wide model as in a narrow one?

In: a sweep file, or a recipe. Out: for each arm the slopes of coordinate changes over width, standard and muP, with intervals
and a verdict. Every row goes into --json; on the screen a kind of tensor has one line, that of its worst layer and step.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from crate_ray.cli.output import console, errors, print_json, print_table, print_text
from crate_ray.config import RunConfig, SweepConfig, read_yaml, recipe_names

if TYPE_CHECKING:
    from crate_ray.training.coordinates import CoordinateRow

_NAMES = {"standard": "standard", "mup": "muP"}


def check_coordinates(name: str, overrides: list[str], *, smoke: bool, as_json: bool) -> None:
    """Runs the check for every arm and prints what it found.

    Args:
        name: A sweep file, a recipe, or the path of one.
        overrides: `a.b=c` strings for either.
        smoke: Take the sweep's small size.
        as_json: Print one JSON object with every row.
    """
    from crate_ray.training.coordinates import LIMIT, coordinate_check

    results: dict[str, Any] = {}
    for arm, config in _configs(name, overrides, smoke=smoke).items():
        errors.print(f"[dim]coordinate check of {escape(arm)}: both parametrizations at four widths ...[/dim]")
        rows = coordinate_check(config)
        results[arm] = {
            "passes": {key: all(row.passes for row in rows if row.parametrization == key) for key in _NAMES},
            "rows": [row.as_dict() for row in rows],
        }
        if not as_json:
            _print(arm, rows, LIMIT)
    if as_json:
        print_json({"limit": LIMIT, "arms": results})


def _configs(name: str, overrides: list[str], *, smoke: bool) -> dict[str, RunConfig]:
    """The configuration of every arm; of a recipe its own, under its name."""
    path = Path(name)
    is_file = name not in recipe_names() and path.suffix in (".yaml", ".yml") and path.is_file()
    if not is_file or "base" not in read_yaml(path.read_text(), where=name):
        return {path.stem if is_file else name: RunConfig.load(name, overrides)}
    from crate_ray.space import arm_config, arms

    sweep = SweepConfig.load(name, overrides, smoke=smoke)
    return {arm: arm_config(sweep, arm) for arm in arms(sweep)}


def _print(arm: str, rows: "list[CoordinateRow]", limit: float) -> None:
    """One line a kind of tensor, then the verdict of each parametrization."""
    worst = {key: _worst_by_kind([row for row in rows if row.parametrization == key]) for key in _NAMES}
    header = ("tensor", *(f"{name} slope [95%]" for name in _NAMES.values()))
    cells = [(kind, *(_slope(worst[key][kind]) for key in _NAMES)) for kind in worst["mup"]]
    print_table(header, cells, title=f"{escape(arm)}: slope over width, worst layer and step")
    for key, name in _NAMES.items():
        row = max(worst[key].values(), key=lambda found: abs(found.slope))
        verdict, sign = ("passes", "<") if all(found.passes for found in worst[key].values()) else ("does not pass", ">=")
        print_text(
            f"{name} {verdict}: largest |slope| {abs(row.slope):.3f} {sign} {limit:g} ({row.name} after {row.step} steps)",
            style="bold" if key == "mup" else None,
        )
    console.print()


def _worst_by_kind(rows: "list[CoordinateRow]") -> "dict[str, CoordinateRow]":
    """The steepest row of each kind of tensor: the layers of a stack are one kind."""
    worst: dict[str, CoordinateRow] = {}
    for row in rows:
        kind = re.sub(r"\.\d+", ".*", row.name)
        if kind not in worst or abs(row.slope) > abs(worst[kind].slope):
            worst[kind] = row
    return worst


def _slope(row: "CoordinateRow") -> str:
    return f"{row.slope:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
