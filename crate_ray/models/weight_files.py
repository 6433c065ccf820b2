"""Weights files as strangers send them, read without running anything of theirs; and ours, written.

In: a `.safetensors` or `.pth` file (local or URL), or a mapping. Out: `WeightsFile`: tensors under our names, the layout they
came in, and the model configuration where the file carries one. Ours do: it stands as JSON in the safetensors metadata
under `config`, because heads, lambda and eta are not in a state dict. `.pth` files are read with `weights_only=True`; of
Python's own classes only `argparse.Namespace` is let in, which the published training code saves beside its weights.
"""

import argparse
import io
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from crate_ray import storage
from crate_ray.config import ConfigError, ModelConfig
from crate_ray.models.layouts import Architecture, Layout, infer_architecture, recognise, to_ours

SUFFIXES = (".safetensors", ".pth", ".pt")
_WRAPPINGS = ("model", "state_dict")
_PREFIXES = ("module.", "_orig_mod.")
_OF_DAMAGED_PICKLES = (
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
)
"""What torch.load was seen to raise, beside UnpicklingError, for files cut short and with flipped bytes."""
_FORBIDDEN = re.compile(r"GLOBAL ([\w.]+)")
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

    @property
    def encoder_tokens(self) -> Literal["all", "visible"] | None:
        """Which tokens the encoder of an autoencoder's file saw; None where nothing tells.

        As its configuration says, or as its decoder's form does. Else as published: the CRATE repository shows its encoder all
        tokens, its ViT without a bias on Q, K and V too; facebookresearch/mae, with that bias, the visible ones.
        """
        if self.config is not None:
            return self.config.encoder_tokens if self.config.num_classes is None else None
        found = self.architecture
        if found.decoder_width not in (None, found.width):
            return "visible"  # with all tokens, the mask token has the encoder's width
        if self.layout == "crate-ray" and found.has_decoder:
            return "visible" if "decoder_embed.weight" in self.state else "all"
        if self.layout == "mae":
            return "visible" if found.qkv_bias else "all"
        return "all" if self.layout == "crate" else None


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


def not_finite(state: Mapping[str, Any]) -> list[str]:
    """The names of the tensors that hold NaN or infinite values."""
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.is_floating_point()}
    dense = {key: value for key, value in tensors.items() if value.layout == torch.strided and not value.is_meta}
    return [key for key, value in sorted(dense.items()) if not bool(torch.isfinite(value).all())]


def encode_safetensors(state: Mapping[str, Tensor], config: ModelConfig | None) -> bytes:
    """A safetensors file; its metadata holds the configuration of the model, if it is of one."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    return safetensors.torch.save(tensors, metadata=None if config is None else config_metadata(config))


def config_metadata(config: ModelConfig) -> dict[str, str]:
    """What a file of ours says about its model.

    One entry: safetensors writes several in an order that changes between calls, and equal weights are to be equal files.
    """
    return {"config": json.dumps(config.model_dump(mode="json"))}


def _read(path: str, where: str) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    if not storage.exists(path):
        raise ConfigError(f"{where} do not exist; give a .safetensors or .pth file")
    if storage.is_dir(path):
        raise ConfigError(
            f"{where} are a folder; give a .safetensors or .pth file, or make one from a run's folder: "
            "`crate-ray export RUN OUT.safetensors --format safetensors`"
        )
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
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # of archives that are then refused
            contents = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its text advises to load without that guard
        name = _FORBIDDEN.search(str(error))
        found = f"hold Python objects ({name[1]})" if name else "are damaged, or hold Python objects"
        raise ConfigError(f"{where} {found}, which are never loaded: they can run code; {_STATE_DICT_ALONE}") from None
    except _OF_DAMAGED_PICKLES as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{where} are damaged, or no file of torch.save ({reason}); copy it again") from None
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
