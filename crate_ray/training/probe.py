"""Judging a run: its encoder, the same seed's untrained encoder, and raw pixels, by one protocol; a classifier by its top-1.

In: a run folder with a checkpoint. Out: `final/` values in the folder and a report beside them. The
protocol is evaluation's; this file brings shards, checkpoints and models to it. Configurations are
chosen with split = validation; split = test is read for the final comparison alone.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from crate_ray.config import ConfigError, RunConfig
from crate_ray.data import Source, load_index, load_source, with_classes
from crate_ray.evaluation.features import Features, raw_pixels
from crate_ray.evaluation.intervals import Interval, accuracy_interval, paired_gain
from crate_ray.evaluation.probes import (
    PROBE_PROTOCOL,
    FewLabelResult,
    Judgement,
    Rows,
    judge,
    raw_pixel_probe,
    require_scikit_learn,
)
from crate_ray.models import Classifier, MaskedAutoencoder, create_model
from crate_ray.runs import RunFolder, is_finished, later_records
from crate_ray.training.checkpoint import Checkpoint, latest_checkpoint
from crate_ray.training.ema import EMA_FILE, weights_file
from crate_ray.training.evaluate import encode_images, measure_images, read_images
from crate_ray.training.final import write_final
from crate_ray.training.objective import create_objective
from crate_ray.training.precision import choose_device, resolve_precision

Split = Literal["validation", "test"]
_NO_BANK = (
    "no data set of data.mix has the {} classes of data.eval, and the probe fits labelled training images; "
    "evaluate on shards with the classes of one of them"
)
_KEYS: dict[Split, str] = {"validation": "eval", "test": "test"}

CLASSIFY_PROTOCOL = 1
"""Of a classifier's top-1 on whole images, resized and cut centrally; changes whenever a number would."""
_PROTOCOLS = {"pretrain": PROBE_PROTOCOL, "classify": CLASSIFY_PROTOCOL}


@dataclass(frozen=True)
class Verdict:
    """A run's encoder beside its control, on one split."""

    split: Split
    trained: Judgement
    control: Judgement
    gain: Interval


def probe_run(folder: RunFolder, *, split: Split = "validation", use_ema: bool | None = None) -> dict[str, Any]:
    """Judges the last checkpoint of a finished run, and records the result in its folder; once.

    A verdict on validation never replaces one on test in the run's final values. One on other weights replaces the one before.

    Args:
        folder: The run's.
        split: Judged on.
        use_ema: The average of the weights, or not; None as the run's evaluation does, `eval.use_ema`.

    Returns:
        The content of probe_<split>.json; read from there when this checkpoint was judged before.

    Raises:
        ConfigError: The run is not finished, a split is missing or without labels, or scikit-learn is not installed.
    """
    config = folder.read_config()
    checkpoint = finished_checkpoint(folder)
    protocol = _PROTOCOLS[config.task]
    held = folder.read_json(f"probe_{split}.json")
    is_ema = weights_file(config, checkpoint, use_ema=use_ema) == EMA_FILE
    if held is not None and (held["step"], held["protocol"], held.get("ema", False)) == (checkpoint.step, protocol, is_ema):
        return held
    if config.task == "classify":
        top1 = judge_classifier(config, checkpoint, split=split, use_ema=use_ema)
        body = {"values": {"final/top1": top1.value}, "top1": _triple(top1)}
    else:
        reason = without_labels(config, split=split)
        if reason is not None:
            raise ConfigError(f"run '{folder.name}': a probe needs labelled images, and {reason}")
        verdict = judge_encoder(config, checkpoint, split=split, use_ema=use_ema)
        body = {"values": final_values(verdict), **_intervals(verdict)}
    head = {"split": split, "task": config.task, "protocol": protocol, "step": checkpoint.step, "ema": is_ema}
    return _record(folder, {**head, **body})


def finished_checkpoint(folder: RunFolder) -> Checkpoint:
    """The last checkpoint of a run that has come to its end.

    Raises:
        ConfigError: The run is not finished.
    """
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None or not is_finished(folder):
        raise ConfigError(f"run '{folder.name}' is not finished; train it to its end first, then probe it")
    return checkpoint


def without_labels(config: RunConfig, *, split: Split) -> str | None:
    """Why the data of a run cannot be probed for want of labels, by the indexes alone; None where it can.

    Raises:
        ConfigError: A split is not set, or has no index.
    """
    if config.task == "classify":  # refused without labels before it trained
        return None
    wanted: tuple[Split, ...] = ("validation",) if split == "validation" else ("validation", split)
    for which in wanted:
        url = _url(config, which)
        reason = _unlabelled(f"data.{_KEYS[which]} = '{url}'", url)
        if reason is not None:
            return reason
    source = _labelled_like_validation(config)
    if source is None:
        return _NO_BANK.format(load_index(_url(config, "validation")).num_classes)
    return _unlabelled(f"data.train = '{config.data.train}'" if config.data.mix is None else "data.mix", source)


def _unlabelled(name: str, source: Source) -> str | None:
    labels = load_source(source).labels
    missing = int((labels < 0).sum())
    if missing == len(labels):
        return f"{name} has no labels"
    return f"{name}: {missing:,} of {len(labels):,} images have no label" if missing else None


