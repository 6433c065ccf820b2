"""`crate-ray sweep --coord-check`: do activations change as much in a wide model as in a narrow one?

In: a sweep file, or a recipe. Out: for each arm the slopes of coordinate changes over width, standard and muP, with intervals
and verdicts. Every row goes into --json; on the screen a kind of tensor has one line: the slope of its worst layer and step,
and the verdict on all of them in muP.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from crate_ray.cli.output import console, errors, print_json, print_table, print_text
from crate_ray.config import RunConfig, SweepConfig, read_yaml, recipe_names

if TYPE_CHECKING:
    from crate_ray.training.coordinates import CoordinateRow

_NAMES = {"standard": "standard", "mup": "muP"}
_MEANING = (
    "A verdict is over all layers and steps: unclear where the interval of a slope that does not pass reaches slopes that do. "
    'Which parts are known not to pass, and why: docs/numerics.md, "Coordinate check".'
)


def check_coordinates(name: str, overrides: list[str], *, smoke: bool, as_json: bool) -> None:
    """Runs the check for every arm and prints what it found.

    Args:
        name: A sweep file, a recipe, or the path of one.
        overrides: `a.b=c` strings for either.
        smoke: Take the sweep's small size.
        as_json: Print one JSON object with every row.
    """
    from crate_ray.training.coordinates import LIMIT, coordinate_check, default_widths

    results: dict[str, Any] = {}
    for arm, config in _configs(name, overrides, smoke=smoke).items():
        widths = default_widths(config.model)
        errors.print(f"[dim]coordinate check of {escape(arm)}: both parametrizations at widths {_list(widths)} ...[/dim]")
        rows, gaps = coordinate_check(config, widths=widths), _not_checked(config)
        results[arm] = {
            "widths": widths,
            "passes": {key: all(row.passes for row in rows if row.parametrization == key) for key in _NAMES},
            "not_checked": gaps,
            "rows": [row.as_dict() for row in rows],
        }
        if not as_json:
            _print(arm, rows, widths, LIMIT)
            for gap in gaps:
                print_text(f"not checked: {gap}", style="yellow")
            console.print()
    if as_json:
        print_json({"limit": LIMIT, "arms": results})
    else:
        print_text(_MEANING)


def _configs(name: str, overrides: list[str], *, smoke: bool) -> dict[str, RunConfig]:
    """The configuration of every arm; of a recipe its own, under its name."""
    path = Path(name)
    is_file = name not in recipe_names() and path.suffix in (".yaml", ".yml") and path.is_file()
    if not is_file or "base" not in read_yaml(path.read_text(), where=name):
        return {path.stem if is_file else name: RunConfig.load(name, overrides)}
    from crate_ray.space import arm_config, arms

    sweep = SweepConfig.load(name, overrides, smoke=smoke)
    return {arm: arm_config(sweep, arm) for arm in arms(sweep)}


def _not_checked(config: RunConfig) -> list[str]:
    """What the rows do not say of this model."""
    model = config.model
    if not model.share_layers:
        return []
    return [
        f"the first {model.encoder_depth - 1} of {model.encoder_depth} applications of the shared encoder layer; its rows are "
        "those of the last"
    ]


def _print(arm: str, rows: "list[CoordinateRow]", widths: Sequence[int], limit: float) -> None:
    """One line a kind of tensor, then the verdict of each parametrization."""
    kinds = {key: _by_kind([row for row in rows if row.parametrization == key]) for key in _NAMES}
    header = ("tensor", *(f"{name} slope [95%]" for name in _NAMES.values()), "muP")
    cells = [(kind, *(_slope(kinds[key][kind]) for key in _NAMES), _verdict(found)) for kind, found in kinds["mup"].items()]
    print_table(header, cells, title=f"{escape(arm)}: slope over widths {_list(widths)}, worst layer and step")
    for key, name in _NAMES.items():
        of_key = [row for row in rows if row.parametrization == key]
        row, verdict = max(of_key, key=_steepness), _verdict(of_key)
        said, sign = ("passes", "<") if verdict == "passes" else (f"does not pass ({verdict})", ">=")
        print_text(
            f"{name} {said}: largest |slope| {abs(row.slope):.3f} {sign} {limit:g} ({row.name} after {row.step} steps)",
            style="bold" if key == "mup" else None,
        )


def _by_kind(rows: "list[CoordinateRow]") -> "dict[str, list[CoordinateRow]]":
    """The rows of each kind of tensor: the layers of a stack are one kind."""
    kinds: dict[str, list[CoordinateRow]] = {}
    for row in rows:
        kinds.setdefault(re.sub(r"\.\d+", ".*", row.name), []).append(row)
    return kinds


def _verdict(rows: "list[CoordinateRow]") -> str:
    """What holds of some of the rows, if any is clear; else whether any is unclear."""
    found = {row.verdict for row in rows}
    return " and ".join(sorted(found & {"grows", "shrinks"})) or ("unclear" if "unclear" in found else "passes")


def _slope(rows: "list[CoordinateRow]") -> str:
    row = max(rows, key=_steepness)
    return f"{row.slope:+.2f} [{row.low:+.2f}, {row.high:+.2f}]"


def _steepness(row: "CoordinateRow") -> float:
    return abs(row.slope)


def _list(widths: Sequence[int]) -> str:
    return ", ".join(map(str, widths))
