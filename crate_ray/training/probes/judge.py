"""Judging a run: its encoder, the same seed's untrained encoder, and raw pixels, by fixed protocols; a classifier by its top-1.

In: a run folder and a request. Out: `final/` values in the folder, and two files beside them: probe_<what>.json, each number
with its interval, its control and the name and version of its protocol, and answers_<what>.json, how many rows of each source
image were answered correctly, from which differences between runs get their intervals. <what> is the split, then another
data set's name, then the step of an earlier checkpoint. Configurations are chosen on validation; test is read for the
final comparison alone. A protocol that was judged before, of the same weights on the same shards, is not judged again.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from crate_ray.config import ConfigError, RunConfig
from crate_ray.data import load_index, load_source
from crate_ray.data.workers import TaskMap
from crate_ray.evaluation.features import raw_pixels
from crate_ray.evaluation.intervals import Interval, accuracy_interval
from crate_ray.evaluation.probes import Rows, check_few_labels, raw_pixel_probe, require_scikit_learn
from crate_ray.evaluation.protocols import CLASSIFIER, FINE_TUNE, HOUSE, PROTOCOLS, Protocol
from crate_ray.runs import RunFolder, later_records, read_status
from crate_ray.training.checkpoint import Checkpoint, pin_checkpoint, unpin_checkpoint
from crate_ray.training.ema import weights_file
from crate_ray.training.evaluate import measure_images, read_images, spread_ids
from crate_ray.training.final import write_final
from crate_ray.training.objective import create_objective
from crate_ray.training.precision import resolve_precision
from crate_ray.training.probes.encode import FeatureReader
from crate_ray.training.probes.measures import MEASURES, Findings, Verdict, house_verdict, more_few_labels, triple
from crate_ray.training.probes.splits import Split, SplitName, split_source, split_url, without_labels
from crate_ray.training.probes.subjects import ProbeRequest, Subject, find_subject

CLUSTER_FROM = 100_000
"""Images to encode, of an encoder and its control together, from which it is worth starting Ray and sharing the work."""
PIXEL_ROWS = 50_000
"""Training images that the control on raw pixels is fitted on, spread over all where there are more."""
_PIN = "probe"
_DEFAULT = ProbeRequest()


def probe_run(folder: RunFolder, request: ProbeRequest = _DEFAULT, *, task_map: TaskMap | None = None) -> dict[str, Any]:
    """Judges a checkpoint by every protocol that is asked for and was not used on it before, and records what was found.

    Of the last checkpoint of a finished run the numbers become final values; a verdict on validation never replaces one on test
    among them, and one on other weights replaces the one before. Of an earlier checkpoint they become records `probe/*` at its
    step, unless the run is being written to.

    Args:
        folder: The run's.
        request: What is asked.
        task_map: Who encodes; None for this process.

    Returns:
        The content of probe_<what>.json.

    Raises:
        ConfigError: The run is not finished, a checkpoint or a split is missing or without labels, or scikit-learn is not
            installed.
    """
    subject = find_subject(folder, request)
    check_subject(subject)
    held = held_report(subject)
    with _kept(subject):
        if subject.config.task == "classify":
            return held if CLASSIFIER.name in held["protocols"] else _judge_by_top1(subject, held)
        reader = FeatureReader(subject, task_map)
        report = held
        for name in request.protocols:
            if name not in report["protocols"]:
                report = add_findings(subject, report, MEASURES[name](subject, reader), PROTOCOLS[name])
        for per_class in request.few_labels:
            if report.get("few_labels", {}).get(str(per_class)) is None:
                report = add_findings(subject, report, more_few_labels(subject, reader, per_class), HOUSE, is_whole=False)
        reader.delete()
    return report


def check_subject(subject: Subject) -> None:
    """Refuses at once what would fail after minutes of encoding."""
    request = subject.request
    if subject.config.task == "classify":
        if request.data is not None or request.few_labels:
            raise ConfigError(
                f"run '{subject.folder.name}' is a classifier, judged by its own classes: leave --data and --few-label out"
            )
        split_url(subject.config, request.split)
        return
    if request.data is not None:
        is_plain = request.protocols == ("published",) and not request.few_labels
        request.data.require(subject.config, (request.split,) if is_plain else ("validation", request.split))
    labelled = [name for name in request.protocols if PROTOCOLS[name].needs_labels]
    if "label-free" in request.protocols:
        split_url(subject.config, "validation")
    if not labelled and not request.few_labels:
        return
    chosen_on: tuple[Split, ...] = () if labelled == ["published"] and not request.few_labels else ("validation",)
    reason = without_labels(subject.config, split=request.split, chosen_on=chosen_on)
    if reason is not None:
        raise ConfigError(
            f"run '{subject.folder.name}': a probe needs labelled images, and {reason}; measures that need none: "
            "--protocol label-free"
        )
    if request.few_labels:
        bank = load_source(split_source(subject.config, "train"))
        check_few_labels(bank.labels, bank.sources, per_class=max(request.few_labels))
    require_scikit_learn()


def held_report(subject: Subject) -> dict[str, Any]:
    """The report so far; a new one where the last was of other weights, other shards or another release."""
    held = subject.folder.read_json(f"probe_{subject.suffix}.json") or {}
    same = (subject.checkpoint.step, subject.is_ema, subject.data_digest)
    current = {protocol.name: protocol.version for protocol in (*PROTOCOLS.values(), CLASSIFIER, FINE_TUNE)}
    if (held.get("step"), held.get("ema"), held.get("data_digest")) == same and "protocols" in held:
        kept = {name: version for name, version in held["protocols"].items() if current.get(name) == version}
        return {**held, "protocols": kept}
    protocol = CLASSIFIER if subject.config.task == "classify" else HOUSE
    head = {"split": subject.request.split, "task": subject.config.task, "protocol": protocol.version}
    identity = {"step": subject.checkpoint.step, "ema": subject.is_ema, "data_digest": subject.data_digest}
    data = {} if subject.request.data is None else {"data": subject.request.data.name}
    return {**head, **identity, **data, "protocols": {}, "measured_by": {}, "values": {}}


@contextmanager
def _kept(subject: Subject) -> Iterator[None]:
    """Inside, a run that goes on does not delete the checkpoint that is judged."""
    if subject.is_end:
        yield
        return
    pin_checkpoint(subject.folder, subject.checkpoint.step, by=_PIN)
    try:
        yield
    finally:
        unpin_checkpoint(subject.folder, subject.checkpoint.step, by=_PIN)


def _judge_by_top1(subject: Subject, held: dict[str, Any]) -> dict[str, Any]:
    correct_N = classifier_correct(subject.config, subject.checkpoint, subject.weights, subject.request.split)
    top1 = accuracy_interval(correct_N, load_index(split_url(subject.config, subject.request.split)).sources)
    found = Findings({"top1": top1.value}, {"top1": triple(top1)}, {"top1": correct_N})
    return add_findings(subject, held, found, CLASSIFIER)


def add_findings(
    subject: Subject, report: Mapping[str, Any], found: Findings, protocol: Protocol, *, is_whole: bool = True
) -> dict[str, Any]:
    """The report with what a protocol found, written down: answers first, the report, which says that it is done, last."""
    _write_answers(subject, found)
    prefix = "" if subject.request.data is None else f"{subject.request.data.name}_"
    values = {f"final/{prefix}{name}": value for name, value in found.values.items()}
    body = dict(found.body)
    for key in ("few_labels", "control_few_labels"):
        if key in body:
            body[key] = {**report.get(key, {}), **body[key]}
    new = {**report, **body, "values": {**report["values"], **values}}
    new["measured_by"] = {**report["measured_by"], **dict.fromkeys(values, protocol.stamp)}
    if is_whole:
        new["protocols"] = {**report["protocols"], protocol.name: protocol.version}
    _record(subject, values)
    subject.folder.write_json(f"probe_{subject.suffix}.json", new)
    return new


def _record(subject: Subject, values: Mapping[str, float]) -> None:
    """Final values and a record, or a record at its step of an earlier checkpoint."""
    folder, step = subject.folder, subject.checkpoint.step
    if not subject.is_end:
        status = read_status(folder)
        if status is None or status.state == "RUNNING":  # the records have one writer
            return
        with later_records(folder) as writer:
            writer.write(step, {key.replace("final/", "probe/", 1): value for key, value in values.items()})
        return
    data = "" if subject.request.data is None else f"_{subject.request.data.name}"
    tested = (folder.read_json(f"probe_test{data}.json") or {}).get("values", {}) if subject.request.split != "test" else {}
    final = {key: value for key, value in values.items() if key not in tested}
    if final:
        with later_records(folder) as writer:
            write_final(folder, writer, step, final)


def _write_answers(subject: Subject, found: Findings) -> None:
    """How many rows of each source image were answered correctly, beside what other protocols have answered."""
    if not found.correct:
        return
    folder, name = subject.folder, f"answers_{subject.suffix}.json"
    source_N = np.asarray(load_index(split_url(subject.config, subject.request.split)).sources).astype(str)
    names_S, place_N = np.unique(source_N, return_inverse=True)
    identity = {"step": subject.checkpoint.step, "ema": subject.is_ema, "data_digest": subject.data_digest}
    held = folder.read_json(name) or {}
    kept = held["correct"] if {key: held.get(key) for key in identity} == identity else {}
    sums = {key: _by_source(correct_N, place_N) for key, correct_N in found.correct.items()}
    head = {"protocol": HOUSE.version, **identity, "sources": names_S.tolist(), "rows": np.bincount(place_N).tolist()}
    folder.write_json(name, {**head, "correct": {**kept, **sums}})


def _by_source(correct_N: NDArray[Any], place_N: NDArray[np.intp]) -> list[float]:
    return [int(total) if total.is_integer() else float(total) for total in np.bincount(place_N, weights=correct_N)]


def judge_encoder(config: RunConfig, checkpoint: Checkpoint, *, split: Split) -> Verdict:
    """The house protocol on a checkpoint and the untrained encoder of the same seed; writes nothing."""
    require_scikit_learn()
    folder = RunFolder(checkpoint.uri.rpartition("/checkpoints/")[0])
    subject = Subject(folder, config, checkpoint, weights_file(config, checkpoint), ProbeRequest(split), is_end=False)
    return house_verdict(subject, FeatureReader(subject))


def judge_classifier(config: RunConfig, checkpoint: Checkpoint, *, split: Split, use_ema: bool | None = None) -> Interval:
    """Top-1 of a checkpoint's classifier on a split; writes nothing."""
    correct_N = classifier_correct(config, checkpoint, weights_file(config, checkpoint, use_ema=use_ema), split)
    return accuracy_interval(correct_N, load_index(split_url(config, split)).sources)


