"""What a comparison found, as plain frozen values: the one thing that figures, reports and tables read.

In: nothing. Out: types. Accuracies are shares in [0, 1]; parameters are counts, compute PFLOPs, time hours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from crate_ray.runs.rows import Estimate, RunRow

Axis = Literal["params", "flops", "time"]
AXES: tuple[Axis, ...] = ("params", "flops", "time")
Severity = Literal["refused", "flagged", "noted"]


@dataclass(frozen=True)
class Finding:
    """Something that runs do not share, or lack.

    Attributes:
        severity: refused: no verdict across it. flagged: a verdict that says so. noted: to be known.
        key: What differs: "data.digest", "tuning_trials", "code", ...
        values: Each value with the runs or models that have it.
        text: The sentence that reports and terminals print.
    """

    severity: Severity
    key: str
    values: Mapping[str, tuple[str, ...]]
    text: str


@dataclass(frozen=True)
class Configuration:
    """Runs that differ in their seed alone.

    Attributes:
        key: RunRow.configuration.
        label: What figures and tables call it: "CRATE-MAE 4x128", unique in the comparison.
        family: crate or vit.
        model: As RunRow.model.
        arm: Of its sweep.
        rows: One a seed, in the order of seeds; completed runs with a finite metric.
        missing: Why a planned or started seed is not among them.
        metric: Mean over the seeds with its t interval; with one seed the interval is NaN.
        control: Mean metric of the same encoders untrained; None where it was not measured.
        positions: Where it stands on each axis, mean over its seeds: encoder parameters, training PFLOPs, exclusive hours.
        params_total: Trainable parameters of the whole model.
        is_confirmed: Whether it was retrained with seeds that chose nothing.
        tuning_trials: Of its arm; the most, where several sweeps confirmed it.
        gain: The metric minus that of the untrained control of the same seed: over seeds, or a single seed's over source
            images; None where that was not measured.
    """

    key: str
    label: str
    family: str
    model: str
    arm: str | None
    rows: tuple[RunRow, ...]
    missing: Mapping[int, str]
    metric: Estimate
    control: float | None
    positions: Mapping[Axis, float | None]
    params_total: int
    is_confirmed: bool
    tuning_trials: int | None
    gain: Estimate | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of its rows."""
        return tuple(row.seed for row in self.rows)

    @property
    def beats_control(self) -> bool | None:
        """Whether the whole interval of the gain lies above 0; None without one."""
        return None if self.gain is None else self.gain.low > 0


@dataclass(frozen=True)
class Difference:
    """One hypothesis: CRATE minus MAE, paired by seed, on one axis or between the best of each.

    Attributes:
        axis: Where the two are equal; "best": each family's choice of the screening, wherever it stands.
        first: A configuration of CRATE.
        second: A configuration of MAE.
        seeds: Those that both have.
        dropped: Why a seed of either is not among them.
        interval: Of the difference, over seeds (95%, n - 1 degrees of freedom); None with fewer than two pairs.
        p_value: Of a two-sided paired t test; None as above.
        p_holm: Holm-corrected over all pairs of the comparison; a pair that stands on two axes is one hypothesis.
        test_noise: 95% interval of the difference of the seeds' means over source images, the models held fixed; None where
            the answers of the runs are not at hand.
        why_no_verdict: Why no verdict is given: too few seeds, unequal tuning, ...; None where one is.
        verdict: One sentence.
        flags: What a reader must know with it: tuning budget not recorded, unequal code, ...
    """

    axis: Axis | Literal["best"]
    first: Configuration
    second: Configuration
    seeds: tuple[int, ...]
    dropped: Mapping[int, str]
    interval: Estimate | None
    p_value: float | None
    p_holm: float | None
    test_noise: Estimate | None
    why_no_verdict: str | None
    verdict: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Curve:
    """What a family reaches along an axis.

    Attributes:
        family: crate or vit.
        axis: Of `x`.
        kind: "power_law" with at least 5 sizes x 3 seeds, else "log_linear" between the points of the front.
        front: Labels of the configurations that no other of the family beats at less, by rising x.
        x: Positions at which the curve is drawn, never outside those measured.
        y: Metric there.
        low: Lower end of the 95% band; empty without one.
        high: Upper end.
        parameters: Of the power law with their intervals; empty otherwise.
        model: Whose; the two baselines of MAE are two curves.
    """

    family: str
    axis: Axis
    kind: Literal["power_law", "log_linear"]
    front: tuple[str, ...]
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    parameters: Mapping[str, Estimate] = field(default_factory=dict)
    model: str = ""


