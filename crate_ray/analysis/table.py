"""The comparison as rows: one model each, every number that the report prints.

In: numbers measured elsewhere. Out: frozen rows, their JSON form and the keys in which runs
are not comparable. Values not measured are NaN, written to JSON as the string "NaN".
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from crate_ray.config import SCHEMA_VERSION

NOT_MEASURED = math.nan


class Estimate(NamedTuple):
    """A value and the ends of its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One model of a comparison. Accuracies are shares in [0, 1]; GFLOPs are 1e9 operations, 2 a multiply-add.

    `gain` is probe top-1 minus that of the same architecture untrained, on the same images. `rollbacks` and `skipped_steps`
    count what was done about losses and gradients that were not finite; over several seeds they are sums.
    """

    name: str
    family: str
    recipe: str
    params_trainable: int
    params_encoder: int
    params_paper: int
    gflops_forward: float
    training_gflops_per_image: float
    train_pflops: float
    images_per_s: float
    train_seconds: float
    eval_loss: float
    probe_top1: Estimate
    control_top1: float
    gain: Estimate
    cls_top1: float = NOT_MEASURED
    fewshot10_top1: float = NOT_MEASURED
    fewshot50_top1: float = NOT_MEASURED
    knn_top1: float = NOT_MEASURED
    raw_pixels_top1: float = NOT_MEASURED
    mask_ratio: float
    patch_size: int
    norm_pix_loss: bool
    seeds: tuple[int, ...]
    rollbacks: int = 0
    skipped_steps: int = 0

    @property
    def beats_control(self) -> bool:
        """Whether the whole interval of the gain lies above 0."""
        return self.gain.low > 0


def comparison_to_json(rows: Sequence[ComparisonRow], **extra: Any) -> str:
    """The comparison as JSON text; non-finite numbers are strings, `extra` stands beside the rows."""
    content = {
        "schema_version": SCHEMA_VERSION,
        **extra,
        "rows": [{**_row_values(row), "beats_control": row.beats_control} for row in rows],
    }
    return json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"


def incomparable(fingerprints: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Keys of the compare fingerprints that differ, each with its value by run; None where a run lacks the key."""
    keys = sorted({key for parts in fingerprints.values() for key in parts})
    table = [(key, {name: parts.get(key) for name, parts in fingerprints.items()}) for key in keys]
    return [(key, values) for key, values in table if any(value != next(iter(values.values())) for value in values.values())]


def losses_comparable(rows: Sequence[ComparisonRow]) -> bool:
    """Whether reconstruction losses answer the same question: equal mask ratio, patch size and target."""
    return len({(row.mask_ratio, row.patch_size, row.norm_pix_loss) for row in rows}) <= 1


def _row_values(row: ComparisonRow) -> dict[str, Any]:
    values = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    return {key: value._asdict() if isinstance(value, Estimate) else value for key, value in values.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value
