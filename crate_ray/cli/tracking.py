"""`crate-ray tracking`: catch MLflow up with the run folders, show it, and close the runs of dead drivers.

In: a folder of run folders. Out: MLflow runs, or a server for a local database. The folders are the truth and
MLflow is a mirror of them, so each of these verbs can be repeated at any time.
"""

import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape

from crate_ray import storage
from crate_ray.cli.arguments import Json
from crate_ray.cli.output import console, errors, link_rows, print_json, print_table
from crate_ray.cli.runs import Root, find_runs
from crate_ray.config import ConfigError
from crate_ray.runs import RunFolder, close_stale, sweep_of

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Mirror run folders to MLflow, and look at them there.")

Uri = Annotated[
    str | None,
    typer.Option("--uri", help="Tracking store; by default each run's tracking.uri, else mlflow.db beside the runs."),
]
Experiment = Annotated[
    str | None, typer.Option("--experiment", help="Name of the experiment; by default each run's tracking.experiment.")
]


@app.command("sync")
def sync(root: Root = "out", uri: Uri = None, experiment: Experiment = None, as_json: Json = False) -> None:
    """Send to MLflow what it lacks of the runs."""
    rows = _sync(find_runs(root), root, uri, experiment)
    _finish(rows, as_json, nothing=f"no runs in {root}: nothing to send")


@app.command("reap")
def reap(
    root: Root = "out",
    uri: Uri = None,
    experiment: Experiment = None,
    silent_for: Annotated[
        float, typer.Option("--silent-for", min=1, help="Seconds without a sign of life after which a run in MLflow is dead.")
    ] = 300,
    as_json: Json = False,
) -> None:
    """Mark runs whose driver died as FAILED, in their folders and in MLflow; --uri works without the folders too."""
    from crate_ray import tracking
    from crate_ray.tracking.client import public_uri

    folders = [] if uri is not None and not storage.exists(root) else find_runs(root)
    rows = _sync(_closed(folders), root, uri, experiment)
    done = {row["run_id"] for row in rows}
    for store in sorted({_destination(folder, root, uri, None)[0] for folder in folders} | ({uri} if uri else set())):
        found = [result for result in tracking.reap(store, experiment, silent_s=silent_for) if result.run_id not in done]
        rows += [{**asdict(result), "uri": public_uri(store)} for result in found]
    _finish(rows, as_json, nothing="no run has lost its driver: nothing to close")


def _closed(folders: Sequence[RunFolder]) -> list[RunFolder]:
    """Closes the runs and the sweeps whose drivers died; gives the runs that are to be sent for it, a sweep's by its trials."""
    sweeps = {folder.uri: sweep_of(folder) for folder in folders}
    dead = {sweep.uri for sweep in {s.uri: s for s in sweeps.values() if s is not None}.values() if close_stale(sweep)}
    return [folder for folder in folders if close_stale(folder) or ((sweep := sweeps[folder.uri]) and sweep.uri in dead)]


@app.command("ui")
def ui(
    root: Root = "out",
    uri: Uri = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 5000,
    allowed_hosts: Annotated[
        str, typer.Option("--allowed-hosts", help="Names by which others call this machine, with commas between them.")
    ] = "",
    artifacts: Annotated[
        str | None, typer.Option("--artifacts", help="Folder or bucket for files; by default mlartifacts beside the database.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes that answer.")] = 1,
    as_json: Json = False,
) -> None:
    """Serve MLflow's pages of the runs, and its interface over HTTP, until Ctrl-C."""
    from crate_ray.tracking import initialise, serve, view_links

    store, experiments = _store(root, uri)
    errors.print("starting MLflow's server ...")
    # Before the server starts: two processes that open a fresh database at once break its migration.
    ids = {name: initialise(store, name) for name in experiments}
    signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it as ignored
    names = [name.strip() for name in allowed_hosts.split(",") if name.strip()]
    with serve(store, host, port, allowed_hosts=names, artifacts=artifacts, workers=workers) as server:
        views = {name: view_links(store, server.url, found) for name, found in ids.items() if found is not None}
        try:
            _show_links(server.url, store, views, as_json)
            server.wait()
        except KeyboardInterrupt:
            raise typer.Exit from None
        errors.print(f"the MLflow server ended by itself; its last lines:\n{escape(server.log_tail())}", soft_wrap=True)
        raise typer.Exit(1)


