"""Fine-tuning as a judgement: the classifier task of this package, started from a checkpoint, in run folders of its own.

In: a subject and seeds. Out: configurations of runs, half of them the control from random weights; and, once these have
finished, findings as of any other protocol. The hyperparameters are those of facebookresearch/mae for ViT-B, without its
RandAugment, random erasing, drop path and mixup, the same for every family: a fixed protocol, not each model's best. An
override makes another number, so what was overridden stands beside it. Who trains is the caller's.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crate_ray import storage
from crate_ray.config import ConfigError, RunConfig
from crate_ray.config.load import apply_override
from crate_ray.data import load_index, load_source
from crate_ray.evaluation.intervals import Interval, mean_interval
from crate_ray.evaluation.protocols import FINE_TUNE
from crate_ray.runs import RunFolder
from crate_ray.training.checkpoint import latest_checkpoint
from crate_ray.training.ema import weights_file
from crate_ray.training.probes.judge import add_findings, classifier_correct, held_report
from crate_ray.training.probes.measures import Findings, triple
from crate_ray.training.probes.splits import split_source, split_url, without_labels
from crate_ray.training.probes.subjects import Subject

MAX_BATCH = 1024
STEPS_AN_EPOCH = 10
_NAME_LENGTH = 40
_NOT_INHERITED = {"mixup_alpha", "cutmix_alpha"}
_FREE = ("data", "scale", "storage", "tracking")


class FineTunes(NamedTuple):
    """The runs of one judgement, by seed: from the checkpoint, and from random weights."""

    tuned: list[RunConfig]
    control: list[RunConfig]


def plan_fine_tunes(subject: Subject, *, seeds: int, overrides: Sequence[str] = ()) -> FineTunes:
    """The configurations of the runs; the same request again gives the same runs, which then go on or are done.

    Args:
        subject: Whose encoder is fine-tuned, on its data.
        seeds: Runs of each kind, with the seeds 0, 1, ...
        overrides: `a.b=value` on top of the protocol.

    Raises:
        ConfigError: A classifier, images without labels, or an override that does not fit.
    """
    if subject.config.task == "classify":
        raise ConfigError(f"run '{subject.folder.name}' is a classifier already; --fine-tune starts from a pretrained encoder")
    reason = without_labels(subject.config, split=subject.request.split)
    if reason is not None:
        raise ConfigError(f"run '{subject.folder.name}': fine-tuning needs labelled images, and {reason}")
    init_from = _weights(subject)
    planned = [[_config(subject, seed, overrides, weights) for seed in range(seeds)] for weights in (init_from, None)]
    return FineTunes(*planned)


def record_fine_tunes(
    subject: Subject, tuned: Sequence[RunFolder], control: Sequence[RunFolder], *, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Judges the finished runs and adds what was found to the report of the run they started from.

    Args:
        subject: As for `plan_fine_tunes`.
        tuned: The folders of its runs.
        control: Those of the runs from random weights.
        overrides: As for `plan_fine_tunes`.

    Returns:
        The content of probe_<what>.json.
    """
    sources_N = np.asarray(load_index(split_url(subject.config, subject.request.split)).sources)
    tuned_SN, control_SN = (_correct(folders, subject) for folders in (tuned, control))
    gain = mean_interval((tuned_SN - control_SN).mean(axis=0), sources_N)
    correct = {"finetune_top1": tuned_SN.mean(axis=0), "finetune_control_top1": control_SN.mean(axis=0)}
    values = {name: float(share_N.mean()) for name, share_N in correct.items()}
    body = {
        "fine_tune": _over_seeds(tuned_SN, sources_N, tuned),
        "control_fine_tune": _over_seeds(control_SN, sources_N, control),
        "fine_tune_gain": triple(gain),
        "fine_tune_overrides": list(overrides),
    }
    found = Findings({**values, "finetune_gain": gain.value}, body, correct)
    return add_findings(subject, held_report(subject), found, FINE_TUNE)


def _config(subject: Subject, seed: int, overrides: Sequence[str], init_from: str | None) -> RunConfig:
    config = subject.config
    held = config.model_dump(mode="json")
    num_images = load_source(split_source(config, "train")).num_samples
    batch = min(MAX_BATCH, 2 ** max(0, int(math.log2(max(1, num_images // STEPS_AN_EPOCH)))))
    what = "finetune" if init_from else "scratch"
    values: dict[str, Any] = {
        **{key: held[key] for key in _FREE},
        "recipe": f"{subject.folder.name[:_NAME_LENGTH]}-{what}",
        "task": "classify",
        "model": _model(held["model"], config.model.family, load_index(split_url(config, "validation")).num_classes),
        "data": {key: value for key, value in held["data"].items() if key not in _NOT_INHERITED},
        "optimizer": {"base_lr": 5e-4, "weight_decay": 0.05, "betas": [0.9, 0.999], "layer_decay": 0.65},
        "schedule": {"warmup_epochs": 5},
        "train": {"epochs": 100, "global_batch": batch, "seed": seed, "label_smoothing": 0.1, "init_from": init_from}
        | {key: held["train"][key] for key in ("precision", "micro_batch", "deterministic")},
        "eval": {"whitebox_every_steps": None},
    }
    values["storage"] = {"path": _beside(subject.folder)}
    for item in overrides:
        apply_override(values, item)
    return RunConfig.parse(values, where=f"the fine-tuning of {subject.folder.name}")


def _model(model: Mapping[str, Any], family: str, num_classes: int) -> dict[str, Any]:
    """The encoder with a head: on the class token of CRATE, on the mean of the patches of MAE, as each is published."""
    kept = {key: value for key, value in model.items() if value is not None}
    return {**kept, "num_classes": num_classes, "embedding": "linear", "pool": "cls" if family == "crate" else "mean"}


def _weights(subject: Subject) -> str:
    """What the runs start from: the file of the checkpoint, or the run where the last checkpoint is in shards."""
    if subject.weights in subject.checkpoint.files:
        return storage.join(subject.checkpoint.uri, subject.weights)
    if subject.is_end and not subject.is_ema:
        return subject.folder.uri
    raise ConfigError(
        f"checkpoint {subject.checkpoint.uri} is in shards, and of these --fine-tune takes the last weights of a finished run "
        "alone: leave --step and --ema out"
    )


def _beside(folder: RunFolder) -> str:
    """The folder that a run's folder lies in."""
    place, mark, query = folder.uri.partition("?")
    return place.rpartition("/")[0] + mark + query


def _correct(folders: Sequence[RunFolder], subject: Subject) -> NDArray[np.float64]:
    """Which judged rows each classifier answers correctly, (seeds, N)."""
    found = []
    for folder in folders:
        config, checkpoint = folder.read_config(), latest_checkpoint(folder)
        assert checkpoint is not None
        found.append(classifier_correct(config, checkpoint, weights_file(config, checkpoint), subject.request.split))
    return np.asarray(found, dtype=np.float64)


def _over_seeds(correct_SN: NDArray[np.float64], sources_N: NDArray[Any], folders: Sequence[RunFolder]) -> dict[str, Any]:
    by_seed = correct_SN.mean(axis=1)
    interval: Interval = mean_interval(correct_SN.mean(axis=0), sources_N)
    spread = float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None
    return {
        "top1": triple(interval),
        "std_over_seeds": spread,
        "top1_by_seed": by_seed.tolist(),
        "runs": [folder.uri for folder in folders],
    }
