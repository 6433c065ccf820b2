"""The report as a document: what is said of a comparison, and in which order.

In: a comparison, and why pictures are absent. Out: a Document. Every sentence follows from the comparison by a rule; where
there is nothing to say, a sentence says so. Findings that forbid or weaken a verdict stand with the verdicts, not at the end.
"""

import math
from collections.abc import Mapping, Sequence

from crate_ray.analysis.comparison.configurations import unique_names
from crate_ray.analysis.comparison.document import (
    Block,
    Bullets,
    Commands,
    Document,
    Folded,
    Paragraph,
    Picture,
    Section,
    Table,
)
from crate_ray.analysis.comparison.figures import DIFFERENCES, LAYERS, MAIN, SENSITIVITY
from crate_ray.analysis.comparison.hypotheses import AT, at_words, is_distinguished
from crate_ray.analysis.comparison.method import method
from crate_ray.analysis.comparison.result import AXES, Comparison, Configuration, Curve, Difference, LayerCurve
from crate_ray.analysis.comparison.scatter import COSTS
from crate_ray.analysis.comparison.wording import (
    AXIS_UNITS,
    BASELINES,
    FAMILY_NAMES,
    MEASURE_NAMES,
    NO_TIME,
    SETTING_NAMES,
    difference_text,
    family_names,
    has_interval,
    is_against_mae,
    metric_measure,
    metric_name,
    model_name,
    most_seeds,
    opponents,
    optional_amount,
    p_text,
    parameters_text,
    ratio_text,
    read_text,
    seeds_text,
    sensitivity_measure,
    sentence,
    source_interval,
    with_interval,
)
from crate_ray.analysis.objectives import Measure, amount_text, count_text, value_text

_SHOWN_WARNINGS = 6
_FOLD_FROM = 8  # names in a list


def compose(comparison: Comparison, absent: Mapping[str, str]) -> Document:
    """The whole report.

    Args:
        comparison: What was found.
        absent: By the name of a picture that was not drawn, why.
    """
    return Document(
        headline=" ".join(comparison.headline.split()),
        title=f"{opponents(comparison)}: {comparison.name}",
        lead=_lead(comparison),
        verdicts=_verdicts(comparison),
        warnings=_warnings(comparison),
        sections=(
            Section("Configurations", "configurations", _configurations(comparison, absent)),
            Section("Differences", "differences", _differences(comparison, absent)),
            Section("At equal accuracy" if metric_measure(comparison).unit == "%" else "At equal metric", "ratios",
                    _ratios(comparison, absent)),
            Section("Sensitivity", "sensitivity", _sensitivity(comparison, absent)),
            Section("White box, layer by layer", "layers", _layers(comparison, absent)),
            Section("Label-free measures", "label-free", _correlations(comparison)),
            Section("Refused, flagged, excluded", "findings", _findings(comparison)),
            Section("How it was measured", "method", method(comparison)),
            Section("Commands", "commands", _commands(comparison)),
        ),
    )  # fmt: skip


def _lead(comparison: Comparison) -> str:
    direction = "higher" if comparison.is_larger_better else "lower"
    return f"{sentence(metric_measure(comparison).label)}; {direction} is better. {read_text(comparison)}."


def _verdicts(comparison: Comparison) -> dict[str, str]:
    """Those of the comparison in its order; a sentence for each axis that it says nothing of."""
    texts = {axis: comparison.verdicts[axis] for axis in comparison.verdicts}
    texts |= {axis: "No verdict: no pair of configurations is equal here." for axis in AXES if axis not in texts}
    has_time = any(item.positions.get("time") is not None for item in comparison.configurations)
    if not has_time and "crate-ray time" not in texts["time"]:
        texts["time"] = f"{texts['time']} {NO_TIME}"
    words: dict[str, str] = {**AT, **{item.axis: at_words(item) for item in reversed(comparison.differences)}}
    return {(name := sentence(words.get(axis, axis))): _without(name, text) for axis, text in texts.items()}


def _without(name: str, text: str) -> str:
    """A verdict without the axis that it begins with, which stands before it."""
    rest = text.removeprefix(name)
    return sentence(rest.lstrip(":, ")) if rest[:1] in (":", ",") else text


