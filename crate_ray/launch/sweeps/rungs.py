"""The legs of a trial whose rungs are judged on cooled branches.

In: a trial's configuration with a constant rate and a cooldown, and the rungs of its scheduler. Out: one run folder a rung,
`rung_NNNNNNNN` below the trial's, each trained to its own end with its own cooldown; the last is the trial's folder itself. A
leg goes on from the checkpoint where the cooldown of the one before began, and until there runs of any length are the same.
The price is the cooldowns, of all rungs but the last; in return a rung compares runs that have come to an end.
"""

from dataclasses import dataclass

from crate_ray.config import RunConfig, SchedulerConfig
from crate_ray.runs import RunFolder
from crate_ray.space.expected_steps import rungs
from crate_ray.training.checkpoint import (
    copy_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    prune_checkpoints,
    unpin_checkpoint,
)
from crate_ray.training.schedule import cooldown_start, total_steps, warmup_steps


@dataclass(frozen=True)
class Leg:
    """A run on the way of a trial.

    Attributes:
        folder: Of the run.
        config: Of the run.
        total_steps: At its end.
        cooldown: See `cooldown_start`.
    """

    folder: RunFolder
    config: RunConfig
    total_steps: int
    cooldown: int | None


def is_cooled(config: RunConfig, scheduler: SchedulerConfig) -> bool:
    """Whether the rungs of a trial are judged on cooled branches."""
    return scheduler.type == "asha" and config.schedule.cooldown_fraction is not None


def legs_of(config: RunConfig, folder: RunFolder, scheduler: SchedulerConfig, *, num_samples: int) -> list[Leg]:
    """The runs of a trial, in order; a single one where its rungs are not cooled.

    Args:
        config: Of the whole trial.
        folder: Of the whole trial.
        scheduler: Of its sweep.
        num_samples: Of its training data.
    """
    total, warmup = total_steps(config, num_samples), warmup_steps(config, num_samples)
    legs = [Leg(folder, config, total, cooldown_start(config, num_samples))]
    if not is_cooled(config, scheduler):
        return legs
    for steps in reversed(rungs(scheduler.grace_steps or 1, scheduler.reduction_factor, total)):
        train = config.train.model_copy(update={"steps": steps, "epochs": None})
        # A warm-up that is a share of the length would make the branches part at once.
        schedule = config.schedule.model_copy(update={"warmup_steps": warmup, "warmup_epochs": None})
        branch = config.model_copy(update={"train": train, "schedule": schedule})
        run = RunFolder(folder.path(f"rung_{steps:08d}"))
        legs.insert(0, Leg(run, branch, steps, cooldown_start(branch, num_samples)))
    return legs


def branch_off(before: Leg, leg: Leg) -> None:
    """Starts a leg where the cooldown of the one before began; from nothing where that never came to its cooldown.

    Args:
        before: Finished.
        leg: Does nothing where this one has a checkpoint.
    """
    if latest_checkpoint(leg.folder) is not None:
        return
    for checkpoint in list_checkpoints(before.folder):
        if checkpoint.step == before.cooldown:
            copy_checkpoint(checkpoint, leg.folder)
            unpin_checkpoint(before.folder, checkpoint.step, by="cooldown")
    prune_checkpoints(before.folder, keep_last=1)
