"""`crate-ray probe`: judge the features of finished runs beside their untrained controls, and draw what they see."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from crate_ray.cli.arguments import Json
from crate_ray.cli.output import console, errors, print_json, print_table

if TYPE_CHECKING:
    from crate_ray.runs import RunFolder


def probe(
    run_folders: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, as `crate-ray runs` lists them.")],
    test: Annotated[
        bool, typer.Option("--test", help="Judge on the test split: for final numbers, never to choose a configuration.")
    ] = False,
    pictures: Annotated[
        bool,
        typer.Option(
            "--pictures",
            help="Also draw reconstructions, attention, keys and layer-wise measures of validation images into RUN/pictures, "
            "and score emergence where the shards hold object masks. Needs no labels: without any, there are only pictures.",
        ),
    ] = False,
    layers: Annotated[
        list[int] | None,
        typer.Option("--layer", help="With --pictures: encoder layer to draw attention and keys of, from 1; may be repeated."),
    ] = None,
    ema: Annotated[
        bool | None,
        typer.Option(
            "--ema/--no-ema", help="Judge the average of the weights (train.ema), or not; default: as the run evaluates."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Judge finished runs: features by linear probe, few labels, kNN, beside the untrained encoder; classifiers by top-1."""
    folders = _check(run_folders, pictures=pictures, layers=layers or [])
    split: Any = "test" if test else "validation"
    not_probed = _without_labels(folders, split) if pictures else {}
    reports = {folder.name: _judge(folder, split, ema) for folder in folders if folder.name not in not_probed}
    drawn = {folder.name: _draw(folder, layers or []) for folder in folders} if pictures else {}
    if as_json:
        print_json({"split": split, "runs": reports, **({"not_probed": not_probed, "pictures": drawn} if pictures else {})})
        return
    _print_classifiers({name: report for name, report in reports.items() if _is_of_classifier(report)}, split)
    _print_features({name: report for name, report in reports.items() if not _is_of_classifier(report)}, split)
    for made in drawn.values():
        for uri in made["files"]:
            console.print(uri, soft_wrap=True)
    console.print("`crate-ray tracking sync` sends these to MLflow", style="dim")


def _check(run_folders: list[str], *, pictures: bool, layers: list[int]) -> "list[RunFolder]":
    """The run folders, where nothing asked of any of them is refused."""
    from crate_ray.config import ConfigError
    from crate_ray.runs import RunFolder

    folders = [RunFolder(uri) for uri in run_folders]
    for folder in folders:
        if not folder.exists():
            raise ConfigError(f"'{folder.uri}' is not a run folder (it has no config.yaml); `crate-ray runs` lists them")
    if pictures:
        from crate_ray.training.pictures import check_pictures

        for folder in folders:
            check_pictures(folder, layers)
    elif layers:
        raise ConfigError("--layer says which layers --pictures draws; give --pictures too")
    return folders


def _without_labels(folders: "list[RunFolder]", split: Any) -> dict[str, str]:
    """Runs that have pictures but no probe, each with its reason, which is printed."""
    from crate_ray.training.probes import without_labels

    reasons = {folder.name: without_labels(folder.read_config(), split=split) for folder in folders}
    found = {name: reason for name, reason in reasons.items() if reason is not None}
    for name, reason in found.items():
        errors.print(f"{name}: no probe: {reason}", soft_wrap=True, markup=False)
    return found


def _judge(folder: "RunFolder", split: Any, ema: bool | None) -> dict[str, Any]:
    from crate_ray.training.probes import ProbeRequest, probe_run

    errors.print(f"[dim]{folder.name}: probing on {split}; a minute or two for 12,000 images ...[/dim]", soft_wrap=True)
    report = probe_run(folder, ProbeRequest(split, use_ema=ema))
    return report if _is_of_classifier(report) else _with_pixels(folder, report, split)


def _is_of_classifier(report: dict[str, Any]) -> bool:
    return report.get("task") == "classify"


def _print_classifiers(reports: dict[str, Any], split: str) -> None:
    if reports:
        lines = [(name, "{:.1%} [{:.1%}, {:.1%}]".format(*report["top1"])) for name, report in reports.items()]
        print_table(("classifier", "top-1"), lines, title=f"on {split}, 95% intervals over source images")


def _print_features(reports: dict[str, Any], split: str) -> None:
    from crate_ray.evaluation.probes import FEW_LABELS

    if not reports:
        return
    found = list(reports.values())
    lines = [
        ("linear probe, mean token", *(_beside(r["probe_top1"], r["control_top1"]) for r in found)),
        ("gain, points", *("{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in r["gain"])) for r in found)),
        ("linear probe, cls token", *(_beside(r["cls_top1"], r["control_cls_top1"]) for r in found)),
        *((f"{n} labels a class", *(_few(r, n) for r in found)) for n in FEW_LABELS),
        ("kNN", *(_beside(r["knn_top1"], r["control_knn_top1"]) for r in found)),
        ("raw pixels, no model", *(f"{r['raw_pixels_top1']:.1%}" for r in found)),
    ]
    title = f"on {split}, 95% intervals over source images; in brackets: the same encoder untrained"
    print_table(("", *reports), lines, title=title)


def _draw(folder: "RunFolder", layers: list[int]) -> dict[str, list[str]]:
    """Makes a run's pictures; says what could not be made."""
    from crate_ray.training.pictures import draw_pictures

    errors.print(f"[dim]{folder.name}: drawing pictures ...[/dim]", soft_wrap=True)
    made = draw_pictures(folder, layers=layers)
    for reason in made.left_out:
        errors.print(f"{folder.name}: no {reason}", soft_wrap=True, markup=False)
    return {"files": made.files, "left_out": made.left_out}


def _with_pixels(folder: "RunFolder", report: dict[str, Any], split: Any) -> dict[str, Any]:
    """Adds the accuracy of raw pixels, which belongs to the data, to a report that lacks it."""
    from crate_ray.training.probes import probe_raw_pixels

    if "raw_pixels_top1" not in report:
        errors.print("[dim]raw pixels, the control without a model ...[/dim]")
        report = {**report, "raw_pixels_top1": probe_raw_pixels(folder.read_config(), split=split).value}
        folder.write_json(f"probe_{split}.json", report)
    return report


def _few(report: dict[str, Any], per_class: int) -> str:
    trained, control = (report[key][str(per_class)] for key in ("few_labels", "control_few_labels"))
    return _beside(trained["top1"], control["top1"]) if trained and control else "-"


def _beside(trained: list[float], control: list[float]) -> str:
    return f"{trained[0]:.1%} [{trained[1]:.1%}, {trained[2]:.1%}] ({control[0]:.1%})"