@dataclass(frozen=True)
class Ratio:
    """What CRATE needs of MAE's parameters, compute or time for the same metric.

    Attributes:
        axis: What is counted.
        baseline: Model of MAE that it is against.
        metric_value: Where the two are equal; inside what both reached.
        ratio: CRATE's over MAE's; None where there is none.
        why_not: Why there is none.
        sentence: In words.
    """

    axis: Axis
    baseline: str
    metric_value: float | None
    ratio: Estimate | None
    why_not: str | None
    sentence: str


@dataclass(frozen=True)
class Sensitivity:
    """A metric along one setting, all else as the sweep had it.

    Attributes:
        key: mask_ratio, ista_step_size or ista_threshold (step size x lambda).
        family: crate or vit.
        values: Of the setting, rising.
        metric: At each value, best over the rest of the space; its interval is NaN with one seed.
        counts: Runs at each value.
        is_confirmed: Whether all of them are of fresh seeds; otherwise it is exploratory and called so.
        model: Whose; the two baselines of MAE stand apart.
        measure: What `metric` is of, where that is not the comparison's metric: a screening is judged by less.
    """

    key: str
    family: str
    values: tuple[float, ...]
    metric: tuple[Estimate, ...]
    counts: tuple[int, ...]
    is_confirmed: bool
    model: str = ""
    measure: str | None = None


@dataclass(frozen=True)
class LayerCurve:
    """A white-box measure layer by layer, beside the same model at initialisation.

    Attributes:
        label: Of the configuration.
        family: crate or vit.
        measure: coding_rate_post_nats, nonzero_fraction, ...
        trained: One value a layer; NaN where it was not measured.
        initial: The same at step 0; empty without it.
    """

    label: str
    family: str
    measure: str
    trained: tuple[float, ...]
    initial: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """Everything that a report says.

    Attributes:
        name: Experiment, sweep or folder compared.
        metric: Name of the metric, as in RunRow.values.
        is_larger_better: Of the metric.
        judged_split: What it was judged on; None for a loss.
        rows: Of all runs that were read, compared or not.
        excluded: Why a run is not compared, by its name.
        findings: Refusals first.
        configurations: By family, then by encoder parameters.
        differences: The pre-declared family of hypotheses, by axis.
        curves: By axis and family.
        ratios: By axis.
        sensitivities: Where a setting was varied.
        layers: Of each family's choice.
        correlations: Spearman's rank correlation of label-free measures and kNN with the probe, by family, then by measure.
        raw_pixels: Accuracy of the probe on pixels, where it was measured.
        verdicts: One sentence for each axis, headline axis first.
        headline: The first line of reports and notes.
        commands: What produced it.
        total_ratios: As `ratios` on the axis of parameters, of all trainable parameters in the place of the encoder's.
    """

    name: str
    metric: str
    is_larger_better: bool
    judged_split: str | None
    rows: tuple[RunRow, ...]
    excluded: Mapping[str, str]
    findings: tuple[Finding, ...]
    configurations: tuple[Configuration, ...]
    differences: tuple[Difference, ...]
    curves: tuple[Curve, ...]
    ratios: tuple[Ratio, ...]
    sensitivities: tuple[Sensitivity, ...]
    layers: tuple[LayerCurve, ...]
    correlations: Mapping[str, Mapping[str, float]]
    raw_pixels: float | None
    verdicts: Mapping[str, str]
    headline: str
    commands: tuple[str, ...]
    total_ratios: tuple[Ratio, ...] = ()
