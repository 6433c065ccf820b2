"""Weights from files into a model, whoever wrote them.

In: a model and a file or a state dict of any layout in `layouts`. Out: the model, filled in place, and a `LoadedWeights` that
says what came from the file and what did not. Nothing is loaded by halves: one missing, extra, mis-shaped or non-finite
tensor refuses all of it.

What keys and shapes cannot tell is taken from the model's configuration: the number of heads, lambda, eta, and whether an
autoencoder sees all tokens or the visible ones. A file of ours carries its configuration, so there a difference is refused; a
bare state dict carries none and is believed. A classifier has no such token setting: `WeightsFile.encoder_tokens` decides.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from crate_ray.config import ConfigError, ModelConfig
from crate_ray.models.classifier import Classifier
from crate_ray.models.layouts import Layout, infer_architecture, is_of_decoder
from crate_ray.models.masked_autoencoder import MaskedAutoencoder
from crate_ray.models.patches import interpolate_positions
from crate_ray.models.weight_files import WeightsFile, not_finite, read_weights

log = logging.getLogger(__name__)

_LISTED = 40
_TABLES = ("pos_embed", "decoder_pos_embed")
_ENCODER = ("patch_norm", "patch_embed", "embed_norm", "cls_token", "pos_embed", "blocks", "norm")
_DECODER_EMBED = ("decoder_embed.weight", "decoder_embed.bias")

# Configuration keys that change what weights compute and leave no mark on their shapes.
_OF_THE_ENCODER = ("num_heads", "block_norm_eps", "ista_learnable", "ista_step_size", "ista_lambda", "share_layers")
_OF_THE_DECODER = ("encoder_tokens", "decoder_num_heads", "norm_pix_loss")


@dataclass(frozen=True)
class LoadedWeights:
    """What a file gave."""

    layout: Layout
    has_decoder: bool
    """Whether the file holds a decoder, loaded or not."""
    interpolated: tuple[str, ...]
    """Position tables that were resized to the model's grid."""
    untrained: tuple[str, ...]
    """Parameters that no training has touched: absent from the file, and at their initial values, or dead in it."""
    warnings: tuple[str, ...]
    """What was logged."""


def load_weights(
    model: MaskedAutoencoder | Classifier,
    weights: str | Mapping[str, Any] | WeightsFile,
    *,
    part: Literal["all", "encoder"] = "all",
    convert: bool = False,
) -> LoadedWeights:
    """Fills the model from a file or a state dict.

    Position tables of another grid are interpolated (`patches.interpolate_positions`), fixed ones too. A file without any
    decoder leaves an autoencoder's decoder at its initial values and warns. Trained lambda and eta
    (`ista_learnable: layer`) start as configured where the file had constants, or does not say.

    Args:
        model: A model of the weights' shape; its image size may be another.
        weights: Path or URL of a .safetensors or .pth file, what `read_weights` gave for one, or the mapping itself, which may
            hold the state dict under "model" or "state_dict", and its names may begin with "module.".
        part: "encoder" takes patch embedding, class token, positions, layers and the last norm alone; the file's decoder or
            head is ignored, and so is its norm where the model averages tokens and norms afterwards.
        convert: Lets a CRATE autoencoder that was trained on all tokens into a model that encodes the visible ones. Its
            `decoder_embed` has no training then. No effect elsewhere.

    Raises:
        ConfigError: Unknown file type or layout; keys that are missing, extra, of another shape or not finite, all in one
            message; a file of ours whose configuration differs from the model's in a way that shapes do not show; or
            CRATE weights of all tokens for visible tokens without `convert`.
    """
    source = weights if isinstance(weights, WeightsFile) else read_weights(weights)
    converts = part == "all" and _is_crate_of_all_tokens(source) and _is_crate_of_visible_tokens(model)
    if converts and not convert:
        raise ConfigError(
            f"{source.where} hold a CRATE autoencoder trained with mask tokens in its encoder, but the model encodes visible "
            "tokens only (encoder_tokens = visible): the same names, another function, and a decoder_embed without training; "
            "set convert=True (`crate-ray weights FILE --preset ... --convert OUT`) to have that, or use encoder_tokens = all"
        )
    _refuse_other_configuration(source, model, part, converts=converts)
    state = _select(source, model, part)
    expected = {k: v for k, v in model.state_dict().items() if part == "all" or _is_of_encoder(k)}
    optional = {key for key in expected if _may_be_absent(key, source, converts=converts)}
    interpolated = _resize_tables(state, expected, source.where)
    _refuse_differences(source, model, state, expected, optional)
    model.load_state_dict({**model.state_dict(), **state})
    return _report(source, model, state, part, interpolated, converts=converts)


