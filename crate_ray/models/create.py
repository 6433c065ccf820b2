"""From a preset name or a configuration to a model.

In: `crate_mae_base`, or a ModelConfig, and keys to change. Out: a float32 model on the CPU (or on the device of
a surrounding `torch.device` context), initialised from torch's global generator: the caller seeds.
"""

from typing import Any, TypeVar

import torch

from crate_ray.config import ModelConfig
from crate_ray.models.classifier import Classifier
from crate_ray.models.masked_autoencoder import MaskedAutoencoder

Model = TypeVar("Model", bound=MaskedAutoencoder | Classifier)


def create_model(preset_or_config: str | ModelConfig, **overrides: Any) -> MaskedAutoencoder | Classifier:
    """Builds a masked autoencoder, or a classifier where `num_classes` is set.

    Args:
        preset_or_config: One of `crate_ray.config.PRESETS`, or a configuration.
        **overrides: Keys of ModelConfig to change, such as `image_size=32, patch_size=4`.

    Raises:
        ConfigError: Unknown preset or key, or values that do not fit together.
    """
    if isinstance(preset_or_config, str):
        config = ModelConfig.parse({"preset": preset_or_config, **overrides}, where=f"model {preset_or_config}")
    elif overrides:
        config = ModelConfig.parse({**preset_or_config.model_dump(), **overrides}, where="model")
    else:
        config = preset_or_config
    return MaskedAutoencoder(config) if config.num_classes is None else Classifier(config)


def with_shared_weights(model: Model, **overrides: Any) -> Model:
    """The same tensors under another configuration; nothing is copied, and what one of the two learns the other knows.

    Args:
        model: Its training mode is kept.
        **overrides: Keys of ModelConfig that leave names and shapes alone, such as `mask_ratio=0.5`.

    Raises:
        ConfigError: Unknown keys, or values that do not fit together.
    """
    with torch.device("meta"):
        other = create_model(model.config, **overrides)
    assert type(other) is type(model)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.train(model.training)
