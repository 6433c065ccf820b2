"""Length and learning rate of a run, as pure functions of the step."""

import math

from crate_ray.config import RunConfig


def total_steps(config: RunConfig, num_samples: int) -> int:
    """Optimizer steps of the run; epochs are counted in images seen, rounded up to a whole step."""
    steps = config.train.num_steps(num_samples)
    assert steps is not None
    return steps


def warmup_steps(config: RunConfig, num_samples: int) -> int:
    """Steps of linear warm-up; 5% of the run where the recipe names none."""
    schedule = config.schedule
    if schedule.warmup_steps is not None:
        return schedule.warmup_steps
    if schedule.warmup_epochs is not None:
        return round(schedule.warmup_epochs * num_samples / config.train.global_batch)
    return total_steps(config, num_samples) // 20


def cooldown_start(config: RunConfig, num_samples: int) -> int | None:
    """The number of the first update of the cooldown, counted from 0; None where the rate follows a half cosine.

    Up to this update, runs that differ in their length alone are the same, if their warm-up is of equal length.
    """
    fraction = config.schedule.cooldown_fraction
    if fraction is None:
        return None
    total = total_steps(config, num_samples)
    return max(warmup_steps(config, num_samples), total - max(1, round(fraction * total)))


def describe_rate(config: RunConfig, num_samples: int) -> str:
    """In a sentence: the peak, which rule made it, and the course of the rate."""
    optimizer, schedule, batch = config.optimizer, config.schedule, config.train.global_batch
    rule = "optimizer.lr, absolute: the batch does not scale it"
    if optimizer.base_lr is not None:
        rule = f"the linear scaling rule: optimizer.base_lr {optimizer.base_lr:g} x train.global_batch {batch} / 256"
    total, start = total_steps(config, num_samples), cooldown_start(config, num_samples)
    course = f"a half cosine to step {total:,}" if start is None else f"held to step {start:,}, a linear cooldown to {total:,}"
    return (
        f"learning rate {optimizer.peak_lr(batch):g} at its peak by {rule}; warm-up over {warmup_steps(config, num_samples):,} "
        f"steps, then {course}, ending at {schedule.final_lr_fraction:g} of the peak; {optimizer.name or 'adamw'}"
    )


def learning_rate(
    step: int, *, total: int, warmup: int, peak: float, final_fraction: float = 0.0, cooldown: int | None = None
) -> float:
    """Learning rate of the update number `step`, counted from 0.

    Linear from peak / warmup to the peak. Then a half cosine that reaches peak * final_fraction after the last
    update; or the peak is held, and from `cooldown` on falls linearly to the same.

    Args:
        step: Update number, 0 <= step < total.
        total: Updates of the run.
        warmup: Updates of warm-up.
        peak: Rate after warm-up.
        final_fraction: Share of the peak at the end.
        cooldown: See `cooldown_start`.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if cooldown is not None:
        cooled = max(0, step - cooldown) / max(1, total - cooldown)
        return peak * (1 - (1 - final_fraction) * cooled)
    progress = (step - warmup) / max(1, total - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * (final_fraction + (1 - final_fraction) * cosine)
