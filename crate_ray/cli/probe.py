"""`crate-ray probe`: judge the features of finished runs beside their untrained controls."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from crate_ray.cli.arguments import Json
from crate_ray.cli.output import console, print_json, print_table

if TYPE_CHECKING:
    from crate_ray.training.probe import Verdict


def probe(
    run_folders: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, as `crate-ray runs` lists them.")],
    test: Annotated[
        bool, typer.Option("--test", help="Judge on the test split: for final numbers, never to choose a configuration.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Judge the features of finished runs: linear probe, few labels, kNN, beside the untrained encoder."""
    from crate_ray.config import ConfigError
    from crate_ray.runs import RunFolder
    from crate_ray.training.probe import final_values, probe_raw_pixels, probe_run

    folders = [RunFolder(uri) for uri in run_folders]
    for folder in folders:
        if not folder.exists():
            raise ConfigError(f"'{folder.uri}' is not a run folder (it has no config.yaml); `crate-ray runs` lists them")
    split: Any = "test" if test else "validation"
    verdicts = {folder.name: probe_run(folder, split=split) for folder in folders}
    configs = {folder.name: folder.read_config() for folder in folders}
    pixels: dict[tuple[str, int], float] = {}  # they belong to the data, which runs usually share
    for config in configs.values():
        key = (config.data.train, config.model.image_size)
        if key not in pixels:
            pixels[key] = probe_raw_pixels(config, split=split).value
    raw = {name: pixels[config.data.train, config.model.image_size] for name, config in configs.items()}
    if as_json:
        values = {name: {**final_values(verdict), "raw_pixels_top1": raw[name]} for name, verdict in verdicts.items()}
        print_json({"split": split, "runs": values})
        return
    rows = []
    for name, verdict in verdicts.items():
        top1, control, gain = verdict.trained.mean_token.top1, verdict.control.mean_token.top1, verdict.gain
        few = [_few(verdict, per_class) for per_class in (10, 50)]
        rows.append(
            (
                name,
                f"{top1.value:.1%} [{top1.low:.1%}, {top1.high:.1%}]",
                f"{control.value:.1%}",
                f"{100 * gain.value:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]",
                f"{verdict.trained.cls_token.top1.value:.1%}",
                *few,
                f"{verdict.trained.knn_top1:.1%} ({verdict.control.knn_top1:.1%})",
                f"{raw[name]:.1%}",
            )
        )
    header = ("run", "probe top-1", "untrained", "gain, points", "cls", "10 labels", "50 labels", "kNN", "raw pixels")
    print_table(header, rows, title=f"on {split}; in brackets: the same encoder untrained")
    console.print("`crate-ray tracking sync` sends these to MLflow", style="dim")


def _few(verdict: "Verdict", per_class: int) -> str:
    trained, control = verdict.trained.few_labels.get(per_class), verdict.control.few_labels.get(per_class)
    return f"{trained.mean:.1%} ({control.mean:.1%})" if trained is not None and control is not None else "-"
