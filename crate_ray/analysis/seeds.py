"""Several seeds of each recipe as one row each, and the differences between recipes.

In: rows by recipe and seed. Out: mean rows whose intervals are over seeds, and paired differences.
The bootstrap of one run tells about the images; only seeds tell about the training.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

from crate_ray.analysis.statistics import PairedInterval, paired_t_interval
from crate_ray.analysis.table import ComparisonRow, Estimate

_AVERAGED = (
    "images_per_s",
    "train_seconds",
    "eval_loss",
    "control_top1",
    "cls_top1",
    "fewshot10_top1",
    "fewshot50_top1",
    "knn_top1",
    "raw_pixels_top1",
)


@dataclass(frozen=True)
class RecipeDifference:
    """Probe top-1 of `first` minus that of `second`, paired by seed."""

    first: str
    second: str
    top1: PairedInterval


@dataclass(frozen=True)
class SeedSummary:
    """One row a recipe, averaged over seeds, and every paired difference between recipes."""

    rows: list[ComparisonRow]
    differences: list[RecipeDifference]


def aggregate_seeds(rows_by_seed: Mapping[int, Sequence[ComparisonRow]]) -> SeedSummary:
    """Averages each recipe over its seeds; t intervals over seeds replace the bootstrap ones.

    Args:
        rows_by_seed: For each seed the rows of every recipe.

    Raises:
        ValueError: Fewer than two seeds, a recipe twice in a seed, or seeds with different recipes.
    """
    by_seed = {seed: {row.recipe: row for row in rows} for seed, rows in sorted(rows_by_seed.items())}
    for seed, rows in rows_by_seed.items():
        if len(by_seed[seed]) != len(rows):
            raise ValueError(f"seed {seed} holds a recipe twice; give one row a recipe and seed")
    recipes = list(next(iter(by_seed.values()), {}))
    for seed, rows_of in by_seed.items():
        if set(rows_of) != set(recipes):
            raise ValueError(
                f"seed {seed} has recipes {sorted(rows_of)}, another {sorted(recipes)}: pair every recipe on every seed"
            )
    series = {recipe: [rows_of[recipe] for rows_of in by_seed.values()] for recipe in recipes}
    rows = [_average(runs, tuple(by_seed)) for runs in series.values()]
    differences = [
        RecipeDifference(
            a,
            b,
            paired_t_interval([p.probe_top1.value - q.probe_top1.value for p, q in zip(series[a], series[b], strict=True)]),
        )
        for a, b in combinations(recipes, 2)
    ]
    return SeedSummary(rows, differences)


def _average(runs: Sequence[ComparisonRow], seeds: tuple[int, ...]) -> ComparisonRow:
    averaged: dict[str, Any] = {name: fmean(getattr(row, name) for row in runs) for name in _AVERAGED}
    averaged |= {name: sum(getattr(row, name) for row in runs) for name in ("rollbacks", "skipped_steps")}
    top1 = _estimate([row.probe_top1.value for row in runs])
    gain = _estimate([row.gain.value for row in runs])
    return dataclasses.replace(runs[0], **averaged, probe_top1=top1, gain=gain, seeds=seeds)


def _estimate(values: Sequence[float]) -> Estimate:
    interval = paired_t_interval(values)
    return Estimate(interval.mean, interval.low, interval.high)
