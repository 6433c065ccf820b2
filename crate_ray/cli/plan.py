"""`crate-ray data plan`: which rank reads which sample at which step.

In: the index of a folder of shards and the sizes of a run. Out: a table of ranks, the keys of the first steps and what all
steps cover; or all keys as one JSON object. No shard is opened.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from crate_ray.cli.arguments import Json
from crate_ray.cli.output import console, print_json, print_table
from crate_ray.config import ConfigError, DataConfig, ScaleConfig, TrainConfig
from crate_ray.data.findings import counted

if TYPE_CHECKING:
    from crate_ray.data.index import ShardIndex
    from crate_ray.data.plan import Coverage, EpochStart, Plan, RankReads

# A run has no default for this one; it is that of the recipes on embedded data.
_GLOBAL_BATCH = 128
_SHOWN_RANKS = 32
_SHOWN_ROWS = 24
_SHOWN_EPOCHS = 4
_NO_TERMINAL_COLUMNS = 200
_HEADER = f"{'step':<8} {'rank':>5} {'epoch':>7} {'shards':>7}  keys"
_LEAST_FOR_KEYS = 24

Url = Annotated[str, typer.Argument(metavar="URL", help="Folder or URL of one split: shards with their index.")]
WorldSize = Annotated[int, typer.Option("--world-size", min=1, help="scale.num_workers of the run.")]
GlobalBatch = Annotated[int, typer.Option("--global-batch", min=1, help="train.global_batch: images a step, over all workers.")]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Steps to plan.")]
StartStep = Annotated[int | None, typer.Option("--start-step", min=0, help="First step; all before it had this global batch.")]
Cursor = Annotated[int | None, typer.Option("--cursor", min=0, help="Or: images consumed before, over all epochs.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="train.seed of the run.")]
Lanes = Annotated[int, typer.Option("--lanes", min=1, max=2**31 - 1, help="data.lanes of the run.")]
Window = Annotated[int, typer.Option("--window", min=1, max=2**31 - 1, help="data.window of the run.")]


@dataclass(frozen=True)
class _Report:
    """A plan and what it adds up to."""

    index: "ShardIndex"
    plan: "Plan"
    ranks: "list[RankReads]"
    coverage: "Coverage"
    epoch_starts: "list[EpochStart]"


def plan(
    url: Url,
    world_size: WorldSize = ScaleConfig.model_fields["num_workers"].default,
    global_batch: GlobalBatch = _GLOBAL_BATCH,
    steps: Steps = 1,
    start_step: StartStep = None,
    cursor: Cursor = None,
    seed: Seed = TrainConfig.model_fields["seed"].default,
    lanes: Lanes = DataConfig.model_fields["lanes"].default,
    window: Window = DataConfig.model_fields["window"].default,
    as_json: Json = False,
) -> None:
    """Show which rank reads which sample at which step."""
    from crate_ray.data.index import load_index
    from crate_ray.data.order import SampleOrder
    from crate_ray.data.plan import epoch_starts, measure_coverage, measure_rank, plan_steps

    if start_step is not None and cursor is not None:
        raise ConfigError("--start-step and --cursor both say where the plan begins; give one of them")
    begin = cursor if cursor is not None else (start_step or 0) * global_batch
    index = load_index(url)
    order = SampleOrder(index.shard_sizes, seed=seed, lanes=lanes, window=window)
    planned = plan_steps(order, world_size=world_size, global_batch_size=global_batch, steps=steps, cursor=begin)
    sizes = index.column("size")
    report = _Report(
        index,
        planned,
        [measure_rank(planned, rank, shard_of=index.shard_of, num_bytes_of=sizes) for rank in range(world_size)],
        measure_coverage(planned, num_samples=index.num_samples),
        epoch_starts(planned, num_samples=index.num_samples),
    )
    settings = {"seed": seed, "lanes": lanes, "window": window, "world_size": world_size, "global_batch": global_batch}
    if as_json:
        print_json({"url": url, "digest": index.digest, **settings, "cursor": begin, **_as_json(report)})
    else:
        _print(report, settings, start_step=start_step)


def _as_json(report: _Report) -> dict[str, Any]:
    names = report.index.shard_names
    ranks = [
        {
            "rank": rank,
            "images": reads.images,
            "bytes": reads.num_bytes,
            "padding": reads.padding,
            "duplicates_within_an_epoch": reads.duplicates_within_an_epoch,
            "shards": [names[shard] for shard in reads.shards],
        }
        for rank, reads in enumerate(report.ranks)
    ]
    return {
        "coverage": {**asdict(report.coverage), **_shards_touched(report)},
        "epoch_starts": [asdict(start) for start in report.epoch_starts],
        "ranks": ranks,
        "steps": _steps_as_json(report),
    }


def _shards_touched(report: _Report) -> dict[str, int]:
    import numpy as np

    shards_SB = report.index.shard_of[report.plan.sample_ids_SB]
    return {
        "shards_touched": len(np.unique(shards_SB)),
        "num_shards": len(report.index.shard_names),
        "most_shards_in_a_step": max(len(np.unique(shards)) for shards in shards_SB),
    }


def _steps_as_json(report: _Report) -> list[dict[str, Any]]:
    import numpy as np

    plan, index = report.plan, report.index
    keys = index.samples["key"].take(plan.sample_ids_SB.ravel()).to_pylist()
    names, size = index.shard_names, plan.cursors.step
    steps = []
    for step, cursor in enumerate(plan.cursors):
        ids, epochs = plan.sample_ids_SB[step], plan.epochs_SB[step]
        ranks = [
            {
                "rank": rank,
                "keys": keys[step * size + share.start : step * size + share.stop],
                "sample_ids": ids[share.start : share.stop].tolist(),
                "epochs": epochs[share.start : share.stop].tolist(),
                "shards": [names[shard] for shard in np.unique(index.shard_of[ids[share.start : share.stop]])],
                "padding": share.padded - (share.stop - share.start),
            }
            for rank, share in enumerate(plan.shares)
        ]
        steps.append({"step": step, "cursor": cursor, "ranks": ranks})
    return steps


def _print(report: _Report, settings: dict[str, int], *, start_step: int | None) -> None:
    plan, coverage = report.plan, report.coverage
    first, num_steps = start_step or 0, len(plan.cursors)
    images, shards = counted(coverage.num_samples, "image"), counted(len(report.index.shard_names), "shard")
    console.print(
        f"{images} in {shards}; seed {settings['seed']}, {counted(settings['lanes'], 'lane')}, windows of {settings['window']}",
        soft_wrap=True,
    )
    console.print(
        f"{counted(num_steps, 'step')} of {counted(plan.cursors.step, 'image')} on {counted(len(plan.shares), 'rank')}, "
        f"from cursor {plan.cursors.start:,} to {plan.cursors.stop:,}\n",
        soft_wrap=True,
    )
    _print_ranks(report)
    _print_steps(report, first)
    for start in report.epoch_starts[:_SHOWN_EPOCHS]:
        after = f", after {counted(start.rows_before, 'image')} of its batch" if start.rows_before else ""
        console.print(f"epoch {start.epoch} begins in step {first + start.step}{after}", soft_wrap=True)
    if len(report.epoch_starts) > _SHOWN_EPOCHS:
        console.print(f"... and {len(report.epoch_starts) - _SHOWN_EPOCHS} more epochs begin")
    touched = _shards_touched(report)
    console.print(
        f"{counted(coverage.reads, 'read')} of {coverage.distinct_samples:,} different images, "
        f"{coverage.distinct_samples / coverage.num_samples:.1%} of all; "
        f"{coverage.duplicates_within_an_epoch} read twice in one epoch; {touched['shards_touched']} of "
        f"{counted(touched['num_shards'], 'shard')} touched, at most {touched['most_shards_in_a_step']} in a step",
        soft_wrap=not console.is_terminal,
    )


def _print_ranks(report: _Report) -> None:
    rows = [
        [
            str(rank),
            f"{reads.images:,}",
            str(reads.duplicates_within_an_epoch),
            f"{reads.images / report.coverage.num_samples:.1%}",
            f"{reads.num_bytes / 1e6:,.1f}",
            f"{len(reads.shards):,}",
            f"{reads.padding:,}",
        ]
        for rank, reads in enumerate(report.ranks[:_SHOWN_RANKS])
    ]
    print_table(("rank", "images", "duplicates", "of the set", "MB", "shards", "padding"), rows)
    if len(report.ranks) > _SHOWN_RANKS:
        console.print(f"... and {counted(len(report.ranks) - _SHOWN_RANKS, 'more rank')}; --json gives all of them")
    console.print()


def _print_steps(report: _Report, first: int) -> None:
    """Keys of the first steps: as many whole ones as the terminal has room for."""
    import numpy as np

    plan, index = report.plan, report.index
    columns = console.width if console.is_terminal else _NO_TERMINAL_COLUMNS
    room = max(_LEAST_FOR_KEYS, columns - len(_HEADER.removesuffix("keys")))
    total = len(plan.cursors) * len(plan.shares)
    console.print(f"[bold]{_HEADER}[/bold]", soft_wrap=True)
    for number in range(min(total, _SHOWN_ROWS)):
        step, rank = divmod(number, len(plan.shares))
        ids = plan.of_rank(rank)[step]
        epochs = plan.epochs_SB[step, plan.shares[rank].start : plan.shares[rank].stop]
        span = f"{epochs.min()}" if epochs.min() == epochs.max() else f"{epochs.min()}-{epochs.max()}"
        keys = _fitting(index.samples["key"].take(ids[:room]).to_pylist(), len(ids), room)
        shards = len(np.unique(index.shard_of[ids]))
        console.print(f"{first + step:<8} {rank:>5} {span:>7} {shards:>7}  {escape(keys)}", soft_wrap=True)
    if total > _SHOWN_ROWS:
        console.print(f"... {total - _SHOWN_ROWS:,} more rows; --json gives all of them with every key")
    console.print()


def _fitting(keys: list[str], num_keys: int, room: int) -> str:
    """The keys that fit into `room` columns, and how many more there are; the first one is cut if it must be."""
    shown, used = 0, 0
    for key in keys:
        rest = len(f" +{num_keys - shown - 1}") if shown + 1 < num_keys else 0
        if used + len(key) + rest > room:
            break
        used += len(key) + 1
        shown += 1
    if shown == 0:
        more = f" +{num_keys - 1}" if num_keys > 1 else ""
        return keys[0][: room - len(more) - 1] + "…" + more
    return " ".join(keys[:shown]) + (f" +{num_keys - shown}" if num_keys > shown else "")