def _show_links(url: str, store: str, views: dict[str, dict[str, str]], as_json: bool) -> None:
    from crate_ray.tracking.client import public_uri

    if as_json:
        print_json({"url": url, "uri": public_uri(store), "views": views})
        sys.stdout.flush()  # a program at the other end of a pipe waits for it while this one serves
        return
    console.print(f"MLflow  {url}  (Ctrl-C stops it)", soft_wrap=True)
    for name, links in views.items():
        for line in (name, *link_rows(links)):
            console.print(escape(line), soft_wrap=True)


def _terminated(number: int, frame: object) -> NoReturn:
    """SIGTERM leaves through the `with`, so that the server does not outlive this process."""
    raise SystemExit(128 + number)


def _store(root: str, uri: str | None) -> tuple[str, list[str]]:
    """The tracking store to serve, and the experiments that the runs name in it.

    Raises:
        ConfigError: No runs and no store, or runs in several stores.
    """
    from crate_ray.tracking.client import public_uri

    if uri is not None and not storage.exists(root):
        return uri, []
    destinations = [_destination(folder, root, uri, None) for folder in find_runs(root)]
    stores = sorted({store for store, _ in destinations}) or [uri or _default_uri(root)]
    if len(stores) > 1:
        raise ConfigError(
            f"the runs in {root} are in several tracking stores; choose one with --uri: {', '.join(map(public_uri, stores))}"
        )
    return stores[0], sorted({name for _, name in destinations})


def _default_uri(root: str) -> str:
    from crate_ray.tracking import default_uri

    return default_uri(root)


def _destination(folder: RunFolder, root: str, uri: str | None, experiment: str | None) -> tuple[str, str]:
    """Store and experiment of one run: as asked for, else as its configuration says."""
    config = folder.read_config()
    return uri or config.tracking.uri or _default_uri(root), experiment or config.tracking.experiment


def _sync(folders: Sequence[RunFolder], root: str, uri: str | None, experiment: str | None) -> list[dict[str, Any]]:
    """Syncs runs and the sweeps above them, those of one experiment together, so that parents come before what they started."""
    from crate_ray import tracking
    from crate_ray.tracking.client import public_uri

    groups: dict[tuple[str, str], list[RunFolder]] = {}
    for folder in folders:
        group = groups.setdefault(_destination(folder, root, uri, experiment), [])
        group.append(folder)
        sweep = sweep_of(folder)
        if sweep is not None and all(member.uri != sweep.uri for member in group):
            group.append(sweep)
    rows = []
    for (store, name), members in groups.items():
        results = tracking.sync(members, store, name, artifact_root=tracking.default_artifact_root(root))
        rows += [{**asdict(result), "uri": public_uri(store)} for result in results]
    return rows


def _finish(rows: list[dict[str, Any]], as_json: bool, *, nothing: str) -> None:
    """Prints how each run fared; exit code 1 when one could not be sent."""
    if as_json:
        print_json(rows)
    elif not rows:
        console.print(escape(nothing), soft_wrap=True)
    else:
        print_table(
            ("run", "experiment", "records sent", "result"),
            [[escape(r["name"]), escape(r["experiment"]), str(r["sent"]), "failed" if r["error"] else "ok"] for r in rows],
        )
        for row in rows:
            if row["error"]:
                console.print(f"{escape(row['name'])}: {escape(row['error'])}", soft_wrap=True)
    if any(row["error"] for row in rows):
        raise typer.Exit(1)
