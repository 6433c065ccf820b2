"""The architecture: which room may import which, and who alone may import the heavy libraries.

This table is the plan of the house. A new import that it does not allow needs a better place for the code, not a new entry.
"""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import crate_ray

ROOT = Path(crate_ray.__file__).parent

# room: the rooms that it may import (itself always). The package's own root holds only its version.
MAY_IMPORT = {
    "config": "",
    "storage": "config",
    "recipes": "",
    "runs": "config storage",
    "data": "config storage runs",
    "models": "config storage",
    "evaluation": "config models",
    "training": "config storage runs data models evaluation",
    "space": "config models",
    "launch": "config storage runs data models evaluation training space",
    "tracking": "config storage runs",
    "analysis": "config storage runs",
    "cli": "config storage runs data models evaluation training space launch tracking analysis",
    "__main__": "cli",
}

# library: the only rooms that may import it.
ONLY_IN = {
    "ray": "launch",
    "mlflow": "tracking",
    "typer": "cli",
    "rich": "cli",
    "torch": "data models evaluation training launch cli",
}

BEFORE_LAUNCH = ["config", "storage", "recipes", "runs", "data", "models", "evaluation", "training", "space"]
HEAVY = ["ray", "mlflow", "optuna", "sklearn", "scipy", "matplotlib", "webdataset"]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def room_of(module: str) -> str:
    """`crate_ray.data.order` lies in `data`; the package itself in ''."""
    return [*module.split("."), ""][1]


def imported(nodes: Iterable[ast.AST], module: str) -> Iterator[str]:
    """Every module that the import statements among the nodes name, submodules as themselves."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} line {node.lineno}: imports name their package in full"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else str(node.module)


@functools.cache
def all_imports(module: str) -> list[str]:
    """Wherever they stand, inside functions too."""
    return list(imported(ast.walk(MODULES[module]), module))


def import_time_imports(module: str) -> list[str]:
    """Those that run when the module is imported."""
    return list(imported(MODULES[module].body, module))


def test_every_room_has_a_row_in_the_table_and_a_name_that_says_what_it_is_for() -> None:
    rooms = {room_of(module) for module in MODULES} - {""}
    assert rooms == MAY_IMPORT.keys()
    vague = {"utils", "util", "common", "helpers", "helper", "misc", "core", "base_utils"}
    assert not vague & {part for module in MODULES for part in module.split(".")}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_the_table_allows(room: str) -> None:
    allowed = {room, "", *MAY_IMPORT[room].split()}
    wrong = [
        f"{module} imports {target}"
        for module in MODULES
        if room_of(module) == room
        for target in all_imports(module)
        if target.split(".")[0] == "crate_ray" and room_of(target) not in allowed
    ]
    assert not wrong


def test_the_package_itself_imports_nothing() -> None:
    assert all_imports("crate_ray") == []


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_heavy_library_is_imported_only_in_its_rooms(library: str) -> None:
    wrong = [
        module
        for module in MODULES
        if room_of(module) not in ONLY_IN[library].split()
        if library in {target.split(".")[0] for target in all_imports(module)}
    ]
    assert not wrong


def test_rooms_do_not_import_one_another_in_a_circle() -> None:
    order = list(TopologicalSorter({room: allowed.split() for room, allowed in MAY_IMPORT.items()}).static_order())
    assert order.index("config") < order.index("training") < order.index("launch") < order.index("cli")


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_the_modules_of_a_room_do_not_import_one_another_in_a_circle(room: str) -> None:
    inside = [module for module in MODULES if room_of(module) == room]
    graph = {module: [target for target in import_time_imports(module) if target in inside] for module in inside}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_importing_any_room_below_launch_loads_none_of_the_heavy_libraries() -> None:
    modules = [module for module in MODULES if room_of(module) in BEFORE_LAUNCH]
    code = f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert not {name.split(".")[0] for name in done.stdout.split()} & set(HEAVY)