def _warnings(comparison: Comparison) -> Bullets | None:
    grave = [finding for finding in comparison.findings if finding.severity != "noted"]
    items = [(f"{sentence(finding.severity)}:", finding.text) for finding in grave[:_SHOWN_WARNINGS]]
    if len(grave) > _SHOWN_WARNINGS:
        items.append(("", f"{len(grave) - _SHOWN_WARNINGS} more under “Refused, flagged, excluded”."))
    if most_seeds(comparison) == 1:
        items.append(("One seed:", "differences between single runs are not differences between models."))
    return Bullets(tuple(items), is_urgent=True) if items else None


def _picture(name: str, absent: Mapping[str, str]) -> Block:
    return Paragraph(absent[name]) if name in absent else Picture(name)


def _configurations(comparison: Comparison, absent: Mapping[str, str]) -> tuple[Block, ...]:
    present = {item.model for item in comparison.configurations}
    baselines = tuple(
        (f"{model_name(model)}:", what if model in present else f"{what} Not in this comparison.")
        for model, what in BASELINES.items()
    )
    blocks: list[Block] = [_picture(MAIN, absent)]
    if is_against_mae(comparison):
        blocks += [Paragraph("The two MAE baselines:"), Bullets(baselines)]
    if not comparison.configurations:
        return (*blocks, Paragraph("No configuration is left to compare."))
    blocks.append(_configurations_table(comparison))
    missing = tuple(
        (f"{item.label}:", "; ".join(f"seed {seed}: {why}" for seed, why in item.missing.items()))
        for item in comparison.configurations
        if item.missing
    )
    return (*blocks, *((Paragraph("Seeds that are missing:"), Bullets(missing)) if missing else ()))


def _configurations_table(comparison: Comparison) -> Table:
    measure = metric_measure(comparison)
    over_images = [source_interval(item, comparison.metric) for item in comparison.configurations]
    has_images = any(over_images)
    is_named = all(item.label.startswith(model_name(item.model)) for item in comparison.configurations)
    header = [
        "configuration",
        *([] if is_named else ["model"]),
        f"{metric_name(comparison.metric)}{f' ({measure.unit})' if measure.unit else ''}, mean"
        + (" [95% over seeds]" if most_seeds(comparison) > 1 else ""),
    ]
    header += ["95% over test images"] if has_images else []
    header += [
        "seeds",
        "untrained",
        "gain [95%]",
        "encoder params",
        "total params",
        "PFLOPs",
        "hours",
        "tuning trials",
        "confirmed",
    ]
    lines = [
        (
            item.label,
            *([] if is_named else [model_name(item.model)]),
            with_interval(measure, item.metric),
            *([_ends(measure, item, comparison.metric)] if has_images else []),
            seeds_text(item.seeds),
            measure.text(item.control),
            difference_text(measure, item.gain),
            *_sizes(item),
            "not recorded" if item.tuning_trials is None else str(item.tuning_trials),
            "yes" if item.is_confirmed else "no",
        )
        for item in comparison.configurations
    ]
    caption = "Each configuration, its cost, and what its tuning was allowed."
    return Table(caption, tuple(header), tuple(lines), frozenset({0} if is_named else {0, 1}))


def _ends(measure: Measure, item: Configuration, metric: str) -> str:
    interval = source_interval(item, metric)
    return "-" if interval is None or not has_interval(interval) else with_interval(measure, interval).partition(" ")[2]


def _sizes(item: Configuration) -> tuple[str, ...]:
    encoder, flops, hours = (item.positions.get(axis) for axis in AXES)
    return (
        "-" if encoder is None else parameters_text(encoder),
        parameters_text(item.params_total),
        optional_amount(flops),
        optional_amount(hours),
    )


def _differences(comparison: Comparison, absent: Mapping[str, str]) -> tuple[Block, ...]:
    if not comparison.differences:
        both = " and ".join(family_names(comparison).values())
        return (Paragraph(f"No two configurations of {both} are equal on any axis, so no hypothesis was declared."),)
    axes = dict.fromkeys(item.axis for item in comparison.differences)
    return (_picture(DIFFERENCES, absent), *(_differences_table(comparison, axis) for axis in axes))


