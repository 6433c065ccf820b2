"""Measures without labels, and how they go with an accuracy."""

import numpy as np
import pytest
from scipy import stats

from crate_ray.evaluation.label_free import feature_coding_rate, measure_features, rank_correlation


def features(rows: int, width: int, rank: int) -> np.ndarray:
    random = np.random.default_rng(rank)
    return (random.normal(size=(rows, rank)) @ random.normal(size=(rank, width))).astype(np.float32)


def test_the_coding_rate_of_features_is_that_of_its_formula() -> None:
    z = features(40, 8, 8).astype(np.float64)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    expected = 0.5 * np.linalg.slogdet(np.eye(40) + 8 / (40 * 0.01) * z @ z.T)[1]
    assert feature_coding_rate(features(40, 8, 8)) == pytest.approx(expected, rel=1e-5)


def test_features_that_fill_more_directions_have_the_larger_rank_and_rate() -> None:
    narrow, wide = (measure_features(features(200, 16, rank)) for rank in (2, 16))
    assert narrow.rankme is not None
    assert wide.rankme is not None
    assert narrow.rankme < 2.1 < wide.rankme <= 16
    assert (narrow.coding_rate or 0) < (wide.coding_rate or 0)
    assert narrow.alpha_req is None, "two directions are too few to fit a decay"


def test_features_that_are_not_finite_have_no_measure() -> None:
    broken = measure_features(np.full((8, 4), np.nan, dtype=np.float32))
    assert (broken.rankme, broken.alpha_req, broken.coding_rate) == (None, None, None)


def test_the_rank_correlation_is_spearmans_with_ties() -> None:
    measure, accuracy = [1.0, 2.0, 2.0, 5.0, 4.0, 9.0], [0.3, 0.2, 0.5, 0.6, 0.6, 0.9]
    found = rank_correlation(measure, accuracy)
    assert found is not None
    assert found.value == pytest.approx(stats.spearmanr(measure, accuracy).statistic)
    assert -1 < found.low < found.value < found.high < 1


def test_a_correlation_of_few_runs_is_not_given_and_a_perfect_one_has_an_interval() -> None:
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]) is None
    assert rank_correlation([1.0] * 6, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) is None
    found = rank_correlation([6.0, 5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert found is not None
    assert found.value == found.low == pytest.approx(-1)
    assert -1 < found.high < 0
    with pytest.raises(ValueError, match="2 measures, 1 accuracies"):
        rank_correlation([1.0, 2.0], [1.0])


def test_the_interval_of_a_correlation_covers_the_truth_about_as_often_as_it_says() -> None:
    random, truth, runs, trials = np.random.default_rng(0), 0.6, 20, 1000
    spearman = 6 / np.pi * np.arcsin(truth / 2)
    covered = 0
    for _ in range(trials):
        x = random.normal(size=runs)
        y = truth * x + np.sqrt(1 - truth**2) * random.normal(size=runs)
        found = rank_correlation(x.tolist(), y.tolist())
        assert found is not None
        covered += found.low <= spearman <= found.high
    assert 0.93 <= covered / trials <= 0.97


def test_measures_do_not_depend_on_the_memory_layout() -> None:
    wide = features(60, 12, 12)
    assert measure_features(np.asfortranarray(wide)) == measure_features(wide)
