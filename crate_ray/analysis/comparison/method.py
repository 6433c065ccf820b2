"""How a comparison was measured: protocol, statistics, and what the intervals cover and what they do not.

In: a comparison. Out: a list. It names only what took place: a report of one seed says nothing of tests between seeds.
"""

from crate_ray.analysis.comparison.document import Block, Bullets
from crate_ray.analysis.comparison.result import Comparison
from crate_ray.analysis.comparison.wording import metric_measure, most_seeds
from crate_ray.analysis.objectives import count_text

_RUNS = "only those that took the last step of their schedule; an end cut short is compared with nothing."
_OVER_SEEDS = (
    "mean with a 95% t interval, n - 1 degrees of freedom. They cover the luck of training: first weights, order of samples, "
    "crops and masks. They do not cover another draw of training images, another test set, other hardware, or what more tuning "
    "would have found."
)
_OVER_IMAGES = (
    "95% over source images, never over rows, with the trained models held fixed: a bootstrap for one run, a clustered t "
    "interval for a difference. They cover which images are judged, and nothing of the luck of training."
)
_HYPOTHESES = (
    "declared from sizes, costs and the choices of the screening, never from what is tested. Equal are: encoder parameters "
    "within 5% after equal images within 1%; training PFLOPs within 5%; exclusive hours within 5% on equal hardware."
)
_TESTS = (
    "differences are paired by seed; two-sided paired t test; p values corrected by Holm over all pairs tested in this report, "
    "of which one that is equal in several ways counts once; a pair refused beforehand is not tested. The intervals beside "
    "them are not corrected: each covers 95% by itself."
)
_NO_VERDICT = (
    "below 5 pairs, with unequal tuning budgets, or across runs that differ in a key that is refused. “Not distinguishable” "
    "means that the corrected test does not reject equality; it does not mean that the two are equal."
)
_CURVES = {
    "power_law": "y = a - b x^-c (a + b x^-c of a loss) with 95% intervals, where 5 sizes of 3 seeds or more lie on one",
    "log_linear": "straight lines over log cost between the configurations that no other of the family beats at less",
}
_RATIOS = (
    "read at the best configuration of one family that the front of the other passes, chosen from means alone. The interval "
    "holds every place that a paired t test over seeds does not tell from it; where the measured range does not close it, it "
    "stays open, at 0 or infinity. Nothing is extrapolated."
)
_PARAMETERS = "trainable ones. Of the encoder first, which is what is kept after pretraining; then all, with the decoder."
_COMPUTE = (
    "forward and backward of what is executed for an image, in closed form, masked tokens only where they are processed, times "
    "the images seen; a multiplication and an addition are two operations."
)
_NO_TIME = "not compared. Wall time of training depends on what else the machine did, so only an exclusive timing pass counts."
_TIME = "images seen over the images a second of a timing pass that had the machine to itself; not the wall time of training."


def method(comparison: Comparison) -> tuple[Block, ...]:
    """The list that the report ends with."""
    items = [
        ("Metric:", _metric(comparison)),
        ("Runs:", _RUNS),
        *_intervals(comparison),
        *_tests(comparison),
        *_curves(comparison),
        ("Parameters:", _PARAMETERS),
        ("Compute:", _COMPUTE),
        ("Time:", _time(comparison)),
        *_controls(comparison),
    ]
    return (Bullets(tuple(items)),)


def _metric(comparison: Comparison) -> str:
    protocols = sorted({row.probe_protocol for item in comparison.configurations for row in item.rows if row.probe_protocol})
    version = f", probe protocol {' and '.join(map(str, protocols))}" if protocols else ""
    return f"{metric_measure(comparison).label}{version}."


def _intervals(comparison: Comparison) -> list[tuple[str, str]]:
    texts = [("Intervals over seeds:", _OVER_SEEDS)] if most_seeds(comparison) > 1 else []
    has_images = any(row.intervals for item in comparison.configurations for row in item.rows)
    if has_images or any(item.test_noise for item in comparison.differences):
        texts.append(("Intervals over test images:", _OVER_IMAGES))
    return texts


def _tests(comparison: Comparison) -> list[tuple[str, str]]:
    if not comparison.differences:
        return []
    declared = f"{count_text(len(comparison.differences), 'difference')}, {_HYPOTHESES}"
    return [("Hypotheses:", declared), ("Tests:", _TESTS), ("No verdict:", _NO_VERDICT)]


def _curves(comparison: Comparison) -> list[tuple[str, str]]:
    kinds = {curve.kind for curve in comparison.curves}
    texts = [text for kind, text in _CURVES.items() if kind in kinds]
    curves = [("Curves:", f"{'; '.join(texts)}. They end where the measured range ends.")] if texts else []
    has_ratio = any(ratio.ratio is not None for ratio in (*comparison.ratios, *comparison.total_ratios))
    return [*curves, *([("Ratios:", _RATIOS)] if has_ratio else [])]


def _time(comparison: Comparison) -> str:
    compared = [row for item in comparison.configurations for row in item.rows]
    hardware = sorted({row.hardware for row in compared if row.hardware and row.timing == "exclusive"})
    return f"{_TIME} Measured on {', '.join(hardware)}." if hardware else _NO_TIME


def _controls(comparison: Comparison) -> list[tuple[str, str]]:
    texts = []
    if any(item.control is not None for item in comparison.configurations):
        texts.append(
            ("Untrained:", "the same encoder at initialisation, through the same probe; the gain is what training adds.")
        )
    if comparison.raw_pixels is not None:
        score = metric_measure(comparison).with_unit(comparison.raw_pixels)
        texts.append(("Raw pixels:", f"the same probe without a model: {score}."))
    return texts
