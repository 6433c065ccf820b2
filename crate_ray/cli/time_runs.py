"""`crate-ray time`: images a second of runs, timed by turns on an idle machine, for the time axis of a comparison."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from crate_ray.cli.arguments import Json
from crate_ray.cli.output import TO_MLFLOW, console, errors, print_json, print_table, print_text
from crate_ray.cli.progress import plural

if TYPE_CHECKING:
    from crate_ray.runs import RunFolder

FILE = "timing.json"


def time_runs(
    run_folders: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, as `crate-ray runs` lists them.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps of each round that are measured, after a warm-up.")] = 20,
    rounds: Annotated[int, typer.Option(min=6, help="Rounds; each times every run once, by turns.")] = 6,
    busy: Annotated[
        bool,
        typer.Option("--busy", help="Time although others are at work; timing.json says so, and comparisons leave it out."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Time runs with a machine to themselves, by turns; writes timing.json into each. Runs of equal steps are timed once."""
    from crate_ray.training.exclusive import time_exclusively, timing_key
    from crate_ray.training.prepare import absolute_paths

    folders = _folders(run_folders)
    configs = {folder.uri: absolute_paths(folder.read_config()) for folder in folders}
    keys = {uri: timing_key(config) for uri, config in configs.items()}
    first_of = {key: uri for uri, key in reversed(keys.items())}
    errors.print(
        f"[dim]timing {plural(len(first_of), 'kind')} of runs by turns, {rounds} rounds of {steps} steps ...[/dim]",
        soft_wrap=True,
    )
    found = time_exclusively({uri: configs[uri] for uri in first_of.values()}, steps=steps, rounds=rounds, may_be_busy=busy)
    timings = {folder.uri: found[first_of[keys[folder.uri]]].as_dict() for folder in folders}
    for folder in folders:
        folder.write_json(FILE, timings[folder.uri])
    if as_json:
        print_json(timings)
        return
    _print(folders, timings)


def _folders(uris: list[str]) -> "list[RunFolder]":
    """The run folders, each once."""
    from crate_ray.runs import RunFolder

    folders = list({folder.uri: folder for folder in map(RunFolder, uris)}.values())
    for folder in folders:
        folder.check_exists()
    return folders


def _print(folders: "list[RunFolder]", timings: dict[str, dict[str, Any]]) -> None:
    rows = []
    for folder in folders:
        timing = timings[folder.uri]
        interval = f"[{timing['low']:,.1f}, {timing['high']:,.1f}]"
        rows.append((folder.name, f"{timing['images_per_s']:,.1f}", interval, f"{timing['global_batch']:,}"))
    last = timings[folders[-1].uri]
    how = f"median over {len(last['rounds'])} rounds of {last['steps']} steps with its 95% interval"
    print_text(f"training on {last['hardware']}, {last['date']}: {how}")
    print_table(("run", "images/s", "interval", "batch"), rows)
    console.print(TO_MLFLOW, style="dim")
    if not last["exclusive"]:
        errors.print(
            f"others used up to {last['other_cores']:.1f} cores meanwhile: comparisons leave these timings out; "
            "time again when the machine is idle",
            soft_wrap=True,
            markup=False,
        )
