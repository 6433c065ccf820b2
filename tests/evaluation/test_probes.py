import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from crate_ray.config import ConfigError
from crate_ray.config.identity import EVALUATION_PROTOCOL
from crate_ray.evaluation import (
    PROBE_PROTOCOL,
    Features,
    Rows,
    draw_few_labels,
    few_label_probe,
    judge,
    knn_top1,
    linear_probe,
    raw_pixel_probe,
)
from crate_ray.evaluation.probes import plain_probe
from crate_ray.evaluation.protocols import PUBLISHED_PROBES

CLASSES, WIDTH, PLACEMENTS = 3, 6, 2


def rows(num_sources, seed, *, noise=1.5):
    """Classes as noisy clusters; each source has two rows that lie close together."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(CLASSES, WIDTH))
    labels = np.arange(num_sources) % CLASSES
    values = centres[labels] + noise * random.normal(size=(num_sources, WIDTH))
    values = np.repeat(values, PLACEMENTS, axis=0) + 0.1 * random.normal(size=(num_sources * PLACEMENTS, WIDTH))
    sources = np.repeat([f"{seed}-{i:03d}" for i in range(num_sources)], PLACEMENTS)
    return Rows(values.astype(np.float32), np.repeat(labels, PLACEMENTS).astype(np.int64), sources)


@pytest.fixture(scope="module")
def splits():
    return rows(120, 1), rows(60, 2), rows(90, 3)


def reference_probe(train, validation, judged):
    scaler = StandardScaler().fit(train.features_ND)
    best = None
    for c in (0.01, 0.1, 1.0):
        model = LogisticRegression(C=c, max_iter=10_000, tol=1e-8)
        model.fit(scaler.transform(train.features_ND), train.labels_N)
        score = model.score(scaler.transform(validation.features_ND), validation.labels_N)
        if best is None or score > best[0]:
            best = (score, c, model.predict(scaler.transform(judged.features_ND)) == judged.labels_N)
    return best[1:]


def test_linear_probe_agrees_with_a_tightly_converged_fit(splits):
    result = linear_probe(*splits)
    c, correct = reference_probe(*splits)
    assert result.chosen_c == c
    np.testing.assert_array_equal(result.correct_Q, correct)
    assert result.top1.value == correct.mean()
    assert result.top1.low < result.top1.value < result.top1.high
    assert result.protocol == PROBE_PROTOCOL


@pytest.mark.parametrize("name", PUBLISHED_PROBES)
def test_the_published_probe_is_a_plain_logistic_regression_on_features_as_they_are(splits, name):
    train, _, judged = splits
    result = plain_probe(train, judged, PUBLISHED_PROBES[name])
    model = LogisticRegression(C=1.0, max_iter=10_000, tol=1e-8).fit(train.features_ND, train.labels_N)
    np.testing.assert_array_equal(result.correct_Q, model.predict(judged.features_ND) == judged.labels_N)
    assert result.top1.low < result.top1.value < result.top1.high
    assert result.chosen_c == 1.0


def test_raw_pixel_probe_solves_the_problem_it_shortens(splits):
    def grey(part):
        constant = np.full((len(part.labels_N), 2), 0.5, dtype=np.float32)
        return Rows(np.hstack([np.tile(part.features_ND, 3), constant]), part.labels_N, part.sources_N)

    pixels = [grey(part) for part in splits]
    result = raw_pixel_probe(*pixels, rows_per_source=PLACEMENTS)
    c, correct = reference_probe(*pixels)
    assert result.chosen_c == c
    np.testing.assert_array_equal(result.correct_Q, correct)


def test_raw_pixels_without_validation_are_judged_at_the_default_of_the_solver(splits):
    train, validation, judged = splits
    alone = raw_pixel_probe(train, None, judged, rows_per_source=PLACEMENTS)
    assert alone.chosen_c == 1.0
    assert raw_pixel_probe(train, validation, judged, rows_per_source=PLACEMENTS).chosen_c in (0.01, 0.1, 1.0)


def test_few_label_draws_take_one_row_of_as_many_sources_of_each_class(splits):
    train = splits[0]
    draws = draw_few_labels(train.labels_N, train.sources_N, per_class=5, draws=4, seed=0)
    for drawn in draws:
        assert np.bincount(train.labels_N[drawn]).tolist() == [5, 5, 5]
        assert len(set(train.sources_N[drawn])) == 15
    assert len({tuple(drawn) for drawn in draws}) == 4


def test_few_label_draws_depend_on_labels_and_seed_only(splits):
    train = splits[0]
    first = draw_few_labels(train.labels_N, train.sources_N, per_class=5, draws=2, seed=7)
    again = draw_few_labels(train.labels_N, train.sources_N, per_class=5, draws=2, seed=7)
    other = draw_few_labels(train.labels_N, train.sources_N, per_class=5, draws=2, seed=8)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_more_labels_help_and_the_spread_is_over_draws(splits):
    few, many = (few_label_probe(*splits, per_class=n, draws=8) for n in (2, 30))
    assert many.top1.value > few.top1.value
    assert few.std == pytest.approx(np.std(few.top1_by_draw, ddof=1))
    assert few.top1.value == pytest.approx(np.mean(few.top1_by_draw))


def test_too_few_sources_of_a_class_are_named(splits):
    with pytest.raises(ConfigError, match="at most 40"):
        few_label_probe(*splits, per_class=41)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_agrees_with_scikit_learn(splits, k):
    train, _, judged = splits
    reference = KNeighborsClassifier(
        n_neighbors=k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(train.features_ND.astype(np.float64), train.labels_N)
    expected = reference.score(judged.features_ND.astype(np.float64), judged.labels_N)
    assert knn_top1(train.features_ND, train.labels_N, judged.features_ND, judged.labels_N, k=k) == pytest.approx(expected)


def test_knn_takes_tensors_in_chunks_and_fewer_rows_than_k(splits, monkeypatch):
    train, _, judged = splits
    whole = knn_top1(train.features_ND, train.labels_N, judged.features_ND, judged.labels_N)
    monkeypatch.setattr("crate_ray.evaluation.probes._KNN_CHUNK", 7)
    tensors = [torch.as_tensor(part) for part in (train.features_ND, train.labels_N, judged.features_ND, judged.labels_N)]
    assert knn_top1(*tensors) == whole
    assert 0 <= knn_top1(*(part[:4] for part in tensors[:2]), *tensors[2:]) <= 1


def test_judge_runs_the_whole_protocol_and_leaves_out_what_the_data_cannot_give(splits):
    features = [Features(part.features_ND, part.features_ND[:, :2], part.labels_N) for part in splits]
    train, validation, judged = (part.sources_N for part in splits)
    result = judge(*features, train_sources=train, validation_sources=validation, judged_sources=judged)
    assert result.mean_token.top1.value > result.cls_token.top1.value
    assert result.few_labels[10] is not None
    assert result.few_labels[50] is None
    assert result.knn.value > 1 / CLASSES
    assert result.knn.value == result.knn_correct_Q.mean()


def test_rows_that_cannot_be_judged_are_refused():
    values, names = np.zeros((2, 1), dtype=np.float32), np.array(["a", "b"])
    with pytest.raises(ConfigError, match="without a label"):
        Rows(values, np.array([0, -1]), names)
    with pytest.raises(ValueError, match="1 sources"):
        Rows(values, np.array([0, 1]), names[:1])
    with pytest.raises(ValueError, match="diverged"):
        Rows(values * np.nan, np.array([0, 1]), names)


def test_the_protocol_that_comparisons_check_is_the_one_of_the_probes():
    assert EVALUATION_PROTOCOL["probe"] == PROBE_PROTOCOL
