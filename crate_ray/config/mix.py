"""Several data sets in one run: what each is, and in which whole numbers they alternate.

In: folders of shards with weights, as people write them. Out: the same, checked, and the smallest whole numbers in their ratio.
Whole numbers make the order of a mix periodic, so that any position of it is found in constant time. The price is a bound
on how finely weights may be graded: the numbers add up to 10,000 at most, and finer ratios are refused with the nearest ones.
"""

import math
import posixpath
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from pydantic import Field

from crate_ray.config.base import Frozen

MAX_PERIOD = 10_000
_SUGGESTED_PERIOD = 1_000


class MixPart(Frozen):
    """One of the data sets of a mix."""

    train: str = Field(description="folder or URL of its training shards with their index")
    weight: float = Field(1.0, gt=0, le=1e9, description="its samples are weight / (sum of all weights) of what is read")


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest whole numbers in the ratio of decimal weights: (0.5, 0.3) gives (5, 3)."""
    exact = [Fraction(repr(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    numbers = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*numbers)
    return tuple(number // divisor for number in numbers)


def _place(url: str) -> str:
    """One spelling for each place: absolute, and without `..`."""
    path = url.removeprefix("file://")
    return posixpath.normpath(path if "://" in path else Path(path).expanduser().absolute())


def check_mix(mix: Sequence[MixPart]) -> None:
    """Refuses a mix that has no order.

    Raises:
        ValueError: No data set, one that comes twice, or weights whose ratio is too fine.
    """
    if not mix:
        raise ValueError("a mix needs at least one data set: [{train: URL, weight: 1.0}, ...]")
    places = [_place(part.train) for part in mix]
    twice = next((part.train for part, place in zip(mix, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is named twice; name it once, with the sum of the weights")
    weights = [part.weight for part in mix]
    period = sum(whole_weights(weights))
    if period > MAX_PERIOD:
        total = math.fsum(weights)
        near = [max(1, round(_SUGGESTED_PERIOD * weight / total)) for weight in weights]
        raise ValueError(
            f"the weights {', '.join(f'{weight:g}' for weight in weights)} are graded too finely: as whole numbers they add up "
            f"to {period:,}, and {MAX_PERIOD:,} is the most; use {', '.join(map(str, near))}"
        )
