"""Stacks of layers from a configuration, and what else the autoencoder and the classifier share.

In: a ModelConfig. Out: the encoder's and the decoder's `nn.ModuleList`. The one place that
knows which family uses which layer. Ablations (`attention`, `feedforward`, `mlp_ratio`, `share_layers`) are of the encoder: the
decoder is discarded after pretraining and stays the family's.
"""

from torch import Tensor, nn

from crate_ray.config import ConfigError, ModelConfig
from crate_ray.models.blocks import CrateDecoderLayer, CrateEncoderLayer, Layer, TransformerLayer


def encoder_layers(config: ModelConfig) -> nn.ModuleList:
    """The encoder's layers, first layer first; one where all share it (`in_order` gives them as they are applied)."""
    steps, lambdas = config.per_layer("ista_step_size"), config.per_layer("ista_lambda")
    values = list(zip(steps, lambdas, strict=True))[: config.num_encoder_layers]
    return nn.ModuleList(_encoder_layer(config, eta, lam) for eta, lam in values)


def in_order(blocks: nn.ModuleList, config: ModelConfig) -> list[nn.Module]:
    """The encoder's layers as they are applied, `encoder_depth` of them: a shared one stands there as often."""
    return list(blocks) * (config.encoder_depth // len(blocks))


def decoder_layers(config: ModelConfig) -> nn.ModuleList:
    """The decoder, first layer first."""
    if config.family == "vit":
        return _transformer_layers(config, config.decoder_depth, config.decoder_width, config.decoder_num_heads)
    return nn.ModuleList(
        CrateDecoderLayer(config.decoder_width, config.decoder_num_heads, eps=config.block_norm_eps)
        for _ in range(config.decoder_depth)
    )


def distinct_layers(model: nn.Module) -> list[nn.Module]:
    """Every layer of encoder and decoder once, first layer first: what is recomputed or sharded by itself."""
    return [layer for name in ("blocks", "decoder_blocks") for layer in getattr(model, name, ())]


def recompute_layers(model: nn.Module) -> None:
    """Has each layer keep its input only, and compute the rest again in the backward pass."""
    for layer in distinct_layers(model):
        assert isinstance(layer, Layer)
        layer.recompute = True


def check_images(config: ModelConfig, images_BCHW: Tensor) -> None:
    """Refuses images of another size than the model's.

    Raises:
        ConfigError: Names both shapes.
    """
    side = config.image_size
    if tuple(images_BCHW.shape[1:]) != (3, side, side):
        raise ConfigError(
            f"images have shape {tuple(images_BCHW.shape)}, but model.image_size = {side} needs (batch, 3, {side}, {side}); "
            "resize the images, or set model.image_size"
        )


def initialise_linear(model: nn.Module, *, patch_embed: nn.Linear) -> None:
    """Initialises linear layers as the published autoencoders do: xavier weights, zero biases; dictionaries are left alone.

    Args:
        model: Holds the layers.
        patch_embed: A convolution there: xavier on its flattened weight, torch's default for its bias.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None and module is not patch_embed:
                nn.init.zeros_(module.bias)


def _encoder_layer(config: ModelConfig, step_size: float, lam: float) -> CrateEncoderLayer | TransformerLayer:
    eps, tied, qkv_bias = config.block_norm_eps, config.is_tied, config.qkv_bias
    if not config.has_ista:
        return TransformerLayer(
            config.width, config.num_heads, eps=eps, qkv_bias=qkv_bias, tied=tied, mlp_width=config.mlp_width
        )
    learnable = config.ista_learnable == "layer"
    return CrateEncoderLayer(
        config.width,
        config.num_heads,
        eps=eps,
        step_size=step_size,
        lam=lam,
        learnable=learnable,
        tied=tied,
        qkv_bias=qkv_bias,
    )


def _transformer_layers(config: ModelConfig, depth: int, width: int, num_heads: int) -> nn.ModuleList:
    return nn.ModuleList(
        TransformerLayer(width, num_heads, eps=config.block_norm_eps, qkv_bias=config.qkv_bias) for _ in range(depth)
    )
