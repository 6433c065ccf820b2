"""The solver that makes arms equal in size or cost: which width and depth of one arm match a point of another.

In: the space of the arm to solve for, its fixed keys, a target. Out: the candidate within the tolerance whose depth is nearest
the target's, then the one whose quantity is; or the nearest one, when none is within. Every candidate is tried: widths and
depths are few (thousands at most), the arithmetic is exact, and divisibility by heads makes the set too ragged for anything
cleverer.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crate_ray.config import ConfigError
from crate_ray.config.sweep import MatchConfig
from crate_ray.space.arms import ArmSpace
from crate_ray.space.costs import quantities
from crate_ray.space.domains import list_values
from crate_ray.space.point import Point, canonical


@dataclass(frozen=True)
class Target:
    """What is to be matched.

    Attributes:
        point: The point of the arm that others are matched to.
        value: Its quantity.
        depth: Layers of its encoder.
        chosen: Its independent values.
    """

    point: Point
    value: float
    depth: int
    chosen: Mapping[str, Any]


@dataclass(frozen=True)
class Match:
    """A solved pair, or how near it came.

    Attributes:
        target: The point that was to be matched.
        arm: The arm that was solved for.
        quantity: Its name.
        wanted: The target's.
        achieved: That of the solution, or of the nearest candidate.
        values: Resolved values of that one.
        is_within: Whether it is a solution.
    """

    target: Point
    arm: str
    quantity: str
    wanted: float
    achieved: float
    values: Mapping[str, Any]
    is_within: bool

    @property
    def difference(self) -> float:
        """(achieved - wanted) / wanted."""
        return self.achieved / self.wanted - 1


@dataclass(frozen=True)
class _Candidate:
    values: Mapping[str, Any]
    quantity: float
    depth: int


class Solver:
    """Matches one arm to targets; candidates are counted once for all targets that leave the arm's other keys equal."""

    def __init__(self, space: ArmSpace, match: MatchConfig) -> None:
        self._space, self._match = space, match
        self._solved = [key for key in match.over if not match.over[key].is_dependent]
        self._grids = [list_values(match.over[key]) for key in self._solved]
        self._candidates: dict[str, list[_Candidate]] = {}

    def solve(self, target: Target, fixed: Mapping[str, Any]) -> Match:
        """The best match of a target.

        Args:
            target: What is to be matched.
            fixed: The arm's independent keys that are not solved for.

        Raises:
            ConfigError: No candidate makes a run at all.
        """
        candidates = self._try_all(fixed)
        errors = [abs(candidate.quantity / target.value - 1) for candidate in candidates]
        within = [i for i, error in enumerate(errors) if error <= self._match.within]
        best = min(
            within or range(len(candidates)),
            key=lambda i: (
                abs(candidates[i].depth - target.depth) if within else 0,
                errors[i],
                canonical(candidates[i].values),
            ),
        )
        found = candidates[best]
        values = self._space.resolve({**fixed, **{key: found.values[key] for key in self._solved}})
        return Match(target.point, self._space.arm, self._match.quantity, target.value, found.quantity, values, bool(within))

    def _try_all(self, fixed: Mapping[str, Any]) -> list[_Candidate]:
        """Every choice that makes a run; keys that no quantity looks at may differ between calls."""
        identity = canonical({key: value for key, value in fixed.items() if key.startswith(("model.", "train.", "task"))})
        if identity not in self._candidates:
            self._candidates[identity] = list(self._tried(fixed))
        if not self._candidates[identity]:
            raise ConfigError(
                f"match: no choice of {', '.join(self._match.over)} makes a run of arm '{self._space.arm}'; a head count must "
                "divide its width: let heads depend on it (of: model.width, times: 0.03125)"
            )
        return self._candidates[identity]

    def _tried(self, fixed: Mapping[str, Any]) -> list[_Candidate]:
        found = []
        for choice in itertools.product(*self._grids):
            try:
                values = self._space.resolve({**fixed, **dict(zip(self._solved, choice, strict=True))})
                config = self._space.config(values)
            except ConfigError:
                continue
            known = quantities(config, num_samples=self._space.num_samples)
            if self._match.quantity not in known:
                raise ConfigError(f"match.quantity = {self._match.quantity} needs the number of steps: set train.steps")
            found.append(_Candidate(values, known[self._match.quantity], config.model.encoder_depth))
        return found
