"""Weights from files into a model, whoever wrote them.

In: a `.safetensors` or `.pth` file (local or URL), or a state dict, in one of four layouts told apart by their keys:
ours; the CRATE repository's autoencoder (CRATE or ViT blocks); its classifier; facebookresearch/mae.
Out: the model, filled in place. Nothing is loaded by halves: one missing, extra or mis-shaped key refuses all of it.
What keys and shapes cannot tell: whether a published autoencoder saw all tokens or the visible ones; the configuration decides.
`.pth` files are read with `weights_only=True`: they come from strangers.
"""

import io
import pickle
import re
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from crate_ray import storage
from crate_ray.config import ConfigError, ModelConfig
from crate_ray.models.classifier import Classifier
from crate_ray.models.masked_autoencoder import MaskedAutoencoder

_LISTED = 40

# Published names as patterns, and ours; the first that matches counts. Each layer of CRATE is a pair of pre-norm
# halves: attention and ISTA in an encoder, synthesis and attention in a decoder.
_NAMES = (
    (r"^patch_embed\.proj\.", "patch_embed."),
    (r"^(decoder_blocks\.\d+)\.layers\.0\.0\.fn\.weight$", r"\1.dictionary"),
    (r"^(decoder_blocks\.\d+)\.layers\.0\.0\.norm\.", r"\1.norm1."),
    (r"^(decoder_blocks\.\d+)\.layers\.0\.1\.fn\.qkv\.", r"\1.attn.qkv."),
    (r"^(decoder_blocks\.\d+)\.layers\.0\.1\.fn\.to_out\.0\.", r"\1.attn.proj."),
    (r"^(decoder_blocks\.\d+)\.layers\.0\.1\.norm\.", r"\1.norm2."),
    (r"^(blocks\.\d+)\.layers\.0\.0\.fn\.qkv\.", r"\1.attn.qkv."),
    (r"^(blocks\.\d+)\.layers\.0\.0\.fn\.to_out\.0\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+)\.layers\.0\.0\.norm\.", r"\1.norm1."),
    (r"^(blocks\.\d+)\.layers\.0\.1\.fn\.weight$", r"\1.ista.dictionary"),
    (r"^(blocks\.\d+)\.layers\.0\.1\.norm\.", r"\1.norm2."),
    (r"^to_patch_embedding\.1\.", "patch_norm."),
    (r"^to_patch_embedding\.2\.", "patch_embed."),
    (r"^to_patch_embedding\.3\.", "embed_norm."),
    (r"^pos_embedding$", "pos_embed"),
    (r"^mlp_head\.0\.", "norm."),
    (r"^mlp_head\.1\.", "head."),
)


def load_weights(model: MaskedAutoencoder | Classifier, path_or_state_dict: str | Mapping[str, Any]) -> None:
    """Fills the model from a file or a state dict.

    Args:
        model: A model of the weights' shape.
        path_or_state_dict: Path or URL of a .safetensors or .pth file, or the mapping itself. A mapping may hold
            the state dict under "model" or "state_dict", and its names may begin with "module.".

    Raises:
        ConfigError: Unknown file type or layout, or keys that are missing, extra or of another shape: all in one message.
    """
    if isinstance(path_or_state_dict, str):
        where, contents = path_or_state_dict, _read(path_or_state_dict)
    else:
        where, contents = "the state dict", path_or_state_dict
    state = _unwrap(contents)
    expected = model.state_dict()
    if "patch_embed.weight" not in state:
        state = _from_published(state, model.config, where)
        # A published file knows nothing of trained ISTA scalars: they stay as configured.
        state |= {key: value for key, value in expected.items() if ".ista.log_" in key}
    _refuse_differences(state, expected, where)
    model.load_state_dict(state)


def _read(path: str) -> Mapping[str, Any]:
    if not storage.exists(path):
        raise ConfigError(f"weights '{path}' do not exist; give a .safetensors or .pth file")
    if path.endswith(".safetensors"):
        try:
            return safetensors.torch.load(storage.read_bytes(path))
        except safetensors.SafetensorError as error:
            raise ConfigError(f"weights '{path}' are no safetensors file: {error}") from None
    if path.endswith((".pth", ".pt")):
        return _read_pickle(path)
    raise ConfigError(f"weights '{path}': unknown file type; valid: .safetensors, .pth")


def _read_pickle(path: str) -> Mapping[str, Any]:
    fix = "save its state dict alone, in .safetensors or with torch.save, where you trust the file"
    try:
        contents = torch.load(io.BytesIO(storage.read_bytes(path)), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"weights '{path}' hold more than tensors, or are damaged ({reason}); {fix}") from None
    if not isinstance(contents, Mapping):
        raise ConfigError(f"weights '{path}' hold a {type(contents).__name__}, not a state dict; {fix}")
    return contents


def _unwrap(contents: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict itself, without the wrappings of training scripts and DataParallel."""
    for key in ("model", "state_dict"):
        if isinstance(contents.get(key), Mapping):
            contents = contents[key]
    state = {str(key): value for key, value in contents.items()}
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _from_published(state: dict[str, Tensor], config: ModelConfig, where: str) -> dict[str, Tensor]:
    """A published state dict under this project's names and shapes."""
    if "patch_embed.proj.weight" in state:
        state = _fit_autoencoder(state, config)
    elif "to_patch_embedding.2.weight" in state:
        state = {re.sub(r"^transformer\.layers\.(\d+)", r"blocks.\1.layers.0", key): value for key, value in state.items()}
    else:
        raise ConfigError(
            f"{where}: {len(state)} keys of no known layout (first: {', '.join(sorted(state)[:3]) or 'none'}); valid: weights "
            "of this project, of the CRATE repository's autoencoder or classifier, of facebookresearch/mae"
        )
    return {_rename(key): value for key, value in state.items()}


def _fit_autoencoder(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Undoes what the published autoencoders hold in another form, or hold and never use."""
    state = dict(state)
    weight = state["patch_embed.proj.weight"]
    if weight.ndim == 4:  # a convolution's (D, C, p, p) to rows in the pixel order (row, column, channel)
        state["patch_embed.proj.weight"] = weight.permute(0, 2, 3, 1).flatten(1)
    if config.encoder_tokens == "all":
        # There the decoder's table serves the encoder; the encoder's own and `decoder_embed` are in no forward pass.
        for dead in ("pos_embed", "decoder_embed.weight", "decoder_embed.bias"):
            state.pop(dead, None)
        if "decoder_pos_embed" in state:
            state["pos_embed"] = state.pop("decoder_pos_embed")
    return state


def _rename(key: str) -> str:
    for pattern, ours in _NAMES:
        renamed, matches = re.subn(pattern, ours, key)
        if matches:
            return renamed
    return key


def _refuse_differences(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    problems = [f"missing: {key}" for key in sorted(expected.keys() - state.keys())]
    problems += [f"extra: {key}" for key in sorted(state.keys() - expected.keys())]
    for key in sorted(expected.keys() & state.keys()):
        found = tuple(state[key].shape) if isinstance(state[key], Tensor) else type(state[key]).__name__
        if found != tuple(expected[key].shape):
            problems.append(f"shape: {key} is {found}, the model has {tuple(expected[key].shape)}")
    if problems:
        more = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        listing = "\n  ".join(problems[:_LISTED] + more)
        raise ConfigError(
            f"{where} does not fit the model; nothing was loaded. Check model.* (family, widths, depths):\n  {listing}"
        )
