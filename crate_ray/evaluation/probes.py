"""Probes: what frozen features know about the classes, by one fixed protocol.

In: features of a training, a validation and a judged split. Out: top-1 accuracies with
intervals. Every choice (regularisation C) is made on validation; the judged split is scored once.
Logistic regression is solved by scikit-learn in float64 to its default gradient tolerance: it
costs about twice float32, and an ill-conditioned encoder (an untrained one, say) then still
converges instead of failing in the line search. What is fixed, and its versions, is in `protocols`.

Shapes: N training rows, Q judged rows, D features, C classes, K neighbours.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.nn import functional

from crate_ray.config import ConfigError
from crate_ray.evaluation.features import Features, FloatArray, LabelArray
from crate_ray.evaluation.intervals import Interval, accuracy_interval
from crate_ray.evaluation.protocols import C_GRID, PROBE_PROTOCOL, LinearProbe

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

FEW_LABELS = (10, 50)
FEW_LABEL_DRAWS = 20
RAW_ROWS_PER_SOURCE = 4
KNN_NEIGHBOURS = 20
KNN_TEMPERATURE = 0.07
_MAX_ITERATIONS = 20_000
_KNN_CHUNK = 1024
_ONE_THREAD_BELOW = 20_000_000  # numbers in the feature matrix

CorrectArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Rows:
    """One feature of one split.

    Attributes:
        features_ND: Feature of each image.
        labels_N: Class of each image.
        sources_N: Name of the source image: rows made from one image share it.
    """

    features_ND: FloatArray
    labels_N: LabelArray
    sources_N: NDArray[np.generic]

    def __post_init__(self) -> None:
        if not len(self.features_ND) == len(self.labels_N) == len(self.sources_N):
            raise ValueError(
                f"{len(self.features_ND)} feature rows, {len(self.labels_N)} labels, {len(self.sources_N)} sources: "
                "a row needs one of each"
            )
        if len(self.labels_N) == 0 or self.labels_N.min() < 0:
            raise ConfigError("a probe needs labelled images; this split is empty or holds images without a label")
        if not np.isfinite(self.features_ND).all():
            raise ValueError("features hold NaN or infinity: the encoder diverged, so there is nothing to probe")


@dataclass(frozen=True)
class ProbeResult:
    """A linear probe.

    Attributes:
        top1: Accuracy on the judged split; the interval resamples source images.
        chosen_c: Inverse regularisation that validation chose.
        correct_Q: Which judged rows were answered correctly; input of `paired_gain`.
        protocol: Version of the rules above.
    """

    top1: Interval
    chosen_c: float
    correct_Q: CorrectArray
    protocol: int = PROBE_PROTOCOL


@dataclass(frozen=True)
class FewLabelResult:
    """Linear probes on few labelled source images, one for each draw of them.

    Attributes:
        top1: Judged accuracy, averaged over draws; the interval resamples source images.
        std: Standard deviation over draws (n - 1).
        chosen_c: Inverse regularisation with the best validation accuracy, averaged over draws.
        top1_by_draw: Judged accuracy of each draw at that C.
        protocol: Version of the rules above.
    """

    top1: Interval
    std: float
    chosen_c: float
    top1_by_draw: tuple[float, ...]
    protocol: int = PROBE_PROTOCOL


@dataclass(frozen=True)
class Judgement:
    """Everything the protocol measures of one encoder; few-label results are None where a class has too few sources."""

    mean_token: ProbeResult
    cls_token: ProbeResult
    few_labels: dict[int, FewLabelResult | None]
    knn: Interval
    knn_correct_Q: CorrectArray
    protocol: int = PROBE_PROTOCOL


def judge(
    train: Features,
    validation: Features,
    judged: Features,
    *,
    train_sources: ArrayLike,
    validation_sources: ArrayLike,
    judged_sources: ArrayLike,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Judgement:
    """Runs the whole protocol on one encoder.

    The mean over patch tokens is primary: it also feeds the few-label probes and kNN. Pass
    validation as `judged` while choosing configurations, test only for a final comparison.

    Args:
        train: Features the probes are fitted on.
        validation: Features C is chosen on.
        judged: Features the accuracies are measured on.
        train_sources: Source image of each training row.
        validation_sources: Source image of each validation row.
        judged_sources: Source image of each judged row.
        seed: Of the draws and the bootstrap; the same for every model of a comparison.
        device: Where kNN runs.

    Raises:
        ConfigError: A split is empty or without labels.
    """
    splits = ((train, train_sources), (validation, validation_sources), (judged, judged_sources))
    mean = [Rows(part.mean_ND, part.labels_N, np.asarray(sources)) for part, sources in splits]
    cls = [Rows(part.cls_ND, part.labels_N, np.asarray(sources)) for part, sources in splits]
    available = smallest_class(train.labels_N, train_sources)
    knn_correct_Q = knn_correct(train.mean_ND, train.labels_N, judged.mean_ND, judged.labels_N, device=device)
    return Judgement(
        mean_token=linear_probe(*mean, seed=seed),
        cls_token=linear_probe(*cls, seed=seed),
        few_labels={n: few_label_probe(*mean, per_class=n, seed=seed) if n <= available else None for n in FEW_LABELS},
        knn=accuracy_interval(knn_correct_Q, judged_sources, seed=seed),
        knn_correct_Q=knn_correct_Q,
    )


def linear_probe(train: Rows, validation: Rows, judged: Rows, *, seed: int = 0) -> ProbeResult:
    """Multinomial logistic regression on standardised features; C from `C_GRID` by validation accuracy.

    Of equal C the smallest wins. The scaler is fitted on the training rows.

    Args:
        train: Rows the probe is fitted on.
        validation: Rows C is chosen on.
        judged: Rows the accuracy is measured on.
        seed: Of the bootstrap.
    """
    return _choose_and_score(train, validation, judged, standardise=True, seed=seed)


def plain_probe(train: Rows, judged: Rows, probe: LinearProbe, *, seed: int = 0) -> ProbeResult:
    """Multinomial logistic regression of a protocol that leaves nothing to choose.

    Args:
        train: Rows the probe is fitted on.
        judged: Rows the accuracy is measured on.
        probe: With one C.
        seed: Of the bootstrap.
    """
    (c,) = probe.c_grid
    (fit,) = _fit_grid(train.features_ND, train.labels_N, standardise=probe.standardise, c_grid=(c,))
    correct_Q = _correct(fit, judged)
    return ProbeResult(accuracy_interval(correct_Q, judged.sources_N, seed=seed), c, correct_Q)


def _choose_and_score(train: Rows, validation: Rows | None, judged: Rows, *, standardise: bool, seed: int) -> ProbeResult:
    """With C from `C_GRID`; without validation rows the largest, which is scikit-learn's default."""
    c_grid = C_GRID if validation is not None else C_GRID[-1:]
    fits = _fit_grid(train.features_ND, train.labels_N, standardise=standardise, c_grid=c_grid)
    best = 0 if validation is None else int(np.argmax([_correct(fit, validation).mean() for fit in fits]))
    correct_Q = _correct(fits[best], judged)
    return ProbeResult(accuracy_interval(correct_Q, judged.sources_N, seed=seed), c_grid[best], correct_Q)


