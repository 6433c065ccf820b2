"""A saturating power law through sizes and their seeds, with intervals that stay honest when the data say little.

In: the place of each size and its values over seeds. Out: y = a - b x^-c with 95% profile intervals of a, b, c and of y at any
x. The law bends little over the sizes that anyone can afford, so a, b and c are nearly exchangeable and intervals from a local
slope are far too narrow. At a given c, though, the law is linear in the other two. So the fit is a search over c alone, and the
interval of anything linear is the union, over every c that the residuals allow, of its exact interval at that c. The noise of
all sizes is taken as equal.

With l = log x and l0 its mean, the law is fitted as y = level + slope phi(l), phi(l) = (1 - exp(-c (l - l0))) / c, which tends
to a straight line over l as c goes to 0; a = level + slope / c and b = slope exp(c l0) / c.

Shapes: K sizes, C exponents, X places.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crate_ray.runs.rows import Estimate

Array = NDArray[np.float64]

_BENDS = (0.05, 20.0)
"""c times the log of the range of x: from a straight line to a law that is flat after a tenth of the range."""
_COARSE, _ZOOM, _ZOOMS = 241, 41, 3
_EXACT = 1e-12
"""A misfit below this share of the sum of squares is rounding."""


@dataclass(frozen=True)
class PowerLaw:
    """A fit, as its profile over the exponent.

    Attributes:
        exponent_C: Exponents tried, rising.
        excess_C: Residual sum of squares above the least one.
        level_C: Best level at each exponent.
        slope_C: Best slope.
        covariance_C: Of level and slope, in units of the variance of a value: their variances and their covariance, (C, 3).
        center: l0.
        allowed: Largest excess inside a 95% interval: F(1, values - 3) times the variance of one value around the law.
        misfit_p: p value of the lack of fit; near 0, the sizes do not lie on such a law.
        spread_p: p value of Bartlett's test; near 0, the sizes do not share one variance, and the intervals do not hold.
    """

    exponent_C: Array
    excess_C: Array
    level_C: Array
    slope_C: Array
    covariance_C: Array
    center: float
    allowed: float
    misfit_p: float
    spread_p: float

    def at(self, log_x_X: Array) -> tuple[Array, Array, Array]:
        """Value of the law at places, with the ends of its 95% interval there; three (X,) arrays."""
        value_CX, unit_CX = self._surface(log_x_X)
        return self._profile(value_CX, unit_CX)

    def _surface(self, log_x_X: Array) -> tuple[Array, Array]:
        """Value of the law at places for each exponent, and its unit variance; two (C, X) arrays."""
        phi_CX = _bend(self.exponent_C[:, None], log_x_X[None, :] - self.center)
        level_var_C1, slope_var_C1, both_C1 = np.split(self.covariance_C, 3, axis=1)
        value_CX = self.level_C[:, None] + self.slope_C[:, None] * phi_CX
        return value_CX, level_var_C1 + 2 * phi_CX * both_C1 + phi_CX**2 * slope_var_C1

    def parameters(self, *, is_rising: bool = True) -> dict[str, Estimate]:
        """Asymptote a, scale b and exponent c of y = a - b x^-c, or of y = a + b x^-c; an open end is infinite."""
        c_C = self.exponent_C
        with np.errstate(over="ignore"):
            scale_C = (1 if is_rising else -1) * np.exp(c_C * self.center) / c_C
            b = self._linear(np.zeros_like(c_C), scale_C)
        return {"asymptote": self._linear(np.ones_like(c_C), 1 / c_C), "scale": b, "exponent": self._exponent()}

    def _linear(self, of_level_C: Array, of_slope_C: Array) -> Estimate:
        """of_level level + of_slope slope; where every straight line is allowed, it may be as large as one likes."""
        value_C = of_level_C * self.level_C + of_slope_C * self.slope_C
        level_var_C, slope_var_C, both_C = self.covariance_C.T
        unit_C = of_level_C**2 * level_var_C + 2 * of_level_C * of_slope_C * both_C + of_slope_C**2 * slope_var_C
        value, low, high = (float(end[0]) for end in self._profile(value_C[:, None], unit_C[:, None]))
        if self.excess_C[0] <= self.allowed:
            half = np.sqrt(slope_var_C[0] * (self.allowed - self.excess_C[0]))
            low = -np.inf if self.slope_C[0] - half < 0 else low
            high = np.inf if self.slope_C[0] + half > 0 else high
        return Estimate(value, float(low), float(high))

    def _profile(self, value_CX: Array, unit_CX: Array) -> tuple[Array, Array, Array]:
        """Best value, and the union over the exponents of its intervals at each."""
        room_C = self.allowed - self.excess_C
        is_in = room_C >= 0
        half_CX = np.sqrt(np.maximum(unit_CX[is_in], 0) * room_C[is_in, None])
        low_X, high_X = (value_CX[is_in] - half_CX).min(axis=0), (value_CX[is_in] + half_CX).max(axis=0)
        return value_CX[int(self.excess_C.argmin())], low_X, high_X

    def _exponent(self) -> Estimate:
        low, high = crossings(np.log(self.exponent_C), self.excess_C - self.allowed)
        is_in = self.excess_C <= self.allowed
        best = float(self.exponent_C[int(self.excess_C.argmin())])
        return Estimate(best, 0.0 if is_in[0] else float(np.exp(low)), np.inf if is_in[-1] else float(np.exp(high)))


def crossings(place_X: Array, over_X: Array) -> tuple[float, float]:
    """First and last place where a function sampled at rising places is at most 0, the ends interpolated."""
    inside = np.flatnonzero(over_X <= 0)
    first, last = int(inside[0]), int(inside[-1])
    low, high = float(place_X[first]), float(place_X[last])
    if first > 0:
        low = float(np.interp(0, over_X[[first, first - 1]], place_X[[first, first - 1]]))
    if last + 1 < len(place_X):
        high = float(np.interp(0, over_X[[last, last + 1]], place_X[[last, last + 1]]))
    return low, high


def fit_power_law(x: Sequence[float], values: Sequence[Sequence[float]]) -> PowerLaw:
    """Least squares over all values.

    Args:
        x: Place of each size, above 0 and not all the same.
        values: Those of each size, one a seed; at least four sizes, of two seeds each.
    """
    from scipy import stats

    log_x_K = np.log(np.asarray(x, dtype=np.float64))
    count_K = np.array([len(of_size) for of_size in values], dtype=np.float64)
    mean_K = np.array([np.mean(of_size) for of_size in values])
    within = float(sum(np.square(np.asarray(of_size) - np.mean(of_size)).sum() for of_size in values))
    center = float(log_x_K.mean())
    solve = _Lines(log_x_K - center, mean_K, count_K)
    exponent_C = np.geomspace(*_BENDS, _COARSE) / np.ptp(log_x_K)
    for _ in range(_ZOOMS):  # around the best one, so that it is exact
        best = int(solve(exponent_C)[0].argmin())
        near = exponent_C[[max(best - 1, 0), min(best + 1, len(exponent_C) - 1)]]
        exponent_C = np.union1d(exponent_C, np.geomspace(near[0], near[1], _ZOOM))
    misfit_C, level_C, slope_C, covariance_C = solve(exponent_C)
    misfit = float(misfit_C.min())
    dof = int(count_K.sum()) - 3
    return PowerLaw(
        exponent_C=exponent_C,
        excess_C=misfit_C - misfit,
        level_C=level_C,
        slope_C=slope_C,
        covariance_C=covariance_C,
        center=center,
        allowed=float(stats.f.ppf(0.95, 1, dof)) * (misfit + within) / dof,
        misfit_p=_misfit_p(misfit, len(mean_K) - 3, within, int(count_K.sum()) - len(mean_K), total=solve.total),
        spread_p=_spread_p(values),
    )


class _Lines:
    """Weighted lines over phi, one for each exponent.

    Args:
        offset_K: l - l0 of each size.
        mean_K: Mean over its seeds.
        count_K: Number of its seeds.
    """

    def __init__(self, offset_K: Array, mean_K: Array, count_K: Array) -> None:
        self._offset_K, self._mean_K, self._count_K = offset_K, mean_K, count_K
        self._grand = float(count_K @ mean_K / count_K.sum())
        self.total = float(count_K @ np.square(mean_K - self._grand))

    def __call__(self, exponent_C: Array) -> tuple[Array, Array, Array, Array]:
        """Sum of squares between means and line, level, slope, and their unit covariance, for each exponent."""
        phi_CK = _bend(exponent_C[:, None], self._offset_K[None, :])
        num_values = self._count_K.sum()
        phi_mean_C = phi_CK @ self._count_K / num_values
        phi_CK = phi_CK - phi_mean_C[:, None]
        square_C = np.square(phi_CK) @ self._count_K
        slope_C = phi_CK @ (self._count_K * (self._mean_K - self._grand)) / square_C
        misfit_C = np.square(self._mean_K - self._grand - slope_C[:, None] * phi_CK) @ self._count_K
        slope_var_C = 1 / square_C
        covariance_C = np.stack([1 / num_values + phi_mean_C**2 * slope_var_C, slope_var_C, -phi_mean_C * slope_var_C], axis=1)
        return misfit_C, self._grand - slope_C * phi_mean_C, slope_C, covariance_C


def _bend(exponent: Array, offset: Array) -> Array:
    """phi: (1 - exp(-c offset)) / c."""
    return np.asarray(-np.expm1(-exponent * offset) / exponent)


def _misfit_p(misfit: float, misfit_dof: int, within: float, within_dof: int, *, total: float) -> float:
    """F test of the means against the law, by the spread inside the sizes."""
    from scipy import stats

    if misfit <= _EXACT * total:
        return 1.0
    return float(stats.f.sf((misfit / misfit_dof) / (within / within_dof), misfit_dof, within_dof)) if within > 0 else 0.0


def _spread_p(values: Sequence[Sequence[float]]) -> float:
    """Bartlett's test that all sizes vary alike; 1 where none varies, 0 where some do and others do not."""
    from scipy import stats

    varies = [bool(np.ptp(of_size) > 0) for of_size in values]
    return float(stats.bartlett(*values).pvalue) if all(varies) else float(not any(varies))
