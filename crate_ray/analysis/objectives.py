"""How objectives and keys of a sweep are named, scaled and rounded in reports and pictures.

In: names of objectives and dotted keys. Out: labels, numbers with units. One table, so that a figure and a sentence about it
never differ in unit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crate_ray.config import LARGER_IS_BETTER


@dataclass(frozen=True)
class Measure:
    """One objective as people read it: its number times `scale`, with `decimals`; None for four significant digits.

    `unit` belongs to a value, `difference_unit` to a difference: two percentages differ by points.
    """

    name: str
    label: str
    scale: float
    decimals: int | None
    unit: str = ""
    difference_unit: str = ""

    @property
    def is_larger_better(self) -> bool:
        """Whether more of it is better."""
        return LARGER_IS_BETTER[self.name]

    @property
    def axis(self) -> str:
        """The label with its unit, for an axis or a column."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def text(self, value: float | None) -> str:
        """A value without its unit; "-" where there is none."""
        return "-" if value is None or math.isnan(value) else f"{self.scale * value:{self._format}}"

    def with_unit(self, value: float) -> str:
        """A value with its unit."""
        return self.text(value) + ("%" if self.unit == "%" else f" {self.unit}" if self.unit else "")

    def difference_text(self, value: float) -> str:
        """A difference with its sign, without its unit."""
        return f"{self.scale * value:+{self._format}}"

    @property
    def _format(self) -> str:
        return ".4g" if self.decimals is None else f".{self.decimals}f"


MEASURES = {
    measure.name: measure
    for measure in (
        Measure("eval_loss", "validation loss", 1, 4),
        Measure("knn_top1", "kNN top-1 on validation", 100, 1, "%", "points"),
        Measure("probe_top1", "linear probe top-1 on validation", 100, 1, "%", "points"),
        Measure("params_m", "trainable parameters", 1, None, "millions", "millions"),
        Measure("encoder_params_m", "trainable encoder parameters", 1, None, "millions", "millions"),
        Measure("gflops", "forward GFLOPs an image", 1, None, "", "GFLOPs"),
        Measure("images_per_s", "training images/s", 1, 0, "", "images/s"),
    )
}


def key_names(keys: list[str]) -> dict[str, str]:
    """The last part of each dotted key; the whole key where two end alike."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def count_text(number: int, noun: str) -> str:
    """'1 trial', '2 trials'."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def amount_text(value: float) -> str:
    """Three digits, and no exponent from 0.0001 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def value_text(value: Any) -> str:
    """One value of a key, short."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(value_text(item) for item in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def values_text(values: Mapping[str, Any]) -> str:
    """Keys with their values in one line: 'encoder_depth 4, lr 0.001'."""
    names = key_names(list(values))
    return ", ".join(f"{names[key]} {value_text(value)}" for key, value in values.items()) or "the base alone"
