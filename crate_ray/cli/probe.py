"""`crate-ray probe`: judge the features of finished runs beside their untrained controls."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from crate_ray.cli.arguments import Json
from crate_ray.cli.output import console, print_json, print_table

if TYPE_CHECKING:
    from crate_ray.evaluation.intervals import Interval
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
    from crate_ray.evaluation.probes import FEW_LABELS
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
    found = list(verdicts.values())
    lines = [
        ("linear probe, mean token", *(_beside(v.trained.mean_token.top1, v.control.mean_token.top1) for v in found)),
        ("gain, points", *(f"{100 * v.gain.value:+.1f} [{100 * v.gain.low:+.1f}, {100 * v.gain.high:+.1f}]" for v in found)),
        ("linear probe, cls token", *(_beside(v.trained.cls_token.top1, v.control.cls_token.top1) for v in found)),
        *((f"{n} labels a class", *(_few(v, n) for v in found)) for n in FEW_LABELS),
        ("kNN", *(_beside(v.trained.knn, v.control.knn) for v in found)),
        ("raw pixels, no model", *(f"{raw[name]:.1%}" for name in verdicts)),
    ]
    print_table(
        ("", *verdicts), lines, title=f"on {split}, 95% intervals over source images; in brackets: the same encoder untrained"
    )
    console.print("`crate-ray tracking sync` sends these to MLflow", style="dim")


def _few(verdict: "Verdict", per_class: int) -> str:
    trained, control = verdict.trained.few_labels.get(per_class), verdict.control.few_labels.get(per_class)
    return _beside(trained.top1, control.top1) if trained is not None and control is not None else "-"


def _beside(trained: "Interval", control: "Interval") -> str:
    return f"{trained.value:.1%} [{trained.low:.1%}, {trained.high:.1%}] ({control.value:.1%})"
