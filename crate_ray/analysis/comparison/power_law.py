"""A saturating power law through sizes and their seeds, with intervals that stay honest when the data say little.

In: the place of each size and its values over seeds. Out: y = a - b x^-c with 95% profile intervals of a, b, c and of y at any
x. The law bends little over the sizes that anyone can afford, so a, b and c are nearly exchangeable and intervals from a local
slope are far too narrow. At a given c, though, the law is linear in the other two. So the fit is a search over c alone, and the
interval of anything linear is the union, over every c that the residuals allow, of its t interval at that c.

With l = log x and l0 its mean, the law is fitted as y = level + slope phi(l), phi(l) = (1 - exp(-c (l - l0))) / c, which tends
to a straight line over l as c goes to 0; a = level + slope / c and b = slope exp(c l0) / c.

Shapes: K sizes, C exponents, X places.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crate_ray.runs.rows import Estimate

Array = NDArray[np.float64]

_BENDS = (0.05, 20.0)
"""c times the log of the range of x: from a straight line to a law that is flat after a twentieth of the range."""
_COARSE, _ZOOM, _ZOOMS, _FINE = 121, 21, 4, 121
_BORROWED_DOF = 2
"""Each size has a variance of its own, to which that around the law adds as so many values. Without it three seeds say too
little of their spread, and with one variance for all the interval at the noisier end of the sizes is too narrow."""
_EXACT = 1e-9
"""A misfit below this share of the sum of squares is what the search leaves."""


@dataclass(frozen=True)
class PowerLaw:
    """A fit, as its profile over the exponent.

    Attributes:
        exponent_C: Exponents tried, rising.
        excess_C: Residual sum of squares above the least one, over the variance of a value around the law.
        level_CK: Weight of each size's mean in the best level at each exponent.
        slope_CK: The same of the best slope.
        mean_K: Means over seeds.
        error_K: Variance of each mean.
        error_dof_K: Its degrees of freedom.
        center: l0.
        dof: Values minus 3.
        misfit_p: p value of the lack of fit; near 0, the sizes do not lie on such a law.
        spread_p: p value of Bartlett's test; near 0, the seeds of some sizes vary more than those of others, and where they
            vary most, the intervals are too narrow.
    """

    exponent_C: Array
    excess_C: Array
    level_CK: Array
    slope_CK: Array
    mean_K: Array
    error_K: Array
    error_dof_K: Array
    center: float
    dof: int
    misfit_p: float
    spread_p: float

    def at(self, log_x_X: Array) -> tuple[Array, Array, Array]:
        """Value of the law at places, with the ends of its 95% interval there; three (X,) arrays."""
        phi_CX = _bend(self.exponent_C[:, None], log_x_X[None, :] - self.center)
        value_CX, half_CX = self._intervals(self.level_CK[:, None, :] + phi_CX[:, :, None] * self.slope_CK[:, None, :])
        return value_CX[self._best], np.nanmin(value_CX - half_CX, axis=0), np.nanmax(value_CX + half_CX, axis=0)

    def parameters(self, *, is_rising: bool = True) -> dict[str, Estimate]:
        """Asymptote a, scale b and exponent c of y = a - b x^-c, or of y = a + b x^-c; an open end is infinite."""
        c_C = self.exponent_C
        with np.errstate(over="ignore"):
            scale_C = (1 if is_rising else -1) * np.exp(c_C * self.center) / c_C
            scale = self._union(self.slope_CK, scale_C)
        asymptote = self._union(self.level_CK + self.slope_CK / c_C[:, None], np.ones_like(c_C))
        return {"asymptote": asymptote, "scale": scale, "exponent": self._exponent()}

    @property
    def _best(self) -> int:
        return int(self.excess_C.argmin())

    def _union(self, weight_CK: Array, times_C: Array) -> Estimate:
        """Interval of times x (weight @ means); while any straight line is allowed, a and b have no bound on that side."""
        value_C, half_C = (found[:, 0] for found in self._intervals(weight_CK[:, None, :]))
        ends_2C = times_C * np.stack([value_C - half_C, value_C + half_C])
        low, high = float(np.nanmin(ends_2C)), float(np.nanmax(ends_2C))
        if not np.isnan(half_C[0]):
            low, high = (-math.inf if ends_2C[:, 0].min() < 0 else low), (math.inf if ends_2C[:, 0].max() > 0 else high)
        return Estimate(float(times_C[self._best] * value_C[self._best]), low, high)

    def _intervals(self, weight_CXK: Array) -> tuple[Array, Array]:
        """Value of weights @ means and half its interval at each exponent, NaN where that is not allowed; two (C, X) arrays."""
        variance_CX = np.square(weight_CXK) @ self.error_K
        fourth_X = np.square(np.square(weight_CXK[self._best])) @ (np.square(self.error_K) / self.error_dof_K)
        with np.errstate(invalid="ignore"):
            dof_X = np.where(fourth_X > 0, np.square(variance_CX[self._best]) / fourth_X, self.dof)  # Satterthwaite
        room_CX = _t_square(dof_X)[None, :] - self.excess_C[:, None]
        half_CX = np.sqrt(np.where(room_CX >= 0, variance_CX * room_CX, np.nan))
        return weight_CXK @ self.mean_K, half_CX

    def _exponent(self) -> Estimate:
        over_C = self.excess_C - _t_square(np.array([self.dof]))
        inside = np.flatnonzero(over_C <= 0)
        first, last = int(inside[0]), int(inside[-1])
        low, high = 0.0, math.inf
        if first > 0:
            low = float(np.interp(0, over_C[[first, first - 1]], self.exponent_C[[first, first - 1]]))
        if last + 1 < len(over_C):
            high = float(np.interp(0, over_C[[last, last + 1]], self.exponent_C[[last, last + 1]]))
        return Estimate(float(self.exponent_C[self._best]), low, high)


def fit_power_law(x: Sequence[float], values: Sequence[Sequence[float]]) -> PowerLaw:
    """Least squares over all values.

    Args:
        x: Place of each size, above 0 and not all the same.
        values: Those of each size, one a seed; at least four sizes, of two seeds each.
    """
    log_x_K = np.log(np.asarray(x, dtype=np.float64))
    center = float(log_x_K.mean())
    count_K = np.array([len(of_size) for of_size in values], dtype=np.float64)
    mean_K = np.array([np.mean(of_size) for of_size in values])
    squares_K = np.array([np.square(np.asarray(of_size) - np.mean(of_size)).sum() for of_size in values])

    def misfits(exponent_C: Array) -> Array:
        level_CK, slope_CK = _line_weights(exponent_C, log_x_K - center, count_K)
        phi_CK = _bend(exponent_C[:, None], log_x_K[None, :] - center)
        fitted_CK = (level_CK @ mean_K)[:, None] + (slope_CK @ mean_K)[:, None] * phi_CK
        return np.asarray(np.square(mean_K - fitted_CK) @ count_K)

    exponent_C = np.geomspace(*_BENDS, _COARSE) / np.ptp(log_x_K)
    for _ in range(_ZOOMS):  # around the best one, so that it is exact
        best = int(misfits(exponent_C).argmin())
        near = exponent_C[[max(best - 1, 0), min(best + 1, len(exponent_C) - 1)]]
        exponent_C = np.union1d(exponent_C, np.geomspace(near[0], near[1], _ZOOM))
    misfit_C = misfits(exponent_C)
    dof = int(count_K.sum()) - 3
    variance = max((float(misfit_C.min()) + squares_K.sum()) / dof, np.finfo(np.float64).tiny)
    inside = np.flatnonzero(misfit_C - misfit_C.min() <= _t_square(np.array([dof])) * variance)
    ends = exponent_C[[max(inside[0] - 1, 0), min(inside[-1] + 1, len(exponent_C) - 1)]]
    exponent_C = np.union1d(exponent_C, np.geomspace(ends[0], ends[1], _FINE))  # the scale of x changes fast with c
    misfit_C = misfits(exponent_C)
    level_CK, slope_CK = _line_weights(exponent_C, log_x_K - center, count_K)
    error_dof_K = count_K - 1 + _BORROWED_DOF
    return PowerLaw(
        exponent_C=exponent_C,
        excess_C=(misfit_C - misfit_C.min()) / variance,
        level_CK=level_CK,
        slope_CK=slope_CK,
        mean_K=mean_K,
        error_K=(squares_K + _BORROWED_DOF * variance) / error_dof_K / count_K,
        error_dof_K=error_dof_K,
        center=center,
        dof=dof,
        misfit_p=_misfit_p(float(misfit_C.min()), mean_K, count_K, float(squares_K.sum())),
        spread_p=_spread_p(values),
    )


def _line_weights(exponent_C: Array, offset_K: Array, count_K: Array) -> tuple[Array, Array]:
    """Weights of the means in level and slope of a weighted line over phi, for each exponent; two (C, K) arrays."""
    phi_CK = _bend(exponent_C[:, None], offset_K[None, :])
    share_K = count_K / count_K.sum()
    phi_mean_C1 = (phi_CK @ share_K)[:, None]
    spread_CK = phi_CK - phi_mean_C1
    slope_CK = spread_CK * share_K / (np.square(spread_CK) @ share_K)[:, None]
    return share_K - phi_mean_C1 * slope_CK, slope_CK


def _bend(exponent: Array, offset: Array) -> Array:
    """phi: (1 - exp(-c offset)) / c."""
    return np.asarray(-np.expm1(-exponent * offset) / exponent)


def _t_square(dof_X: Array) -> Array:
    """Square of the 97.5% quantile."""
    from scipy import special

    return np.asarray(np.square(special.stdtrit(dof_X, 0.975)))


def _misfit_p(misfit: float, mean_K: Array, count_K: Array, within: float) -> float:
    """F test of the means against the law, by the spread inside the sizes."""
    from scipy import special

    if misfit <= _EXACT * float(count_K @ np.square(mean_K - np.average(mean_K, weights=count_K))):
        return 1.0
    dof, within_dof = len(mean_K) - 3, float(count_K.sum()) - len(mean_K)
    return float(special.fdtrc(dof, within_dof, (misfit / dof) / (within / within_dof))) if within > 0 else 0.0


def _spread_p(values: Sequence[Sequence[float]]) -> float:
    """Bartlett's test that all sizes vary alike; 1 where none varies, 0 where some do and others do not."""
    from scipy import stats

    varies = [bool(np.ptp(of_size) > 0) for of_size in values]
    return float(stats.bartlett(*values).pvalue) if all(varies) else float(not any(varies))
