"""`crate-ray data`: write shards, index those of others, audit them, and show which rank reads which sample.

In: sources and folders of shards. Out: shards with their index, or tables about them. `plan` has a module of its own.
"""

import shlex
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from crate_ray import storage
from crate_ray.cli.arguments import Json
from crate_ray.cli.output import console, print_json, print_table
from crate_ray.cli.plan import plan
from crate_ray.cli.progress import count_progress
from crate_ray.config import ConfigError, DataConfig
from crate_ray.data.findings import by_kind, counted, first_of

if TYPE_CHECKING:
    from crate_ray.data import Audit, BuildSummary, IndexSummary, ShardIndex, TaskMap

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Write, index, audit and inspect shards of images.")

Shards = Annotated[
    str, typer.Argument(metavar="URL", help="Folder of *.tar, one shard, or a pattern: 'in-{0000..0123}.tar', 'part-*.tar'.")
]
LabelField = Annotated[str | None, typer.Option(help="Field of KEY.json that holds the label; by default KEY.cls, then label.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes of this machine, one shard each at a time.")]
Parallel = Annotated[bool, typer.Option("--parallel", help="One task a shard on the Ray cluster.")]

_MAX_PIXELS: int = DataConfig.model_fields["max_pixels"].default
_RECIPES = {"imagenet": "imagenet_crate_mae_base"}
_SHOWN_FIELDS = 20
_DEFAULT_RECIPE = "digits_crate_mae"
_DEFAULT_PLACE = ("digits", "data/digits")  # what that recipe reads without being told


@app.command("build")
def build(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="digits, photos, shapes:N, folder:DIR or imagenet:DIR.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL of the data set.")],
    seed: Annotated[int, typer.Option(min=0, help="Decides the split, the order and what is drawn at random.")] = 0,
    image_size: Annotated[int | None, typer.Option(min=8, help="Side in pixels; shapes only.")] = None,
    num_classes: Annotated[int | None, typer.Option(min=2, help="Number of classes; shapes only.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; by default one a core for large sources.")] = None,
    as_json: Json = False,
) -> None:
    """Write a source as shards and index. The same command again continues, or returns at once."""
    from crate_ray.data import build_source, load_index

    with count_progress("images") as progress:
        summary = build_source(
            source, out, seed=seed, image_size=image_size, num_classes=num_classes, workers=workers, progress=progress
        )
    splits = {split: _describe(load_index(storage.join(out, split))) for split in summary.counts}
    if as_json:
        print_json({"out": out, "source": source, "reused": summary.reused, "classes": summary.classes, "splits": splits})
        return
    if summary.reused:
        console.print(f"{escape(out)} holds this data set already; nothing was written", soft_wrap=True)
    print_table(
        ("split", "images", "shards", "MB", "classes"),
        [
            [split, f"{row['num_samples']:,}", str(row["num_shards"]), f"{row['bytes'] / 1e6:.1f}", str(row["num_classes"])]
            for split, row in splits.items()
        ],
    )
    console.print(f"next: {escape(_next_command(summary))}", soft_wrap=True)


@app.command("index")
def index(
    url: Shards,
    out: Annotated[str | None, typer.Option(help="Folder of the index; by default the shards' own.")] = None,
    num_classes: Annotated[int | None, typer.Option(min=1, help="By default the largest label plus one.")] = None,
    label_field: LabelField = None,
    skip_damaged: Annotated[bool, typer.Option("--skip-damaged", help="Leave out what is damaged, and count it.")] = False,
    workers: Workers = 1,
    parallel: Parallel = False,
    as_json: Json = False,
) -> None:
    """Index shards that anyone wrote. The same command again continues an interrupted indexing."""
    from crate_ray.data import DamagedDataError, build_index

    try:
        with count_progress("shards") as progress:
            found = build_index(
                url,
                out=out,
                num_classes=num_classes,
                label_field=label_field,
                skip_damaged=skip_damaged,
                task_map=_task_map(workers, parallel),
                progress=lambda done, total, samples: progress(done, total, f"{samples:,} samples"),
            )
    except DamagedDataError as error:
        if as_json:
            print_json({"url": url, "ok": False, "findings": [finding.as_dict() for finding in error.findings]})
        raise
    if as_json:
        print_json({**asdict(found), "ok": True, "findings": [finding.as_dict() for finding in found.findings]})
    else:
        _print_summary(found)


