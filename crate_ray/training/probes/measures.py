"""What each protocol finds of a subject, beside its untrained control.

In: a reader of features. Out: Findings: values by name, what else stands in the report, and which rows were answered correctly.
The protocols themselves are `crate_ray.evaluation`'s; here they meet shards. What stands in a report beside a number, its
control and its interval, is made here too, so that a protocol is one function.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crate_ray.data import load_index, load_source
from crate_ray.evaluation.features import Features
from crate_ray.evaluation.intervals import Interval, paired_gain
from crate_ray.evaluation.label_free import LabelFree, measure_features
from crate_ray.evaluation.probes import FewLabelResult, Judgement, Rows, few_label_probe, judge, plain_probe
from crate_ray.evaluation.protocols import LABEL_FREE_IMAGES, PUBLISHED_PROBES, ProtocolName, Token
from crate_ray.training.evaluate import spread_ids
from crate_ray.training.probes.encode import FeatureReader
from crate_ray.training.probes.splits import SplitName, split_source, split_url
from crate_ray.training.probes.subjects import Subject


@dataclass(frozen=True)
class Findings:
    """What one protocol found.

    Attributes:
        values: By name, without the `final/` of records.
        body: What the report says besides.
        correct: Which judged rows were answered correctly, in the order of the index, by the name of the accuracy; of several
            seeds the share of them that did.
    """

    values: Mapping[str, float]
    body: Mapping[str, Any]
    correct: Mapping[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """A subject's encoder beside its control by the house protocol, on one split."""

    trained: Judgement
    control: Judgement
    gain: Interval


def triple(interval: Interval) -> list[float]:
    """Value and ends, as reports hold them."""
    return [interval.value, interval.low, interval.high]


def house_verdict(subject: Subject, reader: FeatureReader) -> Verdict:
    """Mean and class token, few labels and kNN, of the encoder and its control."""
    control, trained = (_judge(subject, reader, trained=is_trained) for is_trained in (False, True))
    gain = paired_gain(trained.mean_token.correct_Q, control.mean_token.correct_Q, _sources(subject, subject.request.split))
    return Verdict(trained, control, gain)


def _judge(subject: Subject, reader: FeatureReader, *, trained: bool) -> Judgement:
    split = subject.request.split
    train, validation, judged = (_features(subject, reader, s, trained=trained) for s in ("train", "validation", split))
    return judge(
        train,
        validation,
        judged,
        train_sources=_sources(subject, "train"),
        validation_sources=_sources(subject, "validation"),
        judged_sources=_sources(subject, split),
    )


def house(subject: Subject, reader: FeatureReader) -> Findings:
    """The protocol of every comparison."""
    verdict = house_verdict(subject, reader)
    trained, control = verdict.trained, verdict.control
    values = {
        "probe_top1": trained.mean_token.top1.value,
        "probe_top1_gain": verdict.gain.value,
        "control_top1": control.mean_token.top1.value,
        "cls_top1": trained.cls_token.top1.value,
        "knn_top1": trained.knn.value,
    }
    for per_class, result in trained.few_labels.items():
        if result is not None:
            values[f"fewshot{per_class}_top1"] = result.top1.value
    if trained.few_labels.get(10) is not None:
        values["fewshot_top1"] = values["fewshot10_top1"]
    body = {
        "probe_top1": triple(trained.mean_token.top1),
        "cls_top1": triple(trained.cls_token.top1),
        "control_top1": triple(control.mean_token.top1),
        "control_cls_top1": triple(control.cls_token.top1),
        "gain": triple(verdict.gain),
        "chosen_c": trained.mean_token.chosen_c,
        "knn_top1": triple(trained.knn),
        "control_knn_top1": triple(control.knn),
        "few_labels": {str(n): _few(result) for n, result in trained.few_labels.items()},
        "control_few_labels": {str(n): _few(result) for n, result in control.few_labels.items()},
    }
    correct = {
        "probe_top1": trained.mean_token.correct_Q,
        "control_top1": control.mean_token.correct_Q,
        "cls_top1": trained.cls_token.correct_Q,
        "control_cls_top1": control.cls_token.correct_Q,
        "knn_top1": trained.knn_correct_Q,
        "control_knn_top1": control.knn_correct_Q,
    }
    return Findings(values, body, correct)


def published(subject: Subject, reader: FeatureReader) -> Findings:
    """The probe that published tables state: nothing is chosen, the features are as the encoder gives them."""
    split = subject.request.split
    values, body, correct = dict[str, float](), dict[str, Any](), dict[str, NDArray[np.bool_]]()
    for name, probe in PUBLISHED_PROBES.items():
        for prefix, is_trained in (("", True), ("control_", False)):
            train, judged = (_rows(subject, reader, s, probe.token, trained=is_trained) for s in ("train", split))
            result = plain_probe(train, judged, probe)
            body[prefix + name], correct[prefix + name] = triple(result.top1), result.correct_Q
        values[name] = body[name][0]
    main = "published_probe_top1"
    gain = paired_gain(correct[main], correct[f"control_{main}"], _sources(subject, split))
    values |= {f"control_{main}": body[f"control_{main}"][0], "published_probe_gain": gain.value}
    return Findings(values, body | {"published_gain": triple(gain)}, correct)


def label_free(subject: Subject, reader: FeatureReader) -> Findings:
    """How the features of validation images are spread, labels unread."""
    source = split_url(subject.config, "validation")
    rows = spread_ids(load_index(source).num_samples, LABEL_FREE_IMAGES)
    found = [measure_features(reader.read(source, trained=trained).rows(rows).mean_ND) for trained in (True, False)]
    trained, control = found
    values = {name: value for name, value in _named(trained).items() if value is not None}
    return Findings(values, {"label_free": _named(trained) | {"images": len(rows)}, "control_label_free": _named(control)})


def more_few_labels(subject: Subject, reader: FeatureReader, per_class: int) -> Findings:
    """A few-label probe with another number of labels than the house protocol's.

    Raises:
        ConfigError: A class has fewer source images.
    """
    split, found = subject.request.split, []
    for is_trained in (True, False):
        splits: tuple[SplitName, ...] = ("train", "validation", split)
        found.append(
            few_label_probe(*(_rows(subject, reader, s, "mean", trained=is_trained) for s in splits), per_class=per_class)
        )
    trained, control = found
    body = {"few_labels": {str(per_class): _few(trained)}, "control_few_labels": {str(per_class): _few(control)}}
    return Findings({f"fewshot{per_class}_top1": trained.top1.value}, body)


MEASURES: Mapping[ProtocolName, Callable[[Subject, FeatureReader], Findings]] = {
    "house": house,
    "published": published,
    "label-free": label_free,
}


def _named(measures: LabelFree) -> dict[str, float | None]:
    return asdict(measures)


def _few(result: FewLabelResult | None) -> dict[str, Any] | None:
    if result is None:
        return None
    return {"top1": triple(result.top1), "std_over_draws": result.std}


def _features(subject: Subject, reader: FeatureReader, split: SplitName, *, trained: bool) -> Features:
    return reader.read(split_source(subject.config, split), trained=trained)


def _rows(subject: Subject, reader: FeatureReader, split: SplitName, token: Token, *, trained: bool) -> Rows:
    found = _features(subject, reader, split, trained=trained)
    return Rows(found.of(token), found.labels_N, _sources(subject, split))


def _sources(subject: Subject, split: SplitName) -> NDArray[Any]:
    return np.asarray(load_source(split_source(subject.config, split)).sources)