def raw_pixel_probe(
    train: Rows, validation: Rows | None, judged: Rows, *, rows_per_source: int = RAW_ROWS_PER_SOURCE, seed: int = 0
) -> ProbeResult:
    """The linear probe on pixels: what no encoder at all would score.

    Thousands of correlated pixels make this the slowest probe, so two things shorten it. Pixels that
    never change are dropped and equal ones (the channels of a grey image) merged; merging k standardised
    copies into one, scaled by sqrt(k), leaves the solution of an L2-penalised fit unchanged. And it is
    fitted on the first `rows_per_source` rows of each source image, which does change it.

    Args:
        train: Pixels the probe is fitted on.
        validation: Pixels C is chosen on; None takes C = 1.
        judged: Pixels the accuracy is measured on.
        rows_per_source: Training rows kept of each source image.
        seed: Of the bootstrap.
    """
    kept = np.concatenate([rows[:rows_per_source] for rows in _rows_by_source(np.arange(len(train.labels_N)), train.sources_N)])
    columns, copies = _distinct_columns(train.features_ND[kept])
    pixels_ND = train.features_ND[kept][:, columns].astype(np.float64)
    center_D, scale_D = pixels_ND.mean(axis=0), np.sqrt(copies) / pixels_ND.std(axis=0)

    def scaled(part: Rows) -> Rows:
        pixels = ((part.features_ND[:, columns] - center_D) * scale_D).astype(np.float32)
        return Rows(pixels, part.labels_N, part.sources_N)

    fitted = Rows(train.features_ND[kept], train.labels_N[kept], train.sources_N[kept])
    chosen_on = None if validation is None else scaled(validation)
    return _choose_and_score(scaled(fitted), chosen_on, scaled(judged), standardise=False, seed=seed)


