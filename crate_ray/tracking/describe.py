"""How a run is described in MLflow: its name, tags and parameters.

In: run_meta.json, config.yaml and fingerprint.json of a run folder. Out: flat strings. Everything
here follows from the folder alone, so that a replay years later says the same. The trade-off: a
few parameters that tell runs apart in a table, not the whole configuration, which is an artifact.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crate_ray.config import ConfigError, RunConfig
from crate_ray.runs import RunFolder, user_name
from crate_ray.runs.rows import configuration_of
from crate_ray.runs.settings import settings_of
from crate_ray.tracking.client import hide_secrets, public_uri
from crate_ray.tracking.limits import valid_params, valid_tags

RUN_UID_TAG = "crate_ray.run_uid"
HEARTBEAT_TAG = "crate_ray.heartbeat"  # unix seconds at which the driver was last known to live
FOLDER_TAG = "crate_ray.folder"  # where the run folder lies, as seen from its driver
PARENT_TAG = "mlflow.parentRunId"
MAX_NAME = 18  # what the run list shows of a name
# Vermilion and blue of Okabe and Ito: told apart with every kind of colour vision.
FAMILY_COLOURS = {"crate": "#d55e00", "vit": "#0072b2"}
_DIGEST_CHARS = 16
_OTHER_COLOUR = "#7f7f7f"
_SHORT = {"untied": "qkv", "shared": "1L"}
_TRAINED = ("train", "trial", "control")


@dataclass(frozen=True)
class Description:
    """What MLflow is told of a run when it is created."""

    run_uid: str
    parent_uid: str | None
    name: str
    start_ms: int
    tags: dict[str, str]
    params: dict[str, str]


def describe(folder: RunFolder) -> Description | None:
    """Reads a run folder; None while it is being created, or when it is no run."""
    meta = folder.read_json("run_meta.json")
    if meta is None:
        return None
    is_trained = meta["kind"] in _TRAINED  # a sweep or a comparison has another kind of config.yaml, or none
    if is_trained and not folder.exists():
        return None
    config = _config(folder) if is_trained else None
    fingerprint = folder.read_json("fingerprint.json") or {}
    precision = fingerprint.get("compare", {}).get("parts", {}).get("precision")
    return Description(
        run_uid=str(meta["run_uid"]),
        parent_uid=meta.get("parent_uid"),
        name=run_name(folder.name, config),
        start_ms=to_ms(float(meta["created"])),
        tags=_tags(meta, config) | fingerprint_tags(fingerprint) | valid_tags({FOLDER_TAG: _place(folder)}),
        params=params_of(config, precision) | _configuration(config, fingerprint) if config else {},
    )


def _place(folder: RunFolder) -> str:
    """Where the folder lies, without what could open it."""
    return public_uri(folder.uri.partition("?")[0])


def to_ms(time_s: float) -> int:
    """Unix seconds as MLflow's milliseconds."""
    return round(time_s * 1000)


def run_name(folder_name: str, config: RunConfig | None) -> str:
    """At most 18 characters, what tells runs apart first: `12x384 s0 crate`, `12x384 e0.2 s1 crate`, `4x128 cls s0 crate`.

    A name that the user chose stands as it is, up to the length that MLflow shows.
    """
    if config is None or config.name is not None:
        return folder_name[:MAX_NAME]
    return " ".join([*_shape(config), f"s{config.train.seed}", config.model.family])[:MAX_NAME]


def _shape(config: RunConfig) -> list[str]:
    """Depth and width, and what else is not as in the presets."""
    model = config.model
    parts = [f"{model.encoder_depth}x{model.width}"]
    parts += [_SHORT.get(word, word) for word in model.ablation]
    if model.has_ista and model.ista_step_size != 0.1:
        parts.append(f"e{_number(model.ista_step_size)}")
    if config.task == "classify":
        parts.append("cls")
    elif model.mask_ratio != 0.75:
        parts.append(f"m{_number(model.mask_ratio)}")
    return parts


def params_of(config: RunConfig, precision: str | None = None) -> dict[str, str]:
    """The parameters of a run, flat; `precision` is the resolved one."""
    settings = {key: "none" if value is None else value for key, value in settings_of(config, precision).items()}
    return valid_params({key: _number(value) for key, value in settings.items()})


def fingerprint_tags(fingerprint: Mapping[str, Any]) -> dict[str, str]:
    """The first digits of a run's digests: what it is, what it may be compared with, and on which data."""
    digests = {
        "crate_ray.resume_digest": fingerprint.get("resume", {}).get("digest"),
        "crate_ray.compare_digest": fingerprint.get("compare", {}).get("digest"),
        "crate_ray.data_digest": fingerprint.get("compare", {}).get("parts", {}).get("data.digest"),
    }
    return {key: str(value)[:_DIGEST_CHARS] for key, value in digests.items() if value}


def _configuration(config: RunConfig, fingerprint: Mapping[str, Any]) -> dict[str, str]:
    """The parameter that runs share which differ in their seed alone: what charts average over. Readable, and unique."""
    parts = fingerprint.get("resume", {}).get("parts")
    words = [*_shape(config), config.model.family]
    return valid_params({"configuration": " ".join([*words, configuration_of(parts)])}) if parts else {}


def _config(folder: RunFolder) -> RunConfig | None:
    """The configuration; None for one that this version cannot read, whose numbers are sent all the same."""
    try:
        return folder.read_config()
    except ConfigError:
        return None


def _tags(meta: Mapping[str, Any], config: RunConfig | None) -> dict[str, str]:
    family = meta.get("family") or (config.model.family if config else None)
    values = {
        RUN_UID_TAG: meta["run_uid"],
        "kind": meta["kind"],
        "family": family,
        "study": meta.get("study"),
        "stage": meta.get("stage"),
        "task": "classify" if config and config.task == "classify" else None,
        "seed": config.train.seed if config else None,
        "mlflow.runColor": FAMILY_COLOURS.get(str(family), _OTHER_COLOUR),
        "mlflow.user": meta.get("user") or user_name(),
        "mlflow.source.name": hide_secrets(meta.get("command") or ""),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": meta.get("git_commit"),
        "crate_ray.git_dirty": None if meta.get("git_dirty") is None else str(meta["git_dirty"]).lower(),
    }
    return valid_tags({key: value for key, value in values.items() if value not in (None, "")})


def _number(value: Any) -> str:
    """Numbers without trailing digits, tuples as comma-separated lists."""
    if isinstance(value, tuple):
        return ",".join(_number(item) for item in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
