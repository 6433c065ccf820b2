"""How a comparison's models, axes and numbers are called, in sentences, tables and pictures alike.

In: names and numbers of a comparison. Out: text. One place, so that a picture and the sentence about it never differ in a name
or a unit.
"""

import math
from collections.abc import Mapping, Sequence

from crate_ray.analysis.comparison.result import Axis, Comparison, Configuration, Ratio, Sensitivity
from crate_ray.analysis.objectives import Measure, amount_text, count_text
from crate_ray.runs.rows import Estimate

FAMILY_NAMES: Mapping[str, str] = {"crate": "CRATE", "vit": "ViT"}
MODEL_NAMES: Mapping[str, str] = {
    "crate_mae": "CRATE-MAE",
    "crate_mae_visible": "CRATE-MAE (visible tokens)",
    "mae": "MAE (facebook)",
    "mae_all_tokens": "MAE (CRATE repository)",
    "crate": "CRATE",
    "crate_linear": "CRATE (linear embedding)",
    "vit_linear": "ViT",
}
BASELINES: Mapping[str, str] = {
    "mae": "its encoder sees the visible patches alone.",
    "mae_all_tokens": "a ViT whose encoder sees all tokens, as CRATE-MAE's does.",
}
"""The two MAE that every chart names, and what tells them apart."""
_CRATE_MAES = ("crate_mae", "crate_mae_visible")
AXIS_UNITS: Mapping[Axis, str] = {
    "params": "trainable encoder parameters",
    "flops": "training PFLOPs",
    "time": "exclusive training hours",
}
NO_TIME = "No run has an exclusive timing pass: `crate-ray time RUN...` makes one."
_METRIC_NAMES = {
    "probe_top1": "linear probe top-1",
    "cls_top1": "class-token probe top-1",
    "knn_top1": "kNN top-1",
    "fewshot10_top1": "10-label probe top-1",
    "fewshot50_top1": "50-label probe top-1",
    "finetune_top1": "fine-tuned top-1",
    "eval_loss": "validation loss",
}
MEASURE_NAMES: Mapping[str, str] = {
    "coding_rate_pre_nats": "coding rate before attention (nats)",
    "coding_rate_post_nats": "coding rate after attention (nats)",
    "nonzero_fraction": "share of non-zero entries",
    "ista_descent_ratio": "ISTA objective after over before",
    "ista_objective_ratio": "ISTA objective over its minimum",
    "dictionary_coherence": "coherence of the dictionary",
    "subspace_overlap": "overlap of the subspaces",
}
SETTING_NAMES: Mapping[str, str] = {
    "mask_ratio": "mask ratio",
    "ista_step_size": "ISTA step size",
    "ista_threshold": "ISTA threshold (step size x lambda)",
}


def metric_measure(comparison: Comparison) -> Measure:
    """How the metric of a comparison is named, scaled and rounded."""
    return measure_of(comparison.metric, comparison.judged_split)


def measure_of(name: str, judged_split: str | None) -> Measure:
    """How a metric is named, scaled and rounded: accuracies in percent, everything else as it is."""
    label = metric_name(name) + (f" on {judged_split}" if judged_split else "")
    if "top1" in name:
        return Measure(name, label, 100, 1, "%", "points")
    return Measure(name, label, 1, 4 if "loss" in name else None)


def sensitivity_measure(comparison: Comparison, item: Sensitivity) -> Measure:
    """Of what a sensitivity is. A screening is judged on validation, whatever the comparison is judged on."""
    return measure_of(item.measure or comparison.metric, comparison.judged_split if item.is_confirmed else "validation")


def sentence(text: str) -> str:
    """With a capital at its beginning."""
    return text[:1].upper() + text[1:]


def metric_name(name: str) -> str:
    """A metric as people call it."""
    return _METRIC_NAMES.get(name, name.replace("_", " "))


def model_name(model: str) -> str:
    """A model as people call it."""
    return MODEL_NAMES.get(model, model)


def family_names(comparison: Comparison) -> Mapping[str, str]:
    """What the two families of a comparison are called in short: a ViT is MAE where all of them are."""
    return {**FAMILY_NAMES, "vit": "MAE"} if is_against_mae(comparison) else FAMILY_NAMES


def is_against_mae(comparison: Comparison) -> bool:
    """Whether every ViT compared is an MAE, and no classifier; so too where there is none."""
    return all(item.model in BASELINES for item in comparison.configurations if item.family == "vit")


def opponents(comparison: Comparison) -> str:
    """'CRATE-MAE against MAE', 'CRATE against ViT'."""
    is_mae = all(item.model in _CRATE_MAES for item in comparison.configurations if item.family == "crate")
    names = family_names(comparison)
    return f"{'CRATE-MAE' if is_mae else names['crate']} against {names['vit']}"


def ratio_text(item: Ratio) -> str:
    """A ratio in words; an interval that holds 1 is no difference."""
    holds_one = item.ratio is not None and item.ratio.low <= 1 <= item.ratio.high
    return item.sentence + (" The interval holds 1, so the two are not distinguishable there." if holds_one else "")


def with_interval(measure: Measure, estimate: Estimate | None) -> str:
    """'90.1 [89.2, 91.0]', without the interval where there is none; "-" for None."""
    if estimate is None:
        return "-"
    value = measure.text(estimate.value)
    return f"{value} [{measure.text(estimate.low)}, {measure.text(estimate.high)}]" if has_interval(estimate) else value


def difference_text(measure: Measure, estimate: Estimate | None) -> str:
    """'+1.2 [+0.3, +2.1]'; "-" for None."""
    if estimate is None or math.isnan(estimate.value):
        return "-"
    value, low, high = (measure.difference_text(number) for number in estimate)
    return f"{value} [{low}, {high}]" if has_interval(estimate) else value


def has_interval(estimate: Estimate) -> bool:
    """Whether both ends are known; an end may be infinite."""
    return not (math.isnan(estimate.low) or math.isnan(estimate.high))


def parameters_text(count: float) -> str:
    """'0.0412M', '21.4M', '1,050M'."""
    return f"{amount_text(count / 1e6)}M"


def optional_amount(value: float | None) -> str:
    """An amount, or "-"."""
    return "-" if value is None else amount_text(value)


def p_text(p_value: float | None) -> str:
    """'0.032', '<0.001', or "-"."""
    if p_value is None or math.isnan(p_value):
        return "-"
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def seeds_text(seeds: Sequence[int]) -> str:
    """'5: 0 to 4', '3: 0, 2, 7', '1: 0'."""
    ordered = sorted(seeds)
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{len(ordered)}: {ordered[0]} to {ordered[-1]}"
    return f"{len(ordered)}: {', '.join(map(str, ordered))}"


def source_interval(configuration: Configuration, metric: str) -> Estimate | None:
    """Of a single seed, the metric's interval over test images; None with several seeds, whose interval says more."""
    return configuration.rows[0].intervals.get(metric) if len(configuration.rows) == 1 else None


def most_seeds(comparison: Comparison) -> int:
    """Of any configuration; 0 without one."""
    return max((len(item.rows) for item in comparison.configurations), default=0)


def read_text(comparison: Comparison) -> str:
    """How much was read and compared."""
    compared = sum(len(item.rows) for item in comparison.configurations)
    return (
        f"{count_text(len(comparison.rows), 'run')} read, {compared} compared in "
        f"{count_text(len(comparison.configurations), 'configuration')}, {len(comparison.excluded)} excluded"
    )
