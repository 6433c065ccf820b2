"""The Pareto front: what no other candidate beats in one objective without losing in another.

In: candidates with objectives. Out: those on the front. Means over confirmed seeds are candidates as much as single trials;
a front of single trials flatters its members, which were the lucky ones of their size.
"""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Protocol, TypeVar

import numpy as np

from crate_ray.config import LARGER_IS_BETTER


class HasObjectives(Protocol):
    """Whatever has values by the names of objectives: a trial, or the mean of several."""

    def value_of(self, objective: str) -> float | None:
        """The value; None where it was not measured."""
        ...


Candidate = TypeVar("Candidate", bound=HasObjectives)


def front(candidates: Sequence[Candidate], objectives: Sequence[str]) -> list[Candidate]:
    """The candidates that no other one dominates, in the order given.

    One dominates another where it is at least as good in every objective and better in one; equals stand together.
    Candidates without a finite value in every objective take no part. Directions are `config.LARGER_IS_BETTER`.

    Raises:
        ValueError: Fewer than two objectives: that is a ranking.
    """
    if len(objectives) < 2:
        raise ValueError(f"a front needs two objectives or more, got {list(objectives)}; rank by one")
    costs = [_costs(candidate, objectives) for candidate in candidates]
    complete = [index for index, cost in enumerate(costs) if np.isfinite(cost).all()]
    of_complete = np.array([costs[index] for index in complete]).reshape(len(complete), len(objectives))
    kept = front_of_two(of_complete) if len(objectives) == 2 else _front_of_many(of_complete)
    return [candidates[complete[index]] for index in sorted(kept)]


def _costs(candidate: HasObjectives, objectives: Sequence[str]) -> list[float]:
    """Smaller is better in every place; NaN where there is no value."""
    values = [candidate.value_of(name) for name in objectives]
    signs = [-1.0 if LARGER_IS_BETTER[name] else 1.0 for name in objectives]
    return [math.nan if value is None else sign * value for sign, value in zip(signs, values, strict=True)]


def front_of_two(costs: np.ndarray) -> list[int]:
    """Indices of the (N, 2) costs that no other dominates, smaller being better, by the first cost; equals stand together.

    O(n log n): from the least first cost on, each must undercut the second cost of all before it.
    """
    order = sorted(range(len(costs)), key=lambda index: tuple(costs[index]))
    kept: list[int] = []
    lowest = math.inf
    for _, equals in groupby(order, key=lambda index: tuple(costs[index])):
        group = list(equals)
        if costs[group[0], 1] < lowest:
            lowest = float(costs[group[0], 1])
            kept += group
    return kept


def _front_of_many(costs: np.ndarray) -> list[int]:
    """O(n^2): each against all."""
    return [index for index, cost in enumerate(costs) if not ((costs <= cost).all(axis=1) & (costs < cost).any(axis=1)).any()]