def _select(source: WeightsFile, model: MaskedAutoencoder | Classifier, part: str) -> dict[str, Any]:
    """The file's tensors that the model could have, each under the name that it has there."""
    state = dict(source.state)
    tokens = model.config.encoder_tokens if isinstance(model, MaskedAutoencoder) else source.encoder_tokens
    if source.layout in ("crate", "mae") and tokens == "all":
        # There the decoder's table serves the encoder; the encoder's own and `decoder_embed` are in no forward pass.
        table = state.pop("decoder_pos_embed", None)
        if isinstance(table, Tensor):
            state["pos_embed"] = table
        state = {key: value for key, value in state.items() if key not in _DECODER_EMBED}
    if part == "encoder":
        state = {k: v for k, v in state.items() if _is_of_encoder(k) and not (_pools_tokens(model) and k.startswith("norm."))}
    return state


def _pools_tokens(model: MaskedAutoencoder | Classifier) -> bool:
    """Whether it averages tokens and norms afterwards, with a norm of its own."""
    return hasattr(model, "fc_norm")


def _is_of_encoder(key: str) -> bool:
    return key.split(".", maxsplit=1)[0] in _ENCODER


def _is_crate_of_visible_tokens(model: MaskedAutoencoder | Classifier) -> bool:
    config = model.config
    return isinstance(model, MaskedAutoencoder) and config.family == "crate" and config.encoder_tokens == "visible"


def _is_crate_of_all_tokens(source: WeightsFile) -> bool:
    return source.architecture.family == "crate" and source.encoder_tokens == "all"


def _may_be_absent(key: str, source: WeightsFile, *, converts: bool) -> bool:
    """What a complete file need not hold: a decoder of which it has nothing; untrained scalars; what a conversion adds."""
    if is_of_decoder(key) and not source.architecture.has_decoder:
        return True
    if ".ista.log_" in key:
        return source.config is None or source.config.ista_learnable == "none"
    return converts and key in (*_DECODER_EMBED, "decoder_pos_embed")


def _resize_tables(state: dict[str, Any], expected: Mapping[str, Tensor], where: str) -> tuple[str, ...]:
    """Brings position tables of the right width to the model's grid; says which."""
    resized = []
    for key in _TABLES:
        found, wanted = state.get(key), expected.get(key)
        if not isinstance(found, Tensor) or wanted is None or found.ndim != 3 or found.shape[1] == wanted.shape[1]:
            continue
        if (found.shape[0], found.shape[2]) != (1, wanted.shape[2]) or not found.is_floating_point():
            continue  # another model altogether: listed with the other shapes
        try:
            state[key] = interpolate_positions(found, wanted.shape[1] - 1)
        except ConfigError as error:
            raise ConfigError(f"{where}, {key}: {error}") from None
        resized.append(key)
    return tuple(resized)


def _refuse_other_configuration(
    source: WeightsFile, model: MaskedAutoencoder | Classifier, part: str, *, converts: bool
) -> None:
    """Refuses a file whose configuration computes something else with the tensors that are loaded."""
    stored = source.config
    if stored is None or not _has_same_names(stored, model.config, part):  # then no key fits, and all are listed
        return
    keys = list(_OF_THE_ENCODER)
    if stored.share_layers and model.config.share_layers:  # how often its tensors are applied
        keys.append("encoder_depth")
    if part == "all" or not _pools_tokens(model):
        keys.append("final_norm_eps")
    if part == "all" and isinstance(model, MaskedAutoencoder):
        keys += [key for key in _OF_THE_DECODER if key != "encoder_tokens" or not converts]
    differences = [
        f"model.{key}: {getattr(stored, key)} in the file, {getattr(model.config, key)} in the model"
        for key in keys
        if not _agree(stored, model.config, key)
    ]
    if differences:
        listing = "\n  ".join(differences)
        raise ConfigError(
            f"{source.where} belong to another configuration; nothing was loaded. Set these keys as in the file, or give the "
            f"tensors alone (safetensors.torch.load_file) to overrule them:\n  {listing}"
        )


