"""`crate-ray probe`: judge runs and their checkpoints beside untrained controls, fine-tune them, and draw what they see."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crate_ray.cli.arguments import Json
from crate_ray.cli.output import TO_MLFLOW, console, errors, print_json
from crate_ray.config import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crate_ray.evaluation.protocols import ProtocolName
    from crate_ray.runs import RunFolder
    from crate_ray.training.probes import ProbeRequest, Subject

_DEFAULT: "tuple[ProtocolName, ...]" = ("house", "label-free")


class Named(StrEnum):
    """The protocols, as an option takes them."""

    HOUSE = "house"
    PUBLISHED = "published"
    LABEL_FREE = "label-free"


def probe(
    run_folders: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, as `crate-ray runs` lists them.")],
    test: Annotated[
        bool, typer.Option("--test", help="Judge on the test split: for final numbers, never to choose a configuration.")
    ] = False,
    protocols: Annotated[
        list[Named] | None,
        typer.Option(
            "--protocol",
            help="house: mean and class token, few labels, kNN; published: as in the tables of papers; label-free: RankMe, "
            "alpha-ReQ, coding rate. May be repeated; default: house and label-free.",
        ),
    ] = None,
    few_labels: Annotated[
        list[int] | None,
        typer.Option("--few-label", min=1, help="Also with so many labels a class, beside 10 and 50; may be repeated."),
    ] = None,
    step: Annotated[
        int | None, typer.Option("--step", min=0, help="The checkpoint of this step, also of a run that is not finished.")
    ] = None,
    ema: Annotated[
        bool | None,
        typer.Option(
            "--ema/--no-ema", help="Judge the average of the weights (train.ema), or not; default: as the run evaluates."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="[NAME=]DIR", help="Judge on another data set: a folder with train, validation and test; NAME its numbers."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Encode with so many tasks on the Ray cluster; by default Ray is used from 100,000 images on."
        ),
    ] = None,
    fine_tune: Annotated[
        bool, typer.Option("--fine-tune", help="Train the encoder on with a new head, beside one from random weights.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="With --fine-tune: runs of each kind.")] = 3,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="With --fine-tune: a key of its runs, train.epochs=20 say; may be repeated."
        ),
    ] = None,
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
    as_json: Json = False,
) -> None:
    """Judge runs: features by linear probe, few labels and kNN, beside the untrained encoder; classifiers by top-1."""
    from crate_ray.training.probes import OtherData, ProbeRequest

    named: tuple[ProtocolName, ...] = tuple(dict.fromkeys(protocol.value for protocol in protocols or ()))
    if overrides and not fine_tune:
        raise ConfigError("--set changes the runs of --fine-tune; a probe has no keys: leave it out, or add --fine-tune")
    request = ProbeRequest(
        split="test" if test else "validation",
        protocols=named or (() if fine_tune else _DEFAULT),
        few_labels=tuple(dict.fromkeys(few_labels or ())),
        step=step,
        use_ema=ema,
        data=None if data is None else OtherData.parse(data),
    )
    folders = _check(run_folders, pictures=pictures, layers=layers or [])
    not_probed = _without_labels(folders, request) if pictures else {}
    subjects = _subjects([folder for folder in folders if folder.name not in not_probed], request)
    if fine_tune:
        from crate_ray.cli.probe_fine_tune import fine_tune_all

        fine_tune_all(subjects, seeds=seeds, overrides=overrides or [], workers=workers)
    reports = _judge(subjects, request, None if fine_tune and not named else workers)
    drawn = {folder.name: _draw(folder, layers or []) for folder in folders} if pictures else {}
    _show(subjects, reports, not_probed, drawn, as_json=as_json)


def _show(
    subjects: "Sequence[Subject]",
    reports: dict[str, dict[str, Any]],
    not_probed: dict[str, str],
    drawn: dict[str, dict[str, list[str]]],
    *,
    as_json: bool,
) -> None:
    from crate_ray.cli.probe_table import correlate, print_reports

    found = correlate(list(reports.values()), [subject.config.model.family for subject in subjects])
    split = subjects[0].request.split if subjects else "validation"
    if as_json:
        more = {"not_probed": not_probed, "pictures": drawn} if drawn else {}
        print_json({"split": split, "runs": reports, "correlations": found, **more})
        return
    print_reports(reports, split, found)
    for made in drawn.values():
        for uri in made["files"]:
            console.print(uri, soft_wrap=True)
    console.print(TO_MLFLOW, style="dim")


def _check(run_folders: list[str], *, pictures: bool, layers: list[int]) -> "list[RunFolder]":
    """The run folders, where nothing asked of any of them is refused."""
    from crate_ray.runs import RunFolder

    folders = [RunFolder(uri) for uri in run_folders]
    for folder in folders:
        folder.check_exists()
    if len({folder.name for folder in folders}) < len(folders):
        raise ConfigError("two of these run folders have the same name; give each run once")
    if pictures:
        from crate_ray.training.pictures import check_pictures

        for folder in folders:
            check_pictures(folder, layers)
    elif layers:
        raise ConfigError("--layer says which layers --pictures draws; give --pictures too")
    return folders


def _subjects(folders: "Sequence[RunFolder]", request: "ProbeRequest") -> "list[Subject]":
    """What is judged of each run; refuses all of them when one cannot be, before any work is done."""
    from crate_ray.training.probes import check_subject, find_subject

    subjects = [find_subject(folder, request) for folder in folders]
    for subject in subjects:
        check_subject(subject)
    return subjects


def _without_labels(folders: "list[RunFolder]", request: "ProbeRequest") -> dict[str, str]:
    """Runs that have pictures but no probe, each with its reason, which is printed."""
    from crate_ray.training.probes import without_labels

    reasons = {folder.name: without_labels(folder.read_config(), split=request.split) for folder in folders}
    found = {name: reason for name, reason in reasons.items() if reason is not None}
    for name, reason in found.items():
        errors.print(f"{name}: no probe: {reason}", soft_wrap=True, markup=False)
    return found


def _judge(subjects: "Sequence[Subject]", request: "ProbeRequest", workers: int | None) -> dict[str, dict[str, Any]]:
    """The reports by name, from this process or from Ray tasks, with the accuracy of raw pixels."""
    from crate_ray.training.probes import CLUSTER_FROM, num_images, probe_run

    if workers is None and all(num_images(subject) < CLUSTER_FROM for subject in subjects):
        reports = {}
        for subject in subjects:
            name, split = subject.folder.name, request.split
            errors.print(f"[dim]{name}: judging on {split}; a minute or two for 12,000 images ...[/dim]", soft_wrap=True)
            reports[name] = probe_run(subject.folder, request)
    else:
        from crate_ray.launch.features import probe_runs

        errors.print(f"[dim]judging {len(subjects)} on {request.split}, on the Ray cluster ...[/dim]", soft_wrap=True)
        found = probe_runs([subject.folder for subject in subjects], request, workers=workers)
        reports = {subject.folder.name: report for subject, report in zip(subjects, found, strict=True)}
    return _with_pixels(subjects, reports)


def _with_pixels(subjects: "Sequence[Subject]", reports: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Adds the accuracy of raw pixels, which belongs to the data and is measured once for it, to the reports that lack it."""
    from crate_ray.training.probes import probe_raw_pixels

    known = {r["data_digest"]: r["raw_pixels_top1"] for r in reports.values() if "raw_pixels_top1" in r}
    for subject in subjects:
        report = reports[subject.folder.name]
        if "raw_pixels_top1" in report or not {"house", "published"} & report["protocols"].keys():
            continue
        if subject.data_digest not in known:
            errors.print("[dim]raw pixels, the control without a model ...[/dim]")
            known[subject.data_digest] = probe_raw_pixels(subject.config, split=subject.request.split).value
        reports[subject.folder.name] = {**report, "raw_pixels_top1": known[subject.data_digest]}
        subject.folder.write_json(f"probe_{subject.suffix}.json", reports[subject.folder.name])
    return reports


def _draw(folder: "RunFolder", layers: list[int]) -> dict[str, list[str]]:
    """Makes a run's pictures; says what could not be made."""
    from crate_ray.training.pictures import draw_pictures

    errors.print(f"[dim]{folder.name}: drawing pictures ...[/dim]", soft_wrap=True)
    made = draw_pictures(folder, layers=layers)
    for reason in made.left_out:
        errors.print(f"{folder.name}: no {reason}", soft_wrap=True, markup=False)
    return {"files": made.files, "left_out": made.left_out}
