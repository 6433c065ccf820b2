import numpy as np
import pytest

from crate_ray.evaluation import accuracy_interval, paired_gain


def brute_force(value, sources, *, resamples, seed):
    """Concatenates the rows of every drawn source: the definition, without counts."""
    random = np.random.default_rng(seed)
    groups = [value[sources == name] for name in np.unique(sources)]
    means = [
        np.concatenate([groups[i] for i in random.integers(len(groups), size=len(groups))]).mean() for _ in range(resamples)
    ]
    return np.quantile(means, (0.025, 0.975))


@pytest.fixture
def clustered():
    """60 sources with 1 to 6 rows, all rows of a source alike."""
    random = np.random.default_rng(3)
    rows = random.integers(1, 7, size=60)
    sources = np.repeat([f"image-{i}" for i in range(60)], rows)
    return np.repeat(random.random(60) < 0.7, rows), sources


def test_the_interval_agrees_with_resampling_sources_one_by_one(clustered):
    correct, sources = clustered
    interval = accuracy_interval(correct, sources, resamples=20_000)
    assert interval.value == correct.mean()
    assert (interval.low, interval.high) == pytest.approx(
        brute_force(correct.astype(float), sources, resamples=2000, seed=1), abs=0.01
    )


def test_copies_of_a_source_do_not_narrow_the_interval():
    correct = np.random.default_rng(0).random(100) < 0.6
    once = accuracy_interval(correct, np.arange(100))
    many = accuracy_interval(np.repeat(correct, 8), np.repeat(np.arange(100), 8))
    assert many == once


def test_the_same_seed_gives_the_same_interval_whatever_the_slices(clustered, monkeypatch):
    whole = accuracy_interval(*clustered)
    monkeypatch.setattr("crate_ray.evaluation.intervals._COUNTS_AT_ONCE", 600)
    assert accuracy_interval(*clustered) == whole


def test_paired_gain_cancels_what_both_find_hard(clustered):
    correct, sources = clustered
    worse = correct.copy()
    worse[sources == "image-0"] = False
    worse[sources == "image-1"] = False
    gain = paired_gain(correct, worse, sources)
    assert gain.value == pytest.approx(correct.mean() - worse.mean())
    alone = accuracy_interval(correct, sources)
    assert gain.high - gain.low < (alone.high - alone.low) / 2


def test_a_model_gains_nothing_over_itself(clustered):
    correct, sources = clustered
    gain = paired_gain(correct, correct, sources)
    assert (gain.value, gain.low, gain.high) == (0, 0, 0)


def test_answers_to_different_rows_are_refused():
    with pytest.raises(ValueError, match="same rows"):
        paired_gain([True], [True, False], ["a"])
    with pytest.raises(ValueError, match="one source a row"):
        accuracy_interval([True, False], ["a"])
