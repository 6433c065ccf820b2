"""The weights that a new run starts from: `train.init_from`, a weights file or another run.

In: a configuration. Out: the same with the digest of these weights, so that a run is known by what it started from and not
by where that lay; refusals before anything is trained; a model with the weights in it. A classifier takes the encoder,
pretraining takes all. A run that goes on needs neither file nor folder again: its digest is in its own folder.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

from crate_ray import storage
from crate_ray.config import ConfigError, ModelConfig, RunConfig, resume_parts
from crate_ray.models import Classifier, MaskedAutoencoder, create_model, load_weights
from crate_ray.models.weight_files import WeightsFile, read_weights
from crate_ray.runs import RunFolder, list_runs
from crate_ray.training.checkpoint import MODEL_FILE, Checkpoint, latest_checkpoint
from crate_ray.training.sharded import files_of

_FIX = (
    "give a .safetensors or .pth file, or the folder of a run (`crate-ray runs` lists them): "
    "--set train.init_from=out/digits_crate_mae-1a2b3c4d"
)


@dataclass(frozen=True)
class _Source:
    """A weights file or the weights of a checkpoint, their digest, and the model of the run that wrote them, where known."""

    contents: str | Checkpoint
    digest: str
    model: ModelConfig | None

    def read(self) -> WeightsFile:
        """The tensors with their configuration; that of the run where its checkpoint, an old one, carries none."""
        contents = self.contents
        file = read_weights(contents if isinstance(contents, str) else contents.read(MODEL_FILE))
        return file if file.config is not None else replace(file, config=self.model)


def pin_weights(config: RunConfig) -> RunConfig:
    """The configuration with `train.init_digest` filled in; as it is without `train.init_from`.

    Args:
        config: With absolute paths.

    Raises:
        ConfigError: The weights are not there and no run was started from them, or have another digest than the one given.
    """
    train = config.train
    if train.init_from is None:
        return config
    source = _find(train.init_from)
    digest = source.digest if source else train.init_digest or _recorded_digest(config)
    if train.init_digest not in (None, digest):
        raise ConfigError(
            f"train.init_from = '{train.init_from}' has the SHA-256 {digest}, but train.init_digest = {train.init_digest}: "
            "other weights than were asked for; give the right file, or leave train.init_digest out"
        )
    return config.model_copy(update={"train": train.model_copy(update={"init_digest": digest})})


def check_first_weights(config: RunConfig, folder: RunFolder) -> None:
    """Refuses weights that do not fit, before a cluster is touched; a run that has a checkpoint needs them no more.

    Args:
        config: From `pin_weights`, its model section as the recipe gave it.
        folder: Where the run has or will have its checkpoints.

    Raises:
        ConfigError: Another architecture, keys missing or too many, lambda or eta not said: see `load_weights`.
    """
    if config.train.init_from is not None and latest_checkpoint(folder) is None:
        _check_ista_is_given(config)
        load_first_weights(create_model(config.model), config)


def load_first_weights(model: MaskedAutoencoder | Classifier, config: RunConfig) -> None:
    """Fills the model from `train.init_from`; does nothing without it.

    Raises:
        ConfigError: The weights are gone, have changed since the run was prepared, or do not fit.
    """
    init_from = config.train.init_from
    if init_from is None:
        return
    source = _find(init_from)
    if source is None or source.digest != (config.train.init_digest or source.digest):
        state = "is gone" if source is None else "has changed since this run was prepared"
        raise ConfigError(f"train.init_from = '{init_from}' {state}, and there is no checkpoint to go on from; {_FIX}")
    load_weights(model, source.read(), part="encoder" if config.task == "classify" else "all")


def _find(uri: str) -> _Source | None:
    """The weights behind a path or URL; None when there is nothing."""
    if not storage.exists(uri):
        return None
    if not storage.is_dir(uri):
        return _Source(uri, hashlib.sha256(storage.read_bytes(uri)).hexdigest(), None)
    folder = RunFolder(uri)
    checkpoint = latest_checkpoint(folder) if folder.exists() else None
    if checkpoint is None:
        what = "has no checkpoint yet" if folder.exists() else "is a folder, but not that of a run"
        raise ConfigError(f"train.init_from = '{uri}' {what}; {_FIX}")
    if MODEL_FILE in checkpoint.files:
        file, digest = storage.join(checkpoint.uri, MODEL_FILE), str(checkpoint.files[MODEL_FILE]["sha256"])
        return _Source(file, digest, folder.read_config().model)
    sums = [str(checkpoint.files[shard]["sha256"]) for shard in files_of(checkpoint, MODEL_FILE)]
    return _Source(checkpoint, hashlib.sha256("".join(sums).encode()).hexdigest(), folder.read_config().model)


def _recorded_digest(config: RunConfig) -> str:
    """The digest of weights that are gone, from the run in `storage.path` that started from them: the same run but for it."""
    found = set()
    for folder in list_runs(config.storage.path):
        parts = (folder.read_json("fingerprint.json") or {}).get("resume", {}).get("parts", {})
        digest = parts.get("train.init_digest")
        if digest is not None and config.name in (None, folder.name) and _pinned_parts(config, digest, parts) == parts:
            found.add(str(digest))
    if len(found) == 1:
        return found.pop()
    runs = f"{len(found)} runs in storage.path were" if found else "no run in storage.path was"
    raise ConfigError(
        f"train.init_from = '{config.train.init_from}' does not exist, and {runs} started from it; "
        + ("name the one to go on with: --set name=..." if found else _FIX)
    )


def _pinned_parts(config: RunConfig, digest: str, parts: dict[str, Any]) -> dict[str, Any]:
    """The identity that the configuration would have with these weights, and the data of the run it is compared with."""
    pinned = config.model_copy(update={"train": config.train.model_copy(update={"init_digest": digest})})
    return resume_parts(pinned, parts.get("data.digest", ""))


def _check_ista_is_given(config: RunConfig) -> None:
    """Lambda and eta are no tensors: a file that does not carry its configuration leaves them to be said."""
    missing = [key for key in ("ista_lambda", "ista_step_size") if key not in config.model.model_fields_set]
    source = config.train.init_from
    if not missing or not config.model.has_ista or source is None or storage.is_dir(source):
        return
    if read_weights(source).config is None:
        raise ConfigError(
            f"train.init_from = '{source}' holds no lambda and no eta, and others make another function of a CRATE encoder; "
            f"say what it was trained with: {' and '.join(f'model.{key}' for key in missing)} (the code of the "
            "published autoencoder has lambda 0.5 and eta 0.1 today, that of the classifier 0.1 and 0.1)"
        )
