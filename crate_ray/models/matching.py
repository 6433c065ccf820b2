"""Which model a weights file could belong to.

In: a `WeightsFile`. Out: the configuration keys that it gives, the keys that somebody must still say, and the presets whose
shapes fit. A guess is never made for what a state dict does not hold: a wrong number of heads or a wrong lambda loads without
a complaint and computes something else.
"""

from dataclasses import dataclass
from typing import Any

from crate_ray.config import PRESETS, ConfigError, ModelConfig
from crate_ray.models.weight_files import WeightsFile

_ISTA = ("ista_lambda", "ista_step_size")
"""Fixed in the published code, differently at different times."""

_OF_ABLATIONS = ("encoder_depth", "attention", "feedforward", "mlp_ratio", "share_layers")


@dataclass(frozen=True)
class PresetFit:
    """A preset of the file's shapes, once these keys are set."""

    name: str
    overrides: dict[str, Any]
    needs_conversion: bool

    def __str__(self) -> str:
        keys = "".join(f" --set model.{key}={value}" for key, value in self.overrides.items())
        return f"{self.name}{keys}" + (" (with --convert)" if self.needs_conversion else "")


def inferred_keys(file: WeightsFile) -> dict[str, Any]:
    """The keys of ModelConfig that shapes and names give."""
    found = file.architecture
    if found.family is None or None in (found.width, found.patch_size, found.image_size):
        raise ConfigError(f"{file.where} hold no whole encoder ({found}): take the file from its source again")
    keys: dict[str, Any] = {
        "family": found.family,
        "width": found.width,
        "encoder_depth": found.encoder_depth,
        "patch_size": found.patch_size,
        "image_size": found.image_size,
    }
    if file.config is not None:
        keys |= {key: getattr(file.config, key) for key in _OF_ABLATIONS}
    if found.num_classes is not None:
        return {**keys, "num_classes": found.num_classes, **_classifier_form(file)}
    keys["encoder_tokens"] = file.encoder_tokens or "all"
    if found.family == "vit":
        keys["qkv_bias"] = found.qkv_bias
    if found.has_decoder:
        keys |= {"decoder_width": found.decoder_width, "decoder_depth": found.decoder_depth}
    return keys


def unsaid_keys(file: WeightsFile) -> tuple[str, ...]:
    """The keys that change what the weights compute and that the file does not give."""
    if file.config is not None:
        return ()
    found = file.architecture
    if found.family == "crate":  # encoder and decoder have as many heads; the published classifier has one lambda
        return ("num_heads",) if file.layout == "crate-classifier" else ("num_heads", *_ISTA)
    return ("num_heads", "decoder_num_heads") if found.has_decoder else ("num_heads",)


def fitting_presets(file: WeightsFile) -> list[PresetFit]:
    """The presets of the same layers, with what must be set beside the name; the nearest first."""
    keys = inferred_keys(file)
    fits = []
    for name in PRESETS:
        config = ModelConfig.parse({"preset": name}, where=f"preset {name}")
        changed = {key: value for key, value in keys.items() if getattr(config, key) != value}
        is_conversion = file.layout == "crate" and changed.pop("encoder_tokens", None) is not None
        if (config.num_classes is None) == ("num_classes" not in keys) and changed.keys() <= {"image_size", "num_classes"}:
            fits.append(PresetFit(name, changed, is_conversion))
    return sorted(fits, key=lambda fit: (fit.needs_conversion, len(fit.overrides)))


def _classifier_form(file: WeightsFile) -> dict[str, Any]:
    """How a classifier embeds patches and what its head reads."""
    return {
        "embedding": "normed" if file.architecture.is_normed else "linear",
        "pool": "mean" if "fc_norm.weight" in file.state else "cls",
    }
