"""The protocols that numbers are measured by, as data: a name, a version, and what is fixed.

In: nothing. Out: one Protocol for every family of numbers, and the linear probes of each. A version changes whenever one of its
numbers could change, and stands beside every number that is stored, so that two numbers are compared only where it is
equal. What the published texts leave open is decided here once and said in docs/evaluation.md; the trade-off is that a
number of a protocol is comparable with others of it, and with the published one only as far as those decisions are theirs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Token = Literal["mean", "cls", "both"]
ProtocolName = Literal["house", "published", "label-free"]

PROBE_PROTOCOL = 1
"""Of the house protocol; part of the compare digest of every run."""
C_GRID = (0.01, 0.1, 1.0)
LABEL_FREE_IMAGES = 25_600
"""As many as RankMe was measured on in its paper."""


@dataclass(frozen=True)
class Protocol:
    """What is fixed about some numbers.

    Attributes:
        name: Part of what is stored beside a number.
        version: The other part.
        features: What is read from the encoder.
        solver: What is fitted, and how far.
        splits: What is fitted, chosen and judged on.
        interval: Where the interval of a number comes from.
        needs_labels: Whether images without a label are refused.
    """

    name: str
    version: int
    features: str
    solver: str
    splits: str
    interval: str
    needs_labels: bool = True

    @property
    def stamp(self) -> str:
        """`name/version`, as stored beside a number."""
        return f"{self.name}/{self.version}"


@dataclass(frozen=True)
class LinearProbe:
    """One logistic regression.

    Attributes:
        token: Mean of the patch tokens, class token, or both side by side.
        standardise: Whether features are brought to mean 0 and deviation 1 of the training rows.
        c_grid: Inverse regularisations; validation chooses where there is more than one.
    """

    token: Token
    standardise: bool
    c_grid: tuple[float, ...]


_OVER_SOURCES = "95%, bootstrap over source images"

HOUSE = Protocol(
    name="house",
    version=PROBE_PROTOCOL,
    features="mean of the patch tokens (class token beside it) of the unmasked centre crop, standardised",
    solver="L2 logistic regression, float64 lbfgs to tolerance 1e-4; 10 and 50 labels a class, 20 draws; kNN of 20 at T .07",
    splits="fitted on training images, C of .01, .1, 1 by validation accuracy, judged on validation or test",
    interval=_OVER_SOURCES,
)
PUBLISHED = Protocol(
    name="published",
    version=1,
    features="class token (mean of the patch tokens, and both, beside it) of the unmasked centre crop, as it is",
    solver="L2 logistic regression, float64 lbfgs to tolerance 1e-4, C = 1, scikit-learn's default",
    splits="fitted on training images, nothing chosen, judged on validation or test",
    interval=_OVER_SOURCES,
)
LABEL_FREE = Protocol(
    name="label-free",
    version=1,
    features=f"mean of the patch tokens of up to {LABEL_FREE_IMAGES:,} unmasked validation images, spread over the split",
    solver="RankMe, alpha-ReQ, coding rate of the features at length 1 with eps .01",
    splits="validation, without its labels",
    interval="none",
    needs_labels=False,
)
FINE_TUNE = Protocol(
    name="fine-tune",
    version=1,
    features="the whole encoder, trained on, with a new head",
    solver="the classifier task: AdamW, base rate 5e-4, decay .05, layer decay .65, smoothing .1, 100 epochs",
    splits="trained on training images, judged on validation or test",
    interval="95%, bootstrap over source images of the mean over seeds; and the deviation over seeds",
)
CLASSIFIER = Protocol(
    name="classifier",
    version=1,
    features="the classifier itself, centre crop",
    solver="none",
    splits="judged on validation or test",
    interval=_OVER_SOURCES,
)

PROTOCOLS: Mapping[ProtocolName, Protocol] = {"house": HOUSE, "published": PUBLISHED, "label-free": LABEL_FREE}
"""Those that judge frozen features."""
PUBLISHED_PROBES: Mapping[str, LinearProbe] = {
    "published_probe_top1": LinearProbe("cls", standardise=False, c_grid=(1.0,)),
    "published_mean_top1": LinearProbe("mean", standardise=False, c_grid=(1.0,)),
    "published_both_top1": LinearProbe("both", standardise=False, c_grid=(1.0,)),
}