@app.command("verify")
def verify(
    url: Shards,
    max_pixels: Annotated[int, typer.Option(min=1, help="data.max_pixels of the run.")] = _MAX_PIXELS,
    decode: Annotated[bool, typer.Option("--decode/--no-decode", help="Decode every image, or read headers only.")] = True,
    label_field: LabelField = None,
    workers: Workers = 1,
    parallel: Parallel = False,
    as_json: Json = False,
) -> None:
    """Read all shards and report everything that is wrong.

    They are compared with their index where there is one. Exit code 1 when something is wrong.
    """
    from crate_ray.data import verify_shards

    started = time.monotonic()
    with count_progress("shards") as progress:
        audit = verify_shards(
            url,
            max_pixels=max_pixels,
            decode=decode,
            label_field=label_field,
            task_map=_task_map(workers, parallel),
            progress=lambda done, total, samples: progress(done, total, f"{samples:,} samples"),
        )
    seconds = time.monotonic() - started
    if as_json:
        findings = [finding.as_dict() for finding in audit.findings]
        print_json({**asdict(audit), "ok": not findings, "seconds": round(seconds, 3), "findings": findings})
    else:
        _print_audit(audit, seconds)
    if audit.findings:
        raise typer.Exit(1)


app.command("plan")(plan)


def _task_map(workers: int, parallel: bool) -> "TaskMap":
    """Who reads the shards."""
    if not parallel:
        from crate_ray.data import map_with

        return map_with(workers)
    if workers > 1:
        raise ConfigError("--workers and --parallel exclude each other; with --parallel the Ray cluster decides")
    from crate_ray.launch.indexing import map_on_cluster

    return map_on_cluster


def _print_summary(found: "IndexSummary") -> None:
    classes = counted(found.num_classes, "class", "classes")
    labels = f"{found.num_labelled:,} labelled, {classes}" if found.num_labelled else "no labels"
    console.print(f"{counted(found.num_samples, 'image')} in {counted(found.num_shards, 'shard')}, {labels}", soft_wrap=True)
    if found.json_fields:
        seen = escape(
            ", ".join(found.json_fields[:_SHOWN_FIELDS]) + (", ..." if len(found.json_fields) > _SHOWN_FIELDS else "")
        )
        console.print(f"labels in the member json? index again with --label-field FIELD (fields seen: {seen})", soft_wrap=True)
    if found.resumed_shards:
        were, are = ("was", "is") if found.resumed_shards == 1 else ("were", "are")
        shards = counted(found.resumed_shards, "shard")
        console.print(f"{shards} {were} read before and {are} not read again", soft_wrap=True)
    if found.left_out_shards or found.left_out_samples:
        samples = counted(found.left_out_samples, "sample")
        left_out = f"left out: {counted(found.left_out_shards, 'shard')}, and {samples} of the others"
        console.print(f"{left_out}; `crate-ray data verify` lists them", soft_wrap=True)
    console.print(f"digest {found.digest}", soft_wrap=True)


def _print_audit(audit: "Audit", seconds: float) -> None:
    is_piped = not console.is_terminal
    for fault, found in by_kind(audit.findings).items():
        console.print(f"[bold]{fault}[/bold], {counted(len(found), 'fault')}; {escape(found[0].fix)}", soft_wrap=is_piped)
        shown, more = first_of(found)
        for finding in shown:
            console.print(f"  {escape(finding.place)}: {escape(finding.what)}", soft_wrap=is_piped)
        if more:
            console.print(f"  and {more:,} more; --json gives all of them")
    how = "every image decoded" if audit.decoded else "of images only the headers read"
    against = "compared with the index" if audit.indexed else "no index to compare with"
    console.print(
        f"{counted(len(audit.findings), 'fault')} in {counted(audit.num_samples, 'sample')} of "
        f"{counted(audit.num_shards, 'shard')}, {how}, {against}; "
        f"{audit.bytes / 1e6:,.1f} MB in {seconds:.1f} s",
        soft_wrap=is_piped,
    )


def _describe(index: "ShardIndex") -> dict[str, Any]:
    return {
        "num_samples": index.num_samples,
        "num_shards": len(index.shard_names),
        "bytes": sum(index.shards["bytes"].to_pylist()),
        "num_classes": index.num_classes,
        "num_labelled": int((index.labels >= 0).sum()),
        "digest": index.digest,
    }


def _next_command(summary: "BuildSummary") -> str:
    """The command that trains on what was built; digits in the place that the recipe names need no overrides."""
    kind = summary.source.partition(":")[0]
    recipe = _RECIPES.get(kind, _DEFAULT_RECIPE)
    command = ["crate-ray", "train", recipe]
    if (summary.source, summary.out.rstrip("/")) == _DEFAULT_PLACE:
        return shlex.join(command)
    for key, split in (("train", "train"), ("eval", "validation"), ("test", "test")):
        value = storage.join(summary.out, split) if split in summary.counts else "null"
        command += ["--set", f"data.{key}={value}"]
    if recipe == _DEFAULT_RECIPE and kind != "digits":  # the recipe's model on other pictures: under their name, and augmented
        command += ["--set", f"recipe={kind}", "--set", "data.augment=random_resized_crop"]
    return shlex.join(command)
