"""`crate-ray train`: one run through Ray Train; the same command again resumes it."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from crate_ray.cli.arguments import Json, Set
from crate_ray.cli.output import console, print_json, print_table
from crate_ray.config import RunConfig, dump_yaml, recipe_names

if TYPE_CHECKING:
    from crate_ray.launch.train import RunOutcome


def train(
    recipe: Annotated[str, typer.Argument(help=f"A recipe ({', '.join(recipe_names())}), or the path of a .yaml file.")],
    overrides: Set = [],  # noqa: B006  typer reads the default
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would run, check the data and the name, start nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Pretrain, classify or fine-tune (train.init_from) one model with Ray Train; the same command again resumes the run."""
    config = RunConfig.load(recipe, overrides)
    if dry_run:
        plan(config, as_json=as_json)
        return
    from crate_ray.cli.study import Study

    with Study(config) as study:
        outcome = study.train(config)
    summary = summarise(outcome, study.links())
    if as_json:
        print_json(summary)
    else:
        _print(summary)
    raise typer.Exit(exit_code(outcome))


def exit_code(outcome: "RunOutcome") -> int:
    """0 finished, 128 + the signal that stopped it, 1 for any other end."""
    if outcome.state == "FINISHED":
        return 0
    return 1 if outcome.signal is None or outcome.state == "FAILED" else 128 + outcome.signal


def summarise(outcome: "RunOutcome", links: dict[str, Any]) -> dict[str, Any]:
    """What a program wants to know of a run that ended."""
    final = outcome.folder.read_json("final.json") or {"values": {}}
    return {
        "run": outcome.folder.name,
        "folder": outcome.folder.uri,
        "state": outcome.state,
        "reason": outcome.reason,
        "was_finished": outcome.was_finished,
        "final": {key.removeprefix("final/"): value for key, value in final["values"].items()},
        "link": links["runs"].get(outcome.folder.name),
    }


def _print(summary: dict[str, Any]) -> None:
    state = f"{summary['state']} ({summary['reason']})" if summary["reason"] else summary["state"]
    if summary["state"] == "KILLED":
        state += "; the same command goes on from there"
    if summary["was_finished"]:
        state += " before; nothing was run. Its result:"
    console.print(f"{summary['run']}: {state}", soft_wrap=True)
    if summary["final"]:
        print_table(("final", "value"), [(key, f"{value:g}") for key, value in sorted(summary["final"].items())])
    console.print(f"folder  {summary['folder']}", soft_wrap=True)
    root = summary["folder"].removesuffix(f"/{summary['run']}")
    if summary["state"] == "FINISHED":
        console.print(f"next    crate-ray probe {summary['folder']}", soft_wrap=True)
    if summary["link"]:
        console.print(f"MLflow  crate-ray tracking ui {root}\n        then {summary['link']}", soft_wrap=True)


def plan(config: RunConfig, *, as_json: bool) -> None:
    """Prints what a run would be; reads the data's index and writes nothing."""
    import math

    from crate_ray.data import load_source
    from crate_ray.models.cost import count_parameters, training_flops_per_image
    from crate_ray.training.prepare import absolute_paths, locate_run
    from crate_ray.training.schedule import total_steps, warmup_steps

    config = absolute_paths(config)
    folder = locate_run(config)
    samples = load_source(config.data.source).num_samples
    steps = total_steps(config, samples)
    mix = _plan_mix(config, steps * config.train.global_batch)
    rows = math.ceil(config.train.global_batch / config.scale.num_workers)
    parameters = count_parameters(config.model)
    flops = training_flops_per_image(config.model)
    facts = {
        "run": folder.name,
        "folder": folder.uri,
        "task": config.task,
        **({"starts_from": config.train.init_from} if config.train.init_from else {}),
        "samples": samples,
        "steps": steps,
        "epochs": round(steps * config.train.global_batch / samples, 2),
        "warmup_steps": warmup_steps(config, samples),
        "peak_lr": config.optimizer.peak_lr(config.train.global_batch),
        "workers": config.scale.num_workers,
        "batch_per_worker": rows,
        "micro_batches": math.ceil(rows / (config.train.micro_batch or rows)),
        "params_trainable": parameters.trainable,
        "params_encoder": parameters.encoder,
        "training_gflops_per_image": float(f"{flops / 1e9:.4g}"),
        "training_pflops_in_all": float(f"{flops * steps * config.train.global_batch / 1e15:.4g}"),
    }
    if as_json:
        print_json({**facts, **({"mix": mix} if mix else {}), "config": config.model_dump(mode="json")})
        return
    shown = [(key, f"{value:,}" if isinstance(value, int) else escape(str(value))) for key, value in facts.items()]
    print_table(("key", "value"), shown)
    if mix:
        print_table(
            ("data set", "images", "share", "epochs"),
            [(escape(row["train"]), f"{row['samples']:,}", f"{row['share']:.4f}", f"{row['epochs']:.2f}") for row in mix],
        )
    console.print(dump_yaml(config), soft_wrap=True, markup=False)


def _plan_mix(config: RunConfig, images: int) -> list[dict[str, Any]]:
    """What a run of so many images reads of each data set of its mix; nothing of a run without a mix."""
    from crate_ray.data import load_index

    parts = config.data.mix or ()
    total = sum(part.weight for part in parts)
    sizes = [load_index(part.train).num_samples for part in parts]
    return [
        {"train": part.train, "samples": size, "share": part.weight / total, "epochs": images * part.weight / total / size}
        for part, size in zip(parts, sizes, strict=True)
    ]
