"""The comparison as a folder that stands by itself: report.md, comparison.json, comparison.png.

In: comparison rows and where they come from. Out: the three files. Every sentence follows from
the numbers by a rule, so that a model which learned nothing is said to have learned nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from crate_ray.analysis.plots import plot_comparison
from crate_ray.analysis.seeds import RecipeDifference
from crate_ray.analysis.table import ComparisonRow, Estimate, comparison_to_json, incomparable, losses_comparable

TABLE_HEADER = (
    "model", "encoder params", "params (paper)", "train GFLOPs/image", "train PFLOPs", "images/s",
    "probe top-1 % [95%]", "untrained %", "gain [95%]", "cls %", "10 labels %", "50 labels %", "kNN %", "eval loss",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ReportMeta:
    """What a reader needs besides the rows.

    Attributes:
        title: Heading.
        judged_split: "test" or "validation".
        protocol: Version of the probe protocol.
        commands: Command lines that produced the comparison.
        fingerprints: Compare parts of each run by name.
        differences: Paired differences between recipes, where there are several seeds.
    """

    title: str = "Comparison"
    judged_split: str = "test"
    protocol: int = 1
    commands: tuple[str, ...] = ()
    fingerprints: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    differences: tuple[RecipeDifference, ...] = ()


def write_report(rows: Sequence[ComparisonRow], out_dir: str | Path, meta: ReportMeta) -> Path:
    """Writes report.md, comparison.json and comparison.png into `out_dir` and returns the report's path.

    Raises:
        ValueError: No rows.
    """
    if not rows:
        raise ValueError("no rows to report")
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    plot_comparison(rows, folder / "comparison.png")
    differing = incomparable(meta.fingerprints)
    content = comparison_to_json(
        rows,
        headline=headline(rows, meta.differences),
        judged_split=meta.judged_split,
        probe_protocol=meta.protocol,
        incomparable=[{"key": key, "values": values} for key, values in differing],
        losses_comparable=losses_comparable(rows),
        differences=[asdict(item) for item in meta.differences],
        commands=list(meta.commands),
    )
    (folder / "comparison.json").write_text(content)
    report = folder / "report.md"
    report.write_text(report_text(rows, meta))
    return report


def headline(rows: Sequence[ComparisonRow], differences: Sequence[RecipeDifference] = ()) -> str:
    """The finding in plain sentences: who beats its control, and which models the data tell apart.

    Paired differences over seeds decide where they are given; without them, two models whose
    intervals overlap are called not distinguishable, which errs on the side of saying less.
    """
    best = max(rows, key=lambda row: row.probe_top1.value)
    seeds = f" over {len(best.seeds)} seeds" if len(best.seeds) > 1 else " on one seed"
    sentences = [f"Highest probe top-1: {best.name} with {_percent(best.probe_top1)} %{seeds}."]
    failed = [row.name for row in rows if not row.beats_control]
    if failed:
        sentences.append(f"Not shown to beat its own untrained control: {', '.join(failed)}.")
    else:
        sentences.append("Every model beats its own untrained control.")
    helped = [row.name for row in rows if row.rollbacks or row.skipped_steps]
    if helped:
        sentences.append(
            f"Helped past losses that were no numbers, so not the run of its configuration alone: {', '.join(helped)}."
        )
    unclear = [f"{a} and {b}" for a, b in _not_distinguishable(rows, differences)]
    if unclear:
        sentences.append(f"Not distinguishable: {'; '.join(unclear)}.")
    return " ".join(sentences)


def format_table(rows: Sequence[ComparisonRow]) -> list[list[str]]:
    """Cells as text, the header first; "-" where a value was not measured."""
    return [list(TABLE_HEADER), *(_cells(row) for row in rows)]


def report_text(rows: Sequence[ComparisonRow], meta: ReportMeta) -> str:
    """The text of report.md."""
    header, *body = format_table(rows)
    table = ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *body)]
    parts = [
        f"# {meta.title}",
        headline(rows, meta.differences),
        "![comparison](comparison.png)",
        "\n".join(table),
        *_differences_section(meta.differences),
        "## Before you compare",
        "\n".join(f"- {line}" for line in _cautions(rows, meta)),
        "## How it was measured",
        _protocol(rows, meta),
    ]
    if meta.commands:
        parts += ["## Commands", "```\n" + "\n".join(meta.commands) + "\n```"]
    return "\n\n".join(parts) + "\n"


def _not_distinguishable(rows: Sequence[ComparisonRow], differences: Sequence[RecipeDifference]) -> list[tuple[str, str]]:
    name_of = {row.recipe: row.name for row in rows}
    if differences:
        return [(name_of[d.first], name_of[d.second]) for d in differences if d.top1.low <= 0 <= d.top1.high]
    return [
        (a.name, b.name)
        for a, b in combinations(rows, 2)
        if a.probe_top1.low <= b.probe_top1.high and b.probe_top1.low <= a.probe_top1.high
    ]


def _cells(row: ComparisonRow) -> list[str]:
    gain = row.gain
    return [
        row.name,
        f"{row.params_encoder / 1e6:.2f}M",
        f"{row.params_paper / 1e6:.2f}M",
        _number(row.training_gflops_per_image, "{:.3g}"),
        _number(row.train_pflops, "{:.3g}"),
        _number(row.images_per_s, "{:.0f}"),
        _percent(row.probe_top1),
        _number(100 * row.control_top1, "{:.1f}"),
        f"{100 * gain.value:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]",
        *(_number(100 * value, "{:.1f}") for value in (row.cls_top1, row.fewshot10_top1, row.fewshot50_top1, row.knn_top1)),
        _number(row.eval_loss, "{:.4f}"),
    ]


def _cautions(rows: Sequence[ComparisonRow], meta: ReportMeta) -> list[str]:
    lines = [
        f"The runs differ in `{key}`: " + ", ".join(f"{name} = {value}" for name, value in values.items()) + "."
        for key, values in incomparable(meta.fingerprints)
    ] or (["The runs agree in data, evaluation protocol, schedule and precision."] if meta.fingerprints else [])
    lines += [
        f"{row.name}: {row.skipped_steps} steps without a finite loss or gradient were skipped, and it was rolled back "
        f"{row.rollbacks} times, to pass over batches at a lower learning rate (`interventions.json` of the run)."
        for row in rows
        if row.rollbacks or row.skipped_steps
    ]
    if not losses_comparable(rows):
        lines.append(
            "Eval losses are not comparable here: mask ratio, patch size or pixel normalisation differ, "
            "so they answer different questions."
        )
    if all(len(row.seeds) == 1 for row in rows):
        lines.append(
            "One seed: the intervals cover the choice of judged images, not the luck of training. "
            "Differences between models need several seeds."
        )
    lines.append("Fewer parameters are not less compute: read both columns.")
    return lines


def _protocol(rows: Sequence[ComparisonRow], meta: ReportMeta) -> str:
    raw = next((row.raw_pixels_top1 for row in rows if not math.isnan(row.raw_pixels_top1)), None)
    interval = (
        "Intervals are t intervals over seeds." if len(rows[0].seeds) > 1
        else "Intervals are 95% bootstrap intervals that resample source images, not rows."
    )  # fmt: skip
    text = (
        f"Frozen features of the unmasked image, judged on {meta.judged_split} (probe protocol {meta.protocol}): "
        "logistic regression on the standardised mean of the patch tokens, its regularisation chosen on validation; "
        "cls is the same on the class token. 10 and 50 labels: that many labelled source images a class, mean of 20 draws "
        f"that are the same for every model. kNN: 20 neighbours, cosine, temperature 0.07. {interval} "
        "Gain: minus the same architecture untrained, on the same images."
    )
    return text + (
        f" Raw pixels without a model, fitted on up to four rows of each source image, score {100 * raw:.1f}%."
        if raw is not None
        else ""
    )


def _differences_section(differences: Sequence[RecipeDifference]) -> list[str]:
    if not differences:
        return []
    lines = [
        f"- {d.first} minus {d.second}: {100 * d.top1.mean:+.1f} points "
        f"[{100 * d.top1.low:+.1f}, {100 * d.top1.high:+.1f}] over {d.top1.n} paired seeds"
        for d in differences
    ]
    return ["## Paired differences in probe top-1", "\n".join(lines)]


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _number(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "-" if math.isnan(value) else str(value)
