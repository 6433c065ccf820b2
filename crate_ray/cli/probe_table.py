"""What `crate-ray probe` prints: a column a run, a line a number, each beside its untrained control."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from crate_ray.cli.output import console, print_table

Report = Mapping[str, Any]

_PLAIN = (
    ("linear probe, mean token", "probe_top1", "control_top1"),
    ("linear probe, cls token", "cls_top1", "control_cls_top1"),
    ("published probe, cls token", "published_probe_top1", "control_published_probe_top1"),
    ("published probe, mean token", "published_mean_top1", "control_published_mean_top1"),
    ("published probe, both tokens", "published_both_top1", "control_published_both_top1"),
    ("kNN", "knn_top1", "control_knn_top1"),
)
_GAINS = {"probe_top1": "gain", "published_probe_top1": "published_gain"}
_LABEL_FREE = (("RankMe", "rankme"), ("alpha-ReQ", "alpha_req"), ("coding rate, nats", "coding_rate"))


def print_reports(reports: Mapping[str, Report], split: str, correlations: Sequence[Mapping[str, Any]]) -> None:
    """All tables; what no run has is left out.

    Args:
        reports: By the name of the run.
        split: Judged on.
        correlations: Of label-free measures with the probe, from `correlate`.
    """
    classifiers = {name: report for name, report in reports.items() if report.get("task") == "classify"}
    encoders = {name: report for name, report in reports.items() if name not in classifiers}
    if classifiers:
        lines = [(name, _percent(report["top1"])) for name, report in classifiers.items()]
        print_table(("classifier", "top-1"), lines, title=f"on {split}, 95% intervals over source images")
    _print_accuracies(encoders, split)
    _print_label_free({name: report for name, report in encoders.items() if "label_free" in report})
    for found in correlations:
        low, high = found["low"], found["high"]
        console.print(
            f"{found['family']}, {found['runs']} runs: {found['measure']} and linear probe, rank correlation "
            f"{found['rho']:+.2f} [{low:+.2f}, {high:+.2f}]" + ("" if low > 0 or high < 0 else ": not shown"),
            soft_wrap=True,
        )
    if len({report["data_digest"] for report in reports.values()}) > 1:
        console.print("these runs were judged on different shards: their columns do not compare", style="yellow")


def _print_accuracies(reports: Mapping[str, Report], split: str) -> None:
    rows: list[tuple[str, Callable[[Report], str]]] = []
    for label, key, control in _PLAIN:
        rows.append((label, partial(_accuracy, key=key, control=control)))
        if key in _GAINS:
            rows.append(("gain, points", partial(_gain, key=_GAINS[key])))
    per_class = sorted({int(n) for report in reports.values() for n in report.get("few_labels", {})})
    rows += [(f"{n} labels a class", partial(_few, per_class=str(n))) for n in per_class]
    rows += [("fine-tuned", _fine_tuned), ("gain, points", partial(_gain, key="fine_tune_gain"))]
    rows.append(("raw pixels, no model", _pixels))
    lines = [(label, *map(cell, reports.values())) for label, cell in rows]
    lines = [line for line in lines if {*line[1:]} - {"-"}]
    if lines:
        title = f"on {_place(reports, split)}, 95% intervals over source images; in brackets: the same encoder untrained"
        print_table(("", *reports), lines, title=title)


def _accuracy(report: Report, *, key: str, control: str) -> str:
    return _beside(report[key], report[control]) if key in report else "-"


def _gain(report: Report, *, key: str) -> str:
    return _points(report[key]) if key in report else "-"


def _pixels(report: Report) -> str:
    return f"{report['raw_pixels_top1']:.1%}" if "raw_pixels_top1" in report else "-"


def _place(reports: Mapping[str, Report], split: str) -> str:
    """The split, and the data set where it is not the run's own."""
    data = next((report["data"] for report in reports.values() if "data" in report), None)
    return split if data is None else f"{split} of {data}"


def _print_label_free(reports: Mapping[str, Report]) -> None:
    if not reports:
        return
    lines = [
        (label, *(_number(r["label_free"][key], r["control_label_free"][key]) for r in reports.values()))
        for label, key in _LABEL_FREE
    ]
    images = max(report["label_free"]["images"] for report in reports.values())
    print_table(("", *reports), lines, title=f"label-free, {images:,} validation images")
    console.print("in brackets: untrained; how features are spread, never ranked across families", style="dim", soft_wrap=True)


def _number(trained: float | None, control: float | None) -> str:
    texts = ["-" if value is None else f"{value:.4g}" for value in (trained, control)]
    return f"{texts[0]} ({texts[1]})"


def _few(report: Report, *, per_class: str) -> str:
    trained, control = (report.get(key, {}).get(per_class) for key in ("few_labels", "control_few_labels"))
    return _beside(trained["top1"], control["top1"]) if trained and control else "-"


def _fine_tuned(report: Report) -> str:
    if "fine_tune" not in report:
        return "-"
    tuned, control = report["fine_tune"], report["control_fine_tune"]
    seeds = len(tuned["top1_by_seed"])
    return f"{_beside(tuned['top1'], control['top1'])}, {seeds} {'seed' if seeds == 1 else 'seeds'}"


def _beside(trained: Sequence[float], control: Sequence[float]) -> str:
    return f"{_percent(trained)} ({control[0]:.1%})"


def _percent(interval: Sequence[float]) -> str:
    return "{:.1%} [{:.1%}, {:.1%}]".format(*interval)


def _points(interval: Sequence[float]) -> str:
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in interval))


def correlate(reports: Sequence[Report], families: Sequence[str]) -> list[dict[str, Any]]:
    """Rank correlation of every label-free measure with the linear probe, over the runs of each family that have both.

    Args:
        reports: One a run.
        families: Of the same runs.
    """
    from crate_ray.evaluation.label_free import rank_correlation

    found = []
    for family in sorted(set(families)):
        own = [r for r, f in zip(reports, families, strict=True) if f == family and "label_free" in r and "probe_top1" in r]
        for label, key in _LABEL_FREE:
            pairs = [(r["label_free"][key], r["probe_top1"][0]) for r in own if r["label_free"][key] is not None]
            rho = rank_correlation([a for a, _ in pairs], [b for _, b in pairs])
            if rho is not None:
                numbers = {"runs": len(pairs), "rho": rho.value, "low": rho.low, "high": rho.high}
                found.append({"family": family, "measure": label, **numbers})
    return found
