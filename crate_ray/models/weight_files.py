"""Weights files as strangers send them, read without running anything of theirs; and ours, written.

In: a `.safetensors` or `.pth` file (local or URL), or a mapping. Out: `WeightsFile`: tensors under our names, the layout they
came in, and the model configuration where the file carries one. Ours do: it stands as JSON in the safetensors metadata
under `config`, because heads, lambda and eta are not in a state dict. `.pth` files are read with `weights_only=True`.
"""

import io
import json
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from crate_ray import storage
from crate_ray.config import SCHEMA_VERSION, ConfigError, ModelConfig
from crate_ray.models.layouts import Architecture, Layout, infer_architecture, recognise, to_ours

SUFFIXES = (".safetensors", ".pth", ".pt")
_WRAPPINGS = ("model", "state_dict")
_PREFIXES = ("module.", "_orig_mod.")
_OF_DAMAGED_PICKLES = (
    pickle.UnpicklingError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
)
"""What torch.load was seen to raise for files cut short and with flipped bytes."""
_STATE_DICT_ALONE = "save its state dict alone, in .safetensors or with torch.save, where you trust the file"


@dataclass(frozen=True)
class WeightsFile:
    """A state dict under our names, and where it came from."""

    where: str
    layout: Layout
    state: Mapping[str, Any]
    config: ModelConfig | None

    @property
    def architecture(self) -> Architecture:
        """What the names and shapes tell."""
        return infer_architecture(self.state)


def read_weights(path_or_state_dict: str | Mapping[str, Any]) -> WeightsFile:
    """Reads a file or takes a mapping, unwraps it, and recognises its layout.

    Raises:
        ConfigError: No such file, an unknown type, a damaged file, one that holds more than tensors, or an unknown layout.
    """
    metadata: Mapping[str, str] = {}
    if isinstance(path_or_state_dict, str):
        where = f"weights '{path_or_state_dict}'"
        contents, metadata = _read(path_or_state_dict, where)
    else:
        where, contents = "the state dict", path_or_state_dict
    state = _unwrap(contents)
    layout = recognise(state)
    if layout is None:
        raise ConfigError(
            f"{where}: {len(state)} keys of no known layout (first: {', '.join(sorted(state)[:3]) or 'none'}); valid: weights "
            "of this project, of the CRATE repository's autoencoder or classifier, of facebookresearch/mae"
        )
    return WeightsFile(where, layout, to_ours(state, layout), _stored_config(metadata, where))


def encode_safetensors(state: Mapping[str, Tensor], config: ModelConfig) -> bytes:
    """A safetensors file with the model's configuration in its metadata."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    return safetensors.torch.save(tensors, metadata=config_metadata(config))


def config_metadata(config: ModelConfig) -> dict[str, str]:
    """What a safetensors file of ours says about its model."""
    return {"format": "pt", "schema_version": str(SCHEMA_VERSION), "config": json.dumps(config.model_dump(mode="json"))}


def _read(path: str, where: str) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    if not storage.exists(path) or storage.is_dir(path):
        raise ConfigError(f"{where} do not exist; give a .safetensors or .pth file")
    if not path.endswith(SUFFIXES):
        raise ConfigError(f"{where}: unknown file type; valid: {', '.join(SUFFIXES)}")
    data = storage.read_bytes(path)
    if path.endswith(".safetensors"):
        return _read_safetensors(data, where)
    return _read_pickle(data, where), {}


def _read_safetensors(data: bytes, where: str) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ConfigError(f"{where} are no safetensors file, or a damaged one: {error}; copy it again") from None
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tensors, header.get("__metadata__", {})


def _read_pickle(data: bytes, where: str) -> Mapping[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of archives that are then refused
            contents = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except _OF_DAMAGED_PICKLES as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{where} hold more than tensors, or are damaged ({reason}); {_STATE_DICT_ALONE}") from None
    if not isinstance(contents, Mapping):
        raise ConfigError(f"{where} hold a {type(contents).__name__}, not a state dict; {_STATE_DICT_ALONE}")
    return contents


def _unwrap(contents: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict itself, without the wrappings of training scripts, DataParallel and torch.compile."""
    for key in _WRAPPINGS:
        if isinstance(contents.get(key), Mapping):
            contents = contents[key]
    state = {str(key): value for key, value in contents.items()}
    for prefix in _PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _stored_config(metadata: Mapping[str, str], where: str) -> ModelConfig | None:
    if "config" not in metadata:
        return None
    try:
        values = json.loads(metadata["config"])
    except json.JSONDecodeError:
        values = None
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: the `config` of its metadata is no JSON object; remove it, or write the file again")
    return ModelConfig.parse(values, where=f"the metadata of {where}")
