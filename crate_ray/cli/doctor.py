"""`crate-ray doctor`: what would fail later, found now.

In: a storage path and a tracking store, both optional. Out: one row a check with what was found and, where something
is wrong, the fix. Checks that may hang or crash (an import of torch, a store that does not answer) run beside each
other in processes and threads with a time limit, so that the whole takes seconds. No cluster is started.
"""

import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape

from crate_ray.cli import checks
from crate_ray.cli.arguments import Json
from crate_ray.cli.checks import Check
from crate_ray.cli.output import console, errors, print_json
from crate_ray.config import ConfigError

_INDENT = 20
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
# Far beyond what any check takes on a good day: importing torch or mlflow from a cold network disk needs a minute.
_LIMIT_S = 120.0

_Named = tuple[str, Callable[[], list[Check]]]

Storage = Annotated[str, typer.Option("--storage", help="storage.path of the runs to come.")]
Tracking = Annotated[
    str | None, typer.Option("--tracking", help="tracking.uri of the runs to come; by default mlflow.db beside them.")
]


def doctor(storage: Storage = "out", tracking: Tracking = None, as_json: Json = False) -> None:
    """Find now what would fail later. Exit code 1 when something will."""
    named: list[_Named] = [
        ("Python", checks.check_python),
        ("packages", checks.check_packages),
        ("torch", checks.check_torch),
        ("C++ compiler", checks.check_compiler),
        ("machine", checks.check_machine),
        ("limits", checks.check_limits),
        ("storage", lambda: checks.check_storage(storage)),
        ("tracking", lambda: checks.check_tracking(storage, tracking)),
        ("Ray", checks.check_ray),
    ]
    with errors.status("checking this machine") if errors.is_terminal else nullcontext():
        found = _run_all(named)
    ok = all(check.state != "fail" for check in found)
    if as_json:
        print_json({"ok": ok, "checks": [asdict(check) for check in found]})
    else:
        _print(found)
    if not ok:
        raise typer.Exit(1)


def _run_all(named: Sequence[_Named]) -> list[Check]:
    """Runs the checks beside each other and gives their rows in order; one that hangs or crashes is a row too."""
    results: dict[str, list[Check]] = {}

    def run(name: str, check: Callable[[], list[Check]]) -> None:
        try:
            results[name] = check()
        except ConfigError as error:
            results[name] = [Check(name, "fail", str(error), "give another value")]
        except Exception as error:  # noqa: BLE001 - a check that crashes is a finding, and the others still count
            results[name] = [Check(name, "fail", f"the check itself failed: {type(error).__name__}: {error}", "report this")]

    # Daemons, because a thread that hangs in a store's client must not keep this process alive.
    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in named]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + _LIMIT_S
    for (name, _), thread in zip(named, threads, strict=True):
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            results[name] = [Check(name, "fail", f"no answer within {_LIMIT_S:g} s", "check that what it names can be reached")]
    return [check for name, _ in named for check in results[name]]


def _print(found: Sequence[Check]) -> None:
    for check in found:
        state = f"[{_COLOURS[check.state]}]{check.state:<6}[/]"
        console.print(f"{state}{check.name:<14}{_wrapped(check.found)}", soft_wrap=True)
        if check.fix:
            console.print(f"{'':<{_INDENT}}{_wrapped(f'fix: {check.fix}')}", soft_wrap=True)
    failed, warned = (sum(check.state == state for check in found) for state in ("fail", "warn"))
    console.print(f"{'not ready' if failed else 'ready'}: {len(found)} checks, {failed} failed, {warned} warned")


def _wrapped(text: str) -> str:
    """The text beside the names of the checks: folded in a terminal, one line elsewhere."""
    width = max(_INDENT, console.width - _INDENT) if console.is_terminal else sys.maxsize
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return escape(f"\n{'':<{_INDENT}}".join(lines))
