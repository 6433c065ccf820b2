"""The screen of `crate-ray train --dry-run`: a section a line or two, checks at the end.

In: the facts that `dry_run` found. Out: standard output, folded beside the names of its sections on a terminal. Whatever is
shown stands in the facts too, so that `--json` says the same.
"""

import sys
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from rich.markup import escape

from crate_ray.cli.checks import Check
from crate_ray.cli.output import console, print_table
from crate_ray.cli.progress import plural
from crate_ray.cli.study import workers_in_words
from crate_ray.config import RunConfig
from crate_ray.storage import bytes_in_words

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
_LABEL = 13  # columns of the names of sections

Facts = Mapping[str, Any]


def print_plan(config: RunConfig, facts: Facts, rows: Iterable[Check]) -> None:
    """The screen of a dry run.

    Args:
        config: With absolute paths.
        facts: As the JSON object has them.
        rows: What was checked.
    """
    console.print(f"[bold]{escape(facts['run'])}[/bold]  {_standing(facts)}", soft_wrap=True)
    for name, lines in _sections(config, facts).items():
        for number, line in enumerate(lines):
            _print_line(name if number == 0 else "", line)
    if "mix" in facts:
        _print_mix(facts["mix"])
    for row in rows:
        fix = f"; {row.fix}" if row.fix else ""
        _print_line(row.name, f"{row.state}: {row.found}{fix}", colour=_COLOURS[row.state])
    _print_line("", "--json: the same, and every key of the configuration")


def _print_line(name: str, text: str, *, colour: str = "default") -> None:
    """A name and its text, folded beside the name on a terminal, one line elsewhere."""
    width = max(_LABEL, console.width - _LABEL) if console.is_terminal else sys.maxsize
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    body = f"\n{'':<{_LABEL}}".join(lines)
    console.print(f"[bold]{name:<{_LABEL}}[/bold][{colour}]{escape(body)}[/{colour}]", soft_wrap=True)


def _standing(facts: Facts) -> str:
    if facts["is_finished"]:
        return "has finished: the command would print its result"
    step = facts["resumes_from_step"]
    return "would start" if step is None else f"would go on from step {step:,} of {facts['steps']:,}"


def _sections(config: RunConfig, facts: Facts) -> dict[str, list[str]]:
    return {
        "data": _data_lines(config, facts),
        "schedule": [_schedule_line(config, facts)],
        "model": [_model_line(config, facts)],
        "workers": [_workers_line(config, facts)],
        "memory": _memory_lines(facts),
        "compute": [
            f"{facts['training_gflops_per_image']:g} GFLOPs an image, {facts['training_pflops_in_all']:,g} PFLOPs in all",
            _hours_line(config, facts),
        ],
        "checkpoints": [_checkpoint_line(config, facts)],
        "writes": [f"{what}: {where}" for what, where in facts["writes"].items()],
    }


def _data_lines(config: RunConfig, facts: Facts) -> list[str]:
    judged = {"validation": config.data.eval, "test": config.data.test}
    return [
        f"{facts['samples']:,} images: {', '.join(config.data.train_urls)}",
        *(f"{name}: {url}" for name, url in judged.items() if url is not None),
    ]


def _schedule_line(config: RunConfig, facts: Facts) -> str:
    rate = config.optimizer
    rule = "absolute" if rate.lr is not None else f"{rate.base_lr:g} x {config.train.global_batch} / 256"
    return (
        f"{facts['steps']:,} steps of {config.train.global_batch:,} images, {facts['epochs']:,g} epochs; peak learning rate "
        f"{facts['peak_lr']:g} ({rule}) after {facts['warmup_steps']:,} steps"
    )


def _model_line(config: RunConfig, facts: Facts) -> str:
    start = f", from {facts['starts_from']}" if "starts_from" in facts else ""
    return (
        f"{config.model.family}, {facts['params_trainable']:,} parameters, {facts['params_encoder']:,} of them in the encoder; "
        f"{facts['task']}, {facts['precision']}{start}"
    )


def _workers_line(config: RunConfig, facts: Facts) -> str:
    micro, rows = facts["micro_batches"], facts["batch_per_worker"]
    accumulation = f"in {micro} micro-batches of {config.train.micro_batch}" if micro > 1 else "at once, no accumulation"
    who = f"{workers_in_words(config.scale)} ({facts['device']}, {facts['parallel']})"
    return f"{who}, each {plural(rows, 'image')} a step, {accumulation}"


def _memory_lines(facts: Facts) -> list[str]:
    held = {key: bytes_in_words(size) for key, size in facts["memory_bytes"].items()}
    return [
        f"{held['device']} on the device of a worker: {held['state']} weights, gradients and optimizer, {held['activations']} "
        "activations; temporaries not counted",
        f"on its host {held['batches_read_ahead']} batches read ahead and {held['checkpoint_copy']} for a checkpoint on its "
        "way; Python and torch not counted",
    ]


def _hours_line(config: RunConfig, facts: Facts) -> str:
    if facts["hours"] is None:
        return f"hours not known: no peak of a {facts['device']} is; give one worker's TFLOP/s: --set scale.peak_tflops=NUMBER"
    return (
        f"{facts['hours']:,.3g} h at an MFU of {facts['mfu']:.0%} of {facts['peak_tflops']:g} TFLOP/s on "
        f"{plural(config.scale.max_workers, 'worker')}; evaluation and waits not counted"
    )


def _checkpoint_line(config: RunConfig, facts: Facts) -> str:
    cadence = config.checkpoint
    every = [
        *([f"{cadence.every_steps:,} steps"] if cadence.every_steps else []),
        *([f"{cadence.every_minutes:g} minutes"] if cadence.every_minutes else []),
    ]
    when = f"every {' and every '.join(every)}, and at the end" if every else "at the end"
    return (
        f"{bytes_in_words(facts['checkpoint_bytes'])} each, {when}; {facts['checkpoints_kept']} kept, "
        f"{bytes_in_words(facts['checkpoint_bytes_in_all'])} while the next is written"
    )


def _print_mix(mix: Iterable[Facts]) -> None:
    print_table(
        ("data set", "images", "share", "epochs"),
        [(escape(row["train"]), f"{row['samples']:,}", f"{row['share']:.4f}", f"{row['epochs']:.2f}") for row in mix],
    )