def _differences_table(comparison: Comparison, axis: str) -> Table:
    own = [item for item in comparison.differences if item.axis == axis]
    measure = metric_measure(comparison)
    unit = f" ({measure.difference_unit})" if measure.difference_unit else ""
    has_dropped = any(item.dropped for item in own)
    names = family_names(comparison)
    pair, difference = " \N{MINUS SIGN} ".join(names.values()), f"difference{unit} [95%]"
    header = (pair, difference, "pairs", "p", "p (Holm)", "test-set noise [95%]", "result",
              *(("left out",) if has_dropped else ()))  # fmt: skip
    lines = tuple(
        _difference_cells(item, measure, names, is_larger_better=comparison.is_larger_better, has_dropped=has_dropped)
        for item in own
    )
    caption = f"{sentence(at_words(own[0]))}: every pair that was declared, in that order."
    return Table(caption, header, lines, frozenset({0, *range(6, len(header))}))


def _difference_cells(
    item: Difference, measure: Measure, names: Mapping[str, str], *, is_larger_better: bool, has_dropped: bool
) -> tuple[str, ...]:
    dropped = "; ".join(f"seed {seed}: {why}" for seed, why in item.dropped.items()) or "-"
    return (
        f"{item.first.label} \N{MINUS SIGN} {item.second.label}",
        difference_text(measure, item.interval),
        str(len(item.seeds)),
        p_text(item.p_value),
        p_text(item.p_holm),
        difference_text(measure, item.test_noise),
        _result(item, names, is_larger_better=is_larger_better),
        *((dropped,) if has_dropped else ()),
    )


def _result(item: Difference, names: Mapping[str, str], *, is_larger_better: bool) -> str:
    """Who is better, with what a reader must know with it; or why nobody can say."""
    if item.why_no_verdict is not None or item.interval is None:
        return f"no verdict: {item.why_no_verdict}"
    is_first = (item.interval.value > 0) == is_larger_better
    winner = f"{names['crate' if is_first else 'vit']} better" if is_distinguished(item) else "not distinguishable"
    return f"{winner}; {', '.join(item.flags)}" if item.flags else winner


def _ratios(comparison: Comparison, absent: Mapping[str, str]) -> tuple[Block, ...]:
    blocks: list[Block] = []
    named = [(AXIS_UNITS[ratio.axis], ratio) for ratio in comparison.ratios]
    named += [("all trainable parameters", ratio) for ratio in comparison.total_ratios]
    if named:
        items = tuple((f"{sentence(what)}, against {model_name(ratio.baseline)}:", ratio_text(ratio)) for what, ratio in named)
        blocks.append(Bullets(items))
    else:
        blocks.append(Paragraph("No ratio: it takes configurations of both families that may be compared."))
    if comparison.curves:
        blocks.append(_fronts_table(comparison.curves))
    return (*blocks, *(_picture(cost.name, absent) for cost in COSTS[1:]))


def _fronts_table(curves: Sequence[Curve]) -> Table:
    header = ("over", "model", "curve", "on the front, by rising cost", "parameters of the fit [95%]")
    lines = tuple(
        (
            AXIS_UNITS[curve.axis],
            model_name(curve.model) if curve.model else FAMILY_NAMES.get(curve.family, curve.family),
            "power law" if curve.kind == "power_law" else "front, joined over log cost",
            _front(curve),
            "; ".join(
                f"{name} {amount_text(value)} [{amount_text(low)}, {amount_text(high)}]"
                for name, (value, low, high) in curve.parameters.items()
            )
            or "-",
        )
        for curve in curves
    )
    return Table("What each model reaches, inside what was measured.", header, lines, frozenset(range(5)))


def _front(curve: Curve) -> str:
    """The configurations on a front, the model named once."""
    name = f"{model_name(curve.model)} "
    return ", ".join(label.removeprefix(name) for label in curve.front)


def _sensitivity(comparison: Comparison, absent: Mapping[str, str]) -> tuple[Block, ...]:
    if not comparison.sensitivities:
        return (_picture(SENSITIVITY, absent),)
    lines = tuple(
        (
            SETTING_NAMES.get(item.key, item.key),
            model_name(item.model) if item.model else FAMILY_NAMES.get(item.family, item.family),
            value_text(value),
            sensitivity_measure(comparison, item).axis,
            with_interval(sensitivity_measure(comparison, item), estimate),
            str(count),
            "confirmed" if item.is_confirmed else "exploratory",
        )
        for item in comparison.sensitivities
        for value, estimate, count in zip(item.values, item.metric, item.counts, strict=True)
    )
    header = ("setting", "model", "value", "metric", "best", "runs", "evidence")
    blocks: list[Block] = [_picture(SENSITIVITY, absent)]
    if not all(item.is_confirmed for item in comparison.sensitivities):
        blocks.append(Paragraph("Exploratory values are the best of several screening runs on one seed, which flatters them."))
    return (
        *blocks,
        Table("Best over the rest of the space, at each value of one setting.", header, lines, frozenset({0, 1, 3, 6})),
    )


