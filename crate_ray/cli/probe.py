"""`crate-ray probe`: judge the features of finished runs beside their untrained controls."""

from typing import Annotated, Any

import typer

from crate_ray.cli.arguments import Json
from crate_ray.cli.output import console, print_json, print_table


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
    from crate_ray.training.probe import final_values, probe_run

    folders = [RunFolder(uri) for uri in run_folders]
    for folder in folders:
        if not folder.exists():
            raise ConfigError(f"'{folder.uri}' is not a run folder (it has no config.yaml); `crate-ray runs` lists them")
    split: Any = "test" if test else "validation"
    verdicts = {folder.name: probe_run(folder, split=split) for folder in folders}
    if as_json:
        print_json({"split": split, "runs": {name: final_values(verdict) for name, verdict in verdicts.items()}})
        return
    rows = []
    for name, verdict in verdicts.items():
        top1, control, gain = verdict.trained.mean_token.top1, verdict.control.mean_token.top1, verdict.gain
        few = verdict.trained.few_labels.get(10)
        rows.append(
            (
                name,
                f"{top1.value:.1%} [{top1.low:.1%}, {top1.high:.1%}]",
                f"{control.value:.1%}",
                f"{100 * gain.value:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]",
                f"{verdict.trained.cls_token.top1.value:.1%}",
                f"{few.mean:.1%}" if few else "-",
                f"{verdict.trained.knn_top1:.1%}",
            )
        )
    print_table(("run", "probe top-1", "untrained", "gain, points", "cls", "10 labels", "kNN"), rows, title=f"on {split}")
    console.print("`crate-ray tracking sync` sends these to MLflow", style="dim")