def _distinct_columns(features_ND: FloatArray) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Columns that vary, one of each set of equal ones, and how many each stands for."""
    varying = np.flatnonzero(features_ND.max(axis=0) > features_ND.min(axis=0))
    _, first, copies = np.unique(features_ND[:, varying].T, axis=0, return_index=True, return_counts=True)
    return varying[first], copies


def few_label_probe(
    train: Rows, validation: Rows, judged: Rows, *, per_class: int, draws: int = FEW_LABEL_DRAWS, seed: int = 0
) -> FewLabelResult:
    """Linear probes on `per_class` labelled source images a class, one row of each, over seeded draws.

    The draws follow from sources, labels and seed alone, so every model of a comparison sees the
    same rows. One C serves all draws: the one with the best validation accuracy on average,
    which is steadier than a choice a draw and cannot fit itself to one of them.

    Raises:
        ConfigError: A class has fewer source images than `per_class`.
    """
    check_few_labels(train.labels_N, train.sources_N, per_class=per_class)
    chosen_by = np.empty((draws, len(C_GRID)))
    correct = np.empty((draws, len(C_GRID), len(judged.labels_N)), dtype=bool)
    for draw, rows in enumerate(draw_few_labels(train.labels_N, train.sources_N, per_class=per_class, draws=draws, seed=seed)):
        for column, fit in enumerate(_fit_grid(train.features_ND[rows], train.labels_N[rows])):
            chosen_by[draw, column] = _correct(fit, validation).mean()
            correct[draw, column] = _correct(fit, judged)
    best = int(np.argmax(chosen_by.mean(axis=0)))
    # A row's value is the share of draws that answered it: resampling sources then keeps the draws as they are.
    interval = accuracy_interval(correct[:, best].mean(axis=0), judged.sources_N, seed=seed)
    top1 = correct[:, best].mean(axis=1)
    return FewLabelResult(interval, float(top1.std(ddof=1)), C_GRID[best], tuple(top1.tolist()))


def draw_few_labels(
    labels_N: LabelArray, sources_N: ArrayLike, *, per_class: int, draws: int, seed: int
) -> list[NDArray[np.intp]]:
    """Row numbers of each draw: `per_class` different sources a class, then one of each source's rows.

    Sources are sorted by name first: the draw does not depend on the order of the rows of other sources.
    """
    names_N = np.asarray(sources_N).astype(str)
    classes = np.unique(labels_N)
    rows_of = {c: _rows_by_source(np.flatnonzero(labels_N == c), names_N) for c in classes}
    chosen = []
    for draw in range(draws):
        random = np.random.default_rng((seed, per_class, draw))
        rows = [
            random.choice(rows_of[c][index])
            for c in classes
            for index in random.choice(len(rows_of[c]), size=per_class, replace=False)
        ]
        chosen.append(np.array(rows))
    return chosen


def knn_top1(
    train_ND: ArrayLike | torch.Tensor,
    train_labels: ArrayLike | torch.Tensor,
    query_QD: ArrayLike | torch.Tensor,
    query_labels: ArrayLike | torch.Tensor,
    *,
    k: int = KNN_NEIGHBOURS,
    temperature: float = KNN_TEMPERATURE,
    device: torch.device | str | None = None,
) -> float:
    """Accuracy of `knn_correct`, with the same arguments; what the training loop records."""
    correct = knn_correct(train_ND, train_labels, query_QD, query_labels, k=k, temperature=temperature, device=device)
    return float(correct.mean())


def knn_correct(
    train_ND: ArrayLike | torch.Tensor,
    train_labels: ArrayLike | torch.Tensor,
    query_QD: ArrayLike | torch.Tensor,
    query_labels: ArrayLike | torch.Tensor,
    *,
    k: int = KNN_NEIGHBOURS,
    temperature: float = KNN_TEMPERATURE,
    device: torch.device | str | None = None,
) -> CorrectArray:
    """Which queries a weighted vote among the k most similar training rows answers correctly.

    score(c) = sum over the k neighbours i with y_i = c of exp(cos(q, x_i) / temperature), as in
    Wu et al. (2018), section 3.4, which DINO's evaluation follows. Cheap enough for the training loop.

    Args:
        train_ND: (N, D) features to look among.
        train_labels: (N,) classes.
        query_QD: (Q, D) features to classify.
        query_labels: (Q,) classes.
        k: Neighbours; all N where there are fewer.
        temperature: Of the vote.
        device: Where to compute; by default where `train_ND` lies.
    """
    train = functional.normalize(_on(train_ND, device).float(), dim=1)
    query = functional.normalize(torch.as_tensor(query_QD).to(train.device).float(), dim=1)
    train_labels_N = torch.as_tensor(train_labels).to(train.device)
    query_labels_Q = torch.as_tensor(query_labels).to(train.device)
    num_classes = int(train_labels_N.max()) + 1
    correct = []
    for start in range(0, len(query), _KNN_CHUNK):
        chunk_QD, labels_Q = query[start : start + _KNN_CHUNK], query_labels_Q[start : start + _KNN_CHUNK]
        similarity_QK, neighbour_QK = (chunk_QD @ train.T).topk(min(k, len(train)), dim=1)
        # Relative to similarity 1, the largest there is; a small temperature would overflow otherwise.
        weight_QK = ((similarity_QK - 1) / temperature).exp()
        votes_QC = weight_QK.new_zeros(len(chunk_QD), num_classes).scatter_add_(1, train_labels_N[neighbour_QK], weight_QK)
        correct.append(votes_QC.argmax(dim=1) == labels_Q)
    return np.asarray(torch.cat(correct).cpu().numpy())


def require_scikit_learn() -> None:
    """Refuses at once what would fail after minutes of encoding.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise ConfigError("the linear probe needs scikit-learn, which is not installed; pip install scikit-learn")