def _has_same_names(stored: ModelConfig, wanted: ModelConfig, part: str) -> bool:
    """Whether both have the same kinds of layers, in the part that is loaded."""
    has_same_encoder = (stored.is_tied, stored.has_ista) == (wanted.is_tied, wanted.has_ista)
    return has_same_encoder and (part == "encoder" or stored.family == wanted.family)


def _agree(stored: ModelConfig, wanted: ModelConfig, key: str) -> bool:
    if getattr(stored, key) == getattr(wanted, key):
        return True
    if key == "ista_learnable":  # constants may become the first values of trained scalars, never the reverse
        return not stored.has_ista or stored.ista_learnable == "none"
    if key not in ("ista_step_size", "ista_lambda"):
        return False
    if not stored.has_ista or stored.ista_learnable == "layer":  # absent, or among the tensors
        return True
    return stored.per_layer(key) == wanted.per_layer(key)  # type: ignore[arg-type]


def _refuse_differences(
    source: WeightsFile,
    model: MaskedAutoencoder | Classifier,
    state: Mapping[str, Any],
    expected: Mapping[str, Tensor],
    optional: set[str],
) -> None:
    problems = [f"missing: {key}" for key in sorted(expected.keys() - state.keys() - optional)]
    problems += [f"extra: {key}" for key in sorted(state.keys() - expected.keys())]
    shared = sorted(expected.keys() & state.keys())
    problems += [line for key in shared if (line := _misfit(key, state[key], expected[key]))]
    if problems:
        more = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        listing = "\n  ".join(problems[:_LISTED] + more)
        raise ConfigError(
            f"{source.where} (layout {source.layout}) do not fit the model; nothing was loaded. Check model.* against them:\n"
            f"  file:  {source.architecture}\n  model: {infer_architecture(model.state_dict())}\n  {listing}"
        )
    broken = not_finite(state)
    if broken:
        raise ConfigError(
            f"{source.where} hold NaN or infinite values, as a diverged run leaves them; nothing was loaded. Take an earlier "
            f"checkpoint. In {len(broken)} tensors: {', '.join(broken[:5])}"
        )


def _misfit(key: str, found: Any, wanted: Tensor) -> str | None:
    if not isinstance(found, Tensor):
        return f"no tensor: {key} is {type(found).__name__}"
    if tuple(found.shape) != tuple(wanted.shape):
        return f"shape: {key} is {tuple(found.shape)}, the model has {tuple(wanted.shape)}"
    if not found.is_floating_point() or found.layout != torch.strided or found.is_meta:
        return f"kind: {key} is a {found.layout} {found.dtype} tensor on {found.device}, weights are plain floating point"
    return None


def _report(
    source: WeightsFile,
    model: MaskedAutoencoder | Classifier,
    state: Mapping[str, Any],
    part: str,
    interpolated: tuple[str, ...],
    *,
    converts: bool,
) -> LoadedWeights:
    untrained = [key for key, _ in model.named_parameters() if key not in state or (converts and key in _DECODER_EMBED)]
    found_decoder = source.architecture.has_decoder
    warnings = []
    if converts and found_decoder:
        warnings.append(
            f"{source.where} were trained on all tokens: decoder_embed is untrained, the published code never reads it; the "
            "encoder has never seen visible tokens alone"
        )
    if part == "all" and isinstance(model, MaskedAutoencoder) and not found_decoder:
        warnings.append(f"{source.where} hold an encoder only: the decoder keeps its initial values")
    for text in warnings:
        log.warning(text)
    return LoadedWeights(source.layout, found_decoder, interpolated, tuple(untrained), tuple(warnings))
