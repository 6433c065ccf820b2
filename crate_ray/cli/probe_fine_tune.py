"""`crate-ray probe --fine-tune`: the runs of a judgement by fine-tuning, one after the other; given again, it goes on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from crate_ray.cli.output import errors
from crate_ray.cli.study import Study
from crate_ray.cli.train import exit_code

if TYPE_CHECKING:
    from crate_ray.config import RunConfig
    from crate_ray.runs import RunFolder
    from crate_ray.training.probes import Subject


def fine_tune_all(subjects: "Sequence[Subject]", *, seeds: int, overrides: Sequence[str], workers: int | None) -> None:
    """Trains what is not finished yet, and writes what was found into the report of every run.

    Args:
        subjects: Whose encoders are trained on.
        seeds: Runs of each kind.
        overrides: `a.b=value` on top of the protocol.
        workers: Of each run; None for as many as the run itself had.

    Raises:
        ConfigError: A run is refused; before any is trained.
        typer.Exit: A run was stopped, or failed.
    """
    from crate_ray.training.probes import plan_fine_tunes, record_fine_tunes

    scale = [] if workers is None else [f"scale.num_workers={workers}"]
    plans = [plan_fine_tunes(subject, seeds=seeds, overrides=[*scale, *overrides]) for subject in subjects]
    for subject, plan in zip(subjects, plans, strict=True):
        with Study(plan.tuned[0]) as study:
            tuned = [_train(study, config, subject) for config in plan.tuned]
            control = [_train(study, config, subject) for config in plan.control]
        record_fine_tunes(subject, tuned, control, overrides=overrides)


def _train(study: Study, config: "RunConfig", subject: "Subject") -> "RunFolder":
    """One of the runs, of kind `probe`, so that no comparison takes it for a model of its own."""
    start = f"step {subject.checkpoint.step}" if config.train.init_from else "random weights"
    errors.print(f"[dim]{subject.folder.name}: fine-tuning from {start}, seed {config.train.seed} ...[/dim]", soft_wrap=True)
    meta = subject.folder.read_json("run_meta.json") or {}
    outcome = study.train(config, kind="probe", parent_uid=meta.get("run_uid"))
    if outcome.state != "FINISHED":
        errors.print(f"{outcome.folder.name}: {outcome.state}; the same command goes on from here", soft_wrap=True)
        raise typer.Exit(exit_code(outcome))
    return outcome.folder