def classifier_correct(config: RunConfig, checkpoint: Checkpoint, weights: str, split: Split) -> NDArray[np.bool_]:
    """Which images of a split a checkpoint's classifier answers correctly, in the order of the index."""
    folder = RunFolder(checkpoint.uri.rpartition("/checkpoints/")[0])
    model = Subject(folder, config, checkpoint, weights, ProbeRequest(split), is_end=False).build(trained=True)
    objective = create_objective(model, config)
    precision = resolve_precision(config.train.precision, next(model.parameters()).device.type)
    rows_NM = torch.cat(list(measure_images(objective, config, split_url(config, split), precision=precision)))
    return np.asarray(rows_NM[:, objective.measures.index("top1")].numpy() > 0)


def probe_raw_pixels(config: RunConfig, *, split: Split) -> Interval:
    """Accuracy of the linear probe on pixels by the house protocol: what needs no model at all."""
    require_scikit_learn()

    def rows(which: SplitName) -> Rows:
        source = split_source(config, which)
        index = load_source(source)
        ids = spread_ids(index.num_samples, PIXEL_ROWS if which == "train" else None)
        pixels, labels = raw_pixels(read_images(config, source, sample_ids=ids))
        return Rows(pixels, labels, index.sources[ids])

    chosen_on = None if config.data.eval is None else rows("validation")
    return raw_pixel_probe(rows("train"), chosen_on, rows(split)).top1


def num_images(subject: Subject) -> int:
    """Images that a request encodes, of the encoder and of its control together."""
    request, data = subject.request, subject.config.data
    is_labelled = bool(request.few_labels) or any(PROTOCOLS[name].needs_labels for name in request.protocols)
    sources = (data.source if is_labelled else None, data.eval, data.test if request.split == "test" else None)
    return 2 * sum(load_source(source).num_samples for source in sources if source is not None)
