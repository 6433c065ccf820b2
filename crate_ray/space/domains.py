"""Values of one key: all of them, or the one that a uniform number stands for.

In: a Domain. Out: plain numbers, strings and lists. Numbers are cut to a few digits, so that a value reads the same in a file,
in a table and in a folder's identity; the price is a grid of drawn values, finer than any training would notice.
"""

import hashlib
import math
from typing import Any

from crate_ray.config import Domain
from crate_ray.space.point import canonical

_GRID_DIGITS = 12
_DRAW_DIGITS = 6


def list_values(domain: Domain) -> list[Any]:
    """Every value of a domain that has an end, in order.

    Raises:
        ValueError: A dependent, or a range without `num`.
    """
    if domain.grid is not None or domain.choice is not None:
        return list(domain.grid or domain.choice or ())
    if domain.quantized is not None:
        return _steps(*domain.quantized)
    low_high = domain.uniform or domain.loguniform
    if low_high is None or domain.num is None:
        raise ValueError(f"a domain of kind {domain.kind} has no list of values")
    shares = [i / (domain.num - 1) for i in range(domain.num)]
    return [_between(domain, share, _GRID_DIGITS) for share in shares]


def draw_value(domain: Domain, uniform: float) -> Any:
    """The value that a number in [0, 1) stands for."""
    if domain.uniform is not None or domain.loguniform is not None:
        return _between(domain, uniform, _DRAW_DIGITS)
    values = list_values(domain)
    return values[int(uniform * len(values))]


def uniform_number(*parts: Any) -> float:
    """A number in [0, 1) that follows from the parts alone: no generator, so that no draw depends on how many came before.

    The first 53 bits of SHA-256 over the parts' canonical JSON.
    """
    digest = hashlib.sha256(canonical(parts).encode()).digest()
    return float((int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53)


def round_digits(value: float, digits: int) -> float:
    """A number with so many significant digits."""
    return float(f"{value:.{digits}g}")


def _steps(low: float, high: float, step: float) -> list[Any]:
    """low, low + step, ... up to high; whole numbers where all three are."""
    count = math.floor((high - low) / step + 1e-9) + 1
    if all(number.is_integer() for number in (low, high, step)):
        return [int(low) + i * int(step) for i in range(count)]
    return [round_digits(low + i * step, _GRID_DIGITS) for i in range(count)]


def _between(domain: Domain, share: float, digits: int) -> float:
    if domain.uniform is not None:
        low, high = domain.uniform
        value = low + share * (high - low)
    else:
        assert domain.loguniform is not None
        low, high = domain.loguniform
        value = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return min(max(round_digits(value, digits), low), high)
