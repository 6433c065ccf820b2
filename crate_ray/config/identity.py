"""What makes two runs the same run, and what makes them comparable.

In: a RunConfig and the digest of its data. Out: two digests with the parts they cover.
*resume*: the numbers of the run follow from these; a change is another run.
*compare*: what must agree before two runs may stand in one comparison.
"""

import hashlib
import json
from typing import Any

from crate_ray.config.base import SCHEMA_VERSION
from crate_ray.config.run import RunConfig

# Part of the run's identity: everything that decides which numbers come out. Not scale, storage,
# tracking, cadence, loaders or micro-batch: those may change while the run goes on.
_NOT_IN_DATA = {
    *("train", "mix", "eval", "test"),  # the digest of their content counts
    *("num_loaders", "preprocess", "loader_timeout_s", "cache_dir", "cache_bytes"),
    *("max_pixels", "on_error", "max_replaced_fraction"),
}
_NOT_IN_TRAIN = {"micro_batch", "init_from"}  # where first weights lie; what they hold is train.init_digest

EVALUATION_PROTOCOL = {"probe": 1, "eval_loss": 1}


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON form, 64 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def resume_parts(config: RunConfig, data_digest: str) -> dict[str, Any]:
    """What a run's numbers follow from, as a flat mapping of dotted keys."""
    values = config.model_dump(mode="json")
    sections = {
        "task": values["task"],
        "model": values["model"],
        "data": {**{k: v for k, v in values["data"].items() if k not in _NOT_IN_DATA}, "digest": data_digest},
        "optimizer": values["optimizer"],
        "schedule": values["schedule"],
        "train": {k: v for k, v in values["train"].items() if k not in _NOT_IN_TRAIN},
    }
    return flatten(sections)


def compare_parts(config: RunConfig, data_digest: str, precision: str) -> dict[str, Any]:
    """What two runs must share to be compared; `precision` is the resolved one."""
    return flatten(
        {
            "task": None if config.task == "pretrain" else config.task,
            "data": {"digest": data_digest, "augment": config.data.augment},
            "evaluation": {**EVALUATION_PROTOCOL, "weights": "ema" if config.eval.use_ema else None},
            "schedule": config.schedule.model_dump(mode="json"),
            "precision": precision,
        }
    )


def fingerprint(config: RunConfig, data_digest: str, precision: str) -> dict[str, Any]:
    """The content of fingerprint.json."""
    resume = resume_parts(config, data_digest)
    compare = compare_parts(config, data_digest, precision)
    return {
        "schema_version": SCHEMA_VERSION,
        "resume": {"digest": digest(resume), "parts": resume},
        "compare": {"digest": digest(compare), "parts": compare},
    }


def run_name(config: RunConfig, resume_digest: str) -> str:
    """The folder's name: the one given, else recipe and the first 8 hex digits of the identity."""
    return config.name or f"{config.recipe}-{resume_digest[:8]}"


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping of dotted keys; None is left out, so that a new optional key changes no digest."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        elif value is not None:
            flat[prefix + key] = value
    return flat
