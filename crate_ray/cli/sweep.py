"""`crate-ray sweep`: many trials through Ray Tune; the same command again resumes them."""

from typing import TYPE_CHECKING, Annotated

import typer

from crate_ray.cli.arguments import Json
from crate_ray.cli.output import print_json
from crate_ray.config import ConfigError, SweepConfig

if TYPE_CHECKING:
    from crate_ray.analysis.sweep_findings import SweepFindings
    from crate_ray.launch.sweeps.driver import SweepOutcome


def sweep(
    file: Annotated[str, typer.Argument(metavar="SWEEP.yaml", help="A sweep file; with --coord-check also a recipe.")],
    overrides: Annotated[
        list[str],
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a key of the sweep (budget.trials=4) or of its runs (train.steps=100)."
        ),
    ] = [],  # noqa: B006  typer reads the default
    smoke: Annotated[bool, typer.Option("--smoke", help="Take the file's own small size.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would run and what it would cost; write nothing.")
    ] = False,
    no_measure: Annotated[
        bool, typer.Option("--no-measure", help="With --dry-run: do not time training steps on this machine.")
    ] = False,
    coord_check: Annotated[
        bool,
        typer.Option(
            "--coord-check",
            help="Only measure how coordinate changes grow with width, standard and muP. Not passing is a finding: exit 0.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Sweep depth, width, mask ratio and other keys with Ray Tune; the same command again resumes the sweep."""
    _check_modes(dry_run=dry_run, no_measure=no_measure, coord_check=coord_check)
    if coord_check:
        from crate_ray.cli.sweep_coordinates import check_coordinates

        check_coordinates(file, overrides, smoke=smoke, as_json=as_json)
        return
    config = SweepConfig.load(file, overrides, smoke=smoke)
    if dry_run:
        from crate_ray.cli.sweep_plan import plan

        plan(config, measure=not no_measure, as_json=as_json)
        return
    _run(config, as_json=as_json)


def _check_modes(*, dry_run: bool, no_measure: bool, coord_check: bool) -> None:
    if dry_run and coord_check:
        raise ConfigError("--dry-run and --coord-check are two questions; ask one at a time")
    if no_measure and not dry_run:
        raise ConfigError("--no-measure leaves the timing out of a --dry-run; give it together with --dry-run")


def _run(config: SweepConfig, *, as_json: bool) -> None:
    from crate_ray.analysis.sweep_findings import sweep_findings
    from crate_ray.cli.sweep_result import print_end, print_findings, summarise
    from crate_ray.cli.sweep_study import SweepStudy

    with SweepStudy(config) as study:
        outcome = study.run()
        report = study.report(outcome.folder)
    findings = sweep_findings(config, outcome.rows)
    summary = summarise(outcome, findings, {"report": report, **study.links()})
    if as_json:
        print_json(summary)
    else:
        print_findings(findings)
        print_end(outcome, summary)
    raise typer.Exit(exit_code(outcome, findings))


def exit_code(outcome: "SweepOutcome", findings: "SweepFindings") -> int:
    """0 done, 128 + the signal that stopped it, 1 for any other end, such as an arm without a finished trial."""
    if outcome.state != "FINISHED":
        return 1 if outcome.signal is None or outcome.state == "FAILED" else 128 + outcome.signal
    finished = {row.arm for row in outcome.rows if row.state == "FINISHED"}
    return 0 if finished >= set(findings.sweep.arms or findings.arms) and finished else 1