def judge_encoder(config: RunConfig, checkpoint: Checkpoint, *, split: Split, use_ema: bool | None = None) -> Verdict:
    """Judges a checkpoint and the untrained encoder of the same seed; weights as in `probe_run`."""
    require_scikit_learn()
    model = untrained(config)
    control = _judge(model, config, split)
    model.load_state_dict(checkpoint.read(weights_file(config, checkpoint, use_ema=use_ema)))
    trained = _judge(model, config, split)
    sources = load_index(_url(config, split)).sources
    gain = paired_gain(trained.mean_token.correct_Q, control.mean_token.correct_Q, sources)
    return Verdict(split, trained, control, gain)


def judge_classifier(config: RunConfig, checkpoint: Checkpoint, *, split: Split, use_ema: bool | None = None) -> Interval:
    """Top-1 of a checkpoint's classifier on a split; weights as in `probe_run`."""
    model = untrained(config)
    model.load_state_dict(checkpoint.read(weights_file(config, checkpoint, use_ema=use_ema)))
    objective = create_objective(model, config)
    precision = resolve_precision(config.train.precision, next(model.parameters()).device.type)
    url = _url(config, split)
    rows_NM = torch.cat(list(measure_images(objective, config, url, precision=precision)))
    return accuracy_interval(rows_NM[:, objective.measures.index("top1")].numpy(), load_index(url).sources)


def untrained(config: RunConfig) -> MaskedAutoencoder | Classifier:
    """The model of the run's seed before any training, that of `train.init_from` included."""
    torch.manual_seed(config.train.seed)
    return create_model(config.model).to(choose_device("auto" if config.scale.use_gpu else False, 0))


def probe_raw_pixels(config: RunConfig, *, split: Split) -> Interval:
    """Accuracy of the linear probe on pixels: what needs no model at all."""
    require_scikit_learn()

    def rows(which: Literal["train"] | Split) -> Rows:
        source = _bank(config) if which == "train" else _url(config, which)
        pixels, labels = raw_pixels(read_images(config, source))
        return Rows(pixels, labels, load_source(source).sources)

    return raw_pixel_probe(rows("train"), rows("validation"), rows(split)).top1


def _judge(model: MaskedAutoencoder | Classifier, config: RunConfig, split: Split) -> Judgement:
    def features(which: Literal["train"] | Split) -> tuple[Features, NDArray[Any]]:
        source = _bank(config) if which == "train" else _url(config, which)
        precision = resolve_precision(config.train.precision, next(model.parameters()).device.type)
        found = encode_images(model, config, source, precision=precision)
        return found, np.asarray(load_source(source).sources)

    train, train_sources = features("train")
    validation, validation_sources = features("validation")
    judged, judged_sources = (validation, validation_sources) if split == "validation" else features("test")
    return judge(
        train,
        validation,
        judged,
        train_sources=train_sources,
        validation_sources=validation_sources,
        judged_sources=judged_sources,
    )


def _bank(config: RunConfig) -> Source:
    """The training images that a probe fits: of a mix, the data sets with the classes of the validation images."""
    found = _labelled_like_validation(config)
    if found is None:
        raise ConfigError(_NO_BANK.format(load_index(_url(config, "validation")).num_classes))
    return found


def _labelled_like_validation(config: RunConfig) -> Source | None:
    """As `_bank`; None where no data set of the mix has these classes."""
    if config.data.mix is None:
        return config.data.source
    return with_classes(config.data.source, load_index(_url(config, "validation")).num_classes)


def _url(config: RunConfig, which: Split) -> str:
    key = _KEYS[which]
    url = getattr(config.data, key)
    if url is None:
        raise ConfigError(f"data.{key} is not set; the probe reads it: give the run a data.{key}")
    return str(url)


def final_values(verdict: Verdict) -> dict[str, float]:
    """The verdict in the names of the records."""
    trained, control = verdict.trained, verdict.control
    values = {
        "final/probe_top1": trained.mean_token.top1.value,
        "final/probe_top1_gain": verdict.gain.value,
        "final/control_top1": control.mean_token.top1.value,
        "final/cls_top1": trained.cls_token.top1.value,
        "final/knn_top1": trained.knn.value,
    }
    for per_class, result in trained.few_labels.items():
        if result is not None:
            values[f"final/fewshot{per_class}_top1"] = result.top1.value
    if trained.few_labels.get(10) is not None:
        values["final/fewshot_top1"] = values["final/fewshot10_top1"]
    return values


def _record(folder: RunFolder, body: dict[str, Any]) -> dict[str, Any]:
    split = body["split"]
    if split == "test" or folder.read_json("probe_test.json") is None:
        with later_records(folder) as writer:
            write_final(folder, writer, body["step"], body["values"])
    folder.write_json(f"probe_{split}.json", body)
    return body


def _few(result: FewLabelResult | None) -> dict[str, Any] | None:
    if result is None:
        return None
    return {"top1": [result.top1.value, result.top1.low, result.top1.high], "std_over_draws": result.std}


def _triple(interval: Interval) -> list[float]:
    return [interval.value, interval.low, interval.high]


def _intervals(verdict: Verdict) -> dict[str, Any]:
    return {
        "probe_top1": _triple(verdict.trained.mean_token.top1),
        "cls_top1": _triple(verdict.trained.cls_token.top1),
        "control_top1": _triple(verdict.control.mean_token.top1),
        "control_cls_top1": _triple(verdict.control.cls_token.top1),
        "gain": _triple(verdict.gain),
        "chosen_c": verdict.trained.mean_token.chosen_c,
        "knn_top1": _triple(verdict.trained.knn),
        "control_knn_top1": _triple(verdict.control.knn),
        "few_labels": {str(n): _few(result) for n, result in verdict.trained.few_labels.items()},
        "control_few_labels": {str(n): _few(result) for n, result in verdict.control.few_labels.items()},
    }
