"""The implementations that take part in `bench_step`, each as a module from (images, noise) to a scalar loss.

In: a ModelConfig. Out: our training path, the published computation, and for the published MAE the ones of `transformers` and
of `timm` blocks, which are imported here only. A peer that is not installed or has no such model is left out, and why is said.

Shapes: B batch, N patches, K kept, D width, E decoder width.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from benchmarks.published import PublishedMaskedAutoencoder, VitLayer
from crate_ray.config import ModelConfig
from crate_ray.models import MaskedAutoencoder, create_model
from crate_ray.models.cost import count_parameters, forward_flops, published_forward_flops


@dataclass(frozen=True)
class Implementation:
    """One way to compute a model's loss."""

    name: str
    loss: nn.Module
    """(images, noise) to a scalar."""
    forward_flops: int
    """Operations of its forward pass of one image, in the form that it executes."""


class OurLoss(nn.Module):
    """The training path of this project."""

    def __init__(self, model: MaskedAutoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCHW: Tensor, noise_BN: Tensor) -> Tensor:
        """The mean over images."""
        return self.model.losses(images_BCHW, noise_BN).mean()


class FirstOutput(nn.Module):
    """A model whose first output is the loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCHW: Tensor, noise_BN: Tensor) -> Tensor:
        """That output."""
        return self.model(images_BCHW, noise_BN)[0]  # type: ignore[no-any-return]


def implementations(config: ModelConfig, say: Callable[[str], None]) -> list[Implementation]:
    """Ours first, then every peer that has this model.

    Args:
        config: A masked autoencoder.
        say: Told in one line about each peer that is left out.
    """
    model = create_model(config)
    assert isinstance(model, MaskedAutoencoder)
    found = [
        Implementation("ours", OurLoss(model), forward_flops(config)),
        Implementation("published", FirstOutput(PublishedMaskedAutoencoder(config)), published_forward_flops(config)),
    ]
    if config.family != "vit" or config.encoder_tokens != "visible":
        say("transformers, timm: left out, they have no model of this family")
        return found
    for name, build in (("transformers", _transformers_model), ("timm", _timm_model)):
        if importlib.util.find_spec(name) is None:
            say(f"{name}: left out, not installed")
            continue
        peer = build(config)
        _check_parameters(name, peer, config)
        found.append(Implementation(name, FirstOutput(peer), published_forward_flops(config)))
    return found


def _check_parameters(name: str, peer: nn.Module, config: ModelConfig) -> None:
    """A peer of another size would be another model."""
    have, expected = sum(p.numel() for p in peer.parameters()), count_parameters(config).paper
    assert have == expected, f"the {name} model has {have:,} parameters, ours {expected:,}"


def _transformers_model(config: ModelConfig) -> nn.Module:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    return ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_size=config.width,
            num_hidden_layers=config.encoder_depth,
            num_attention_heads=config.num_heads,
            intermediate_size=4 * config.width,
            decoder_hidden_size=config.decoder_width,
            decoder_num_hidden_layers=config.decoder_depth,
            decoder_num_attention_heads=config.decoder_num_heads,
            decoder_intermediate_size=4 * config.decoder_width,
            mask_ratio=config.mask_ratio,
            norm_pix_loss=config.norm_pix_loss,
            layer_norm_eps=config.block_norm_eps,
            qkv_bias=config.qkv_bias,
        )
    )


def _timm_model(config: ModelConfig) -> nn.Module:
    """The published MAE with timm's layers in the places of its own, which is how the published repository is built."""
    from timm.models.vision_transformer import Block

    def replace(layers: nn.ModuleList, width: int, num_heads: int) -> None:
        for index, layer in enumerate(layers):
            assert isinstance(layer, VitLayer)
            block = Block(width, num_heads, qkv_bias=config.qkv_bias)
            block.norm1.eps = block.norm2.eps = config.block_norm_eps
            block.load_state_dict(layer.state_dict())
            layers[index] = block

    model = PublishedMaskedAutoencoder(config)
    replace(model.blocks, config.width, config.num_heads)
    replace(model.decoder_blocks, config.decoder_width, config.decoder_num_heads)
    return model
