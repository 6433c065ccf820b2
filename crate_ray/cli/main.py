"""The command line: one module a verb; what is heavy is imported inside the verb.

Exit codes: 0 success; 2 a configuration or input that the user can correct, as one message without a
traceback; 1 failure; 130 and 143 stopped by SIGINT and SIGTERM after a checkpoint.
"""

import logging
import os
import sys
import warnings
from typing import NoReturn

import typer
from rich.markup import escape

from crate_ray import __version__
from crate_ray.cli import (
    compare,
    data,
    doctor,
    export,
    models,
    probe,
    quickstart,
    runs,
    sweep,
    time_runs,
    tracking,
    train,
    weights,
)
from crate_ray.cli.output import errors
from crate_ray.config import ConfigError
from crate_ray.runs import LeaseLostError
from crate_ray.storage import StorageError

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
app.command("quickstart", short_help="The main job on embedded data.")(quickstart.quickstart)
app.command("doctor", short_help="What would fail later, found now.")(doctor.doctor)
app.add_typer(data.app, name="data", short_help="Build, index and inspect shards.")
app.command("train", short_help="Train one model; again resumes.")(train.train)
app.command("sweep", short_help="Many trials with Ray Tune; again resumes.")(sweep.sweep)
app.command("runs", short_help="List runs and their states.")(runs.runs)
app.command("time", short_help="Time runs on an idle machine.")(time_runs.time_runs)
app.command("probe", short_help="Judge finished runs; draw what they see.")(probe.probe)
app.command("compare", short_help="Is CRATE-MAE worth it: verdicts and a report.")(compare.compare)
app.command("models", short_help="Parameters, GFLOPs and memory of a model.")(models.models)
app.command("weights", short_help="Read, identify or convert a weights file.")(weights.weights)
app.command("export", short_help="Weights for other programs.")(export.export)
app.add_typer(tracking.app, name="tracking", short_help="MLflow: open, catch up, close dead runs.")

_TORCH_PAIR = (
    "the installed torch and torchvision were not built for each other (an operator of torchvision is missing); "
    "install two of one release: python -m pip install --upgrade torch torchvision"
)


EXIT_REFUSED = 2


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"crate-ray {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version and exit."),
) -> None:
    """Train CRATE-MAE and MAE on Ray, and compare them in MLflow."""


def run() -> None:
    """Entry point of the process: `main`, and an exit that keeps its code.

    A verb that loaded neither Ray nor MLflow has nothing to clean up. It leaves without the destructors of native libraries,
    one of which now and then aborts with "terminate called without an active exception" and turns any exit code into 134.
    """
    try:
        main()
    except SystemExit as end:
        code = 0 if end.code is None else end.code
        if isinstance(code, int) and not {"ray", "mlflow"} & sys.modules.keys():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        raise


def main() -> None:
    """The command line: turns errors a user can correct into one message and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    warnings.simplefilter("ignore", FutureWarning)
    try:
        app()
    except (ConfigError, StorageError) as error:
        _end_with(error, EXIT_REFUSED)
    except LeaseLostError as error:
        _end_with(error, 1)
    except TimeoutError as error:
        if not type(error).__module__.startswith("crate_ray."):
            raise
        _end_with(error, 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        _end_with(_TORCH_PAIR, EXIT_REFUSED)


def _end_with(error: Exception | str, code: int) -> NoReturn:
    """One message on standard error, and the exit code."""
    errors.print(f"[bold red]error:[/bold red] {escape(str(error))}", soft_wrap=True)
    sys.exit(code)