def _layers(comparison: Comparison, absent: Mapping[str, str]) -> tuple[Block, ...]:
    if LAYERS in absent:
        return (_picture(LAYERS, absent),)
    depth = max(max(len(curve.trained), len(curve.initial)) for curve in comparison.layers)
    header = ("configuration", "measure", "when", *(str(layer) for layer in range(1, depth + 1)))
    lines = tuple(line for curve in comparison.layers for line in _layer_lines(curve, depth))
    return (
        Paragraph(
            "An untrained encoder may compress from layer to layer already, so each curve is read against its own at "
            "initialisation, not against zero."
        ),
        Picture(LAYERS),
        Table("White-box measures by encoder layer.", header, lines, frozenset({0, 1, 2})),
    )


def _layer_lines(curve: LayerCurve, depth: int) -> list[tuple[str, ...]]:
    found = {"trained": curve.trained, "at initialisation": curve.initial}
    name = MEASURE_NAMES.get(curve.measure, curve.measure.replace("_", " "))
    return [
        (curve.label, name, when, *(_number(value) for value in values), *("-" for _ in range(depth - len(values))))
        for when, values in found.items()
        if values
    ]


def _number(value: float) -> str:
    return amount_text(value) if math.isfinite(value) else "-"


def _correlations(comparison: Comparison) -> tuple[Block, ...]:
    names = list(dict.fromkeys(name for found in comparison.correlations.values() for name in found))
    if not names:
        return (Paragraph("No label-free measure stands beside enough probes to be correlated with them."),)
    lines = tuple(
        (FAMILY_NAMES.get(family, family), *(_correlation(found.get(name)) for name in names))
        for family, found in comparison.correlations.items()
    )
    return (
        Paragraph(
            "How well they order the runs of one family as the probe does: near 1 they may steer a sweep of that family, near "
            "0 they may not. They never rank one family against the other."
        ),
        Table(
            f"Spearman's rank correlation with the {metric_name('probe_top1')}.",
            ("family", *(metric_name(name) for name in names)),
            lines,
        ),
    )


def _correlation(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:+.2f}"


def _findings(comparison: Comparison) -> tuple[Block, ...]:
    blocks: list[Block] = []
    if comparison.findings:
        blocks.append(Paragraph("What the runs do not share, or lack:"))
        blocks.append(Bullets(tuple((f"{sentence(item.severity)}, `{item.key}`:", item.text) for item in comparison.findings)))
    else:
        blocks.append(Paragraph("Nothing is refused or flagged: the runs agree in all that they must share."))
    by_reason: dict[str, list[str]] = {}
    for name, why in comparison.excluded.items():
        by_reason.setdefault(why, []).append(name)
    if not by_reason:
        return (*blocks, Paragraph("No run was excluded."))
    num_unread = len(comparison.excluded.keys() - set(unique_names(comparison.rows).values()))
    unread = f", {num_unread} of which could not be read" if num_unread else ""
    blocks.append(Paragraph(f"Excluded, {len(comparison.excluded)} of {len(comparison.rows) + num_unread} runs{unread}:"))
    few = tuple((f"{count_text(len(names), 'run')}:", f"{_ended(why)} ({', '.join(names)})")
                for why, names in by_reason.items() if len(names) < _FOLD_FROM)  # fmt: skip
    many = (
        Folded(f"{count_text(len(names), 'run')}: {why}", ", ".join(names))
        for why, names in by_reason.items()
        if len(names) >= _FOLD_FROM
    )
    return (*blocks, *([Bullets(few)] if few else []), *many)


def _ended(text: str) -> str:
    return text.strip().rstrip(".")


def _commands(comparison: Comparison) -> tuple[Block, ...]:
    return (Commands(comparison.commands),) if comparison.commands else (Paragraph("No command was recorded."),)