def _fit_grid(
    features_ND: FloatArray, labels_N: LabelArray, *, standardise: bool = True, c_grid: Sequence[float] = C_GRID
) -> "Sequence[Pipeline]":
    """One fitted probe for each C."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    values_ND = features_ND.astype(np.float64)
    scaler = StandardScaler(with_mean=standardise, with_std=standardise)
    # On small problems the threads of the linear algebra wait for each other: 35 times slower at 500 x 128 on two cores.
    with threadpool_limits(1 if values_ND.size < _ONE_THREAD_BELOW else None):
        return [
            make_pipeline(scaler, LogisticRegression(C=c, max_iter=_MAX_ITERATIONS)).fit(values_ND, labels_N) for c in c_grid
        ]


def _correct(fit: "Pipeline", rows: Rows) -> CorrectArray:
    predicted_N: LabelArray = fit.predict(rows.features_ND.astype(np.float64))
    return np.equal(predicted_N, rows.labels_N)


def check_few_labels(labels_N: LabelArray, sources_N: ArrayLike, *, per_class: int) -> None:
    """Refuses more labels than a class has.

    Raises:
        ConfigError: A class has fewer source images than `per_class`.
    """
    available = smallest_class(labels_N, sources_N)
    if per_class > available:
        raise ConfigError(
            f"{per_class} labels a class, but the smallest class has {available} source images; ask for at most {available}"
        )


def smallest_class(labels_N: LabelArray, sources_N: ArrayLike) -> int:
    """Source images of the class that has fewest."""
    names_N = np.asarray(sources_N).astype(str)
    return min(len(np.unique(names_N[labels_N == c])) for c in np.unique(labels_N))


def _rows_by_source(rows: NDArray[np.intp], sources_N: NDArray[np.generic]) -> list[NDArray[np.intp]]:
    names = sources_N[rows].astype(str)
    return [rows[names == name] for name in np.unique(names)]


def _on(values: ArrayLike | torch.Tensor, device: torch.device | str | None) -> torch.Tensor:
    tensor = torch.as_tensor(values)
    return tensor if device is None else tensor.to(device)
