"""`crate-ray train`: one run through Ray Train; the same command again resumes it."""

from typing import TYPE_CHECKING, Annotated

import typer

from crate_ray.cli.arguments import Json, Set
from crate_ray.cli.output import print_json
from crate_ray.config import ConfigError, RunConfig, recipe_names
from crate_ray.runs import encode_number

if TYPE_CHECKING:
    from crate_ray.launch.train import RunOutcome
    from crate_ray.training.profiling import ProfiledSteps

DEFAULT_MFU = 0.4


def train(
    recipe: Annotated[str, typer.Argument(help=f"A recipe ({', '.join(recipe_names())}), or the path of a .yaml file.")],
    overrides: Set = [],  # noqa: B006  typer reads the default
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would run, check the data and the name, start nothing.")
    ] = False,
    mfu: Annotated[
        float | None,
        typer.Option(
            "--mfu",
            min=0.01,
            max=1.0,
            help=f"With --dry-run: share of the peak to reckon hours with; {DEFAULT_MFU} by default.",
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option("--profile", metavar="A:B", help="Trace steps A to B with torch's profiler, into the run's profile/."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Pretrain, classify or fine-tune (train.init_from) one model with Ray Train; the same command again resumes the run."""
    config = RunConfig.load(recipe, overrides)
    profiled = None if profile is None else profiled_steps(profile, config)
    if dry_run:
        from crate_ray.cli import dry_run as plan

        plan.dry_run(config, mfu=DEFAULT_MFU if mfu is None else mfu, as_json=as_json)
        return
    if mfu is not None:
        raise ConfigError("--mfu only reckons the hours of --dry-run; leave it out, or add --dry-run")
    from crate_ray.cli.run_summary import print_summary, summarise
    from crate_ray.cli.study import Study

    with Study(config) as study:
        outcome = study.train(config, profiled=profiled)
    summary = summarise(outcome, study.links())
    if as_json:
        print_json({key: encode_number(value) if isinstance(value, float) else value for key, value in summary.items()})
    else:
        print_summary(summary)
    raise typer.Exit(exit_code(outcome))


def profiled_steps(text: str, config: RunConfig) -> "ProfiledSteps":
    """The steps of `--profile`, which the run still has before it.

    Raises:
        ConfigError: It has not, or the text is no range.
    """
    from crate_ray.data import load_source
    from crate_ray.training.checkpoint import latest_checkpoint
    from crate_ray.training.prepare import absolute_paths, locate_run
    from crate_ray.training.profiling import ProfiledSteps
    from crate_ray.training.schedule import total_steps

    steps = ProfiledSteps.parse(text)
    config = absolute_paths(config)
    held = latest_checkpoint(locate_run(config))
    steps.check(done=held.step if held else 0, total=total_steps(config, load_source(config.data.source).num_samples))
    return steps


def exit_code(outcome: "RunOutcome") -> int:
    """0 finished, 128 + the signal that stopped it, 1 for any other end."""
    if outcome.state == "FINISHED":
        return 0
    return 1 if outcome.signal is None or outcome.state == "FAILED" else 128 + outcome.signal
