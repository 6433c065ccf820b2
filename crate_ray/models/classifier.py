"""Classifiers: the supervised CRATE, and the encoder of a masked autoencoder with a head.

In: images (B, 3, H, W), normalised floats. Out: logits (B, classes). Two embeddings, one stack of layers:
  normed  LN-Linear-LN and positions from N(0, 1), the published supervised CRATE;
  linear  the embedding of the autoencoders of either family, so that an encoder of `MaskedAutoencoder` fits under the same
          names. Positions start from its sin-cos table and are trained, as in the fine-tuning of facebookresearch/mae.
The head reads the class token after the encoder's `norm` (pool cls), or the mean of the patch tokens through a norm of
its own, `fc_norm` (pool mean, the published fine-tuning of MAE).

Shapes: B batch, N patches, D width; 1+N with class token.
"""

import torch
from torch import Tensor, nn

from crate_ray.config import ConfigError, ModelConfig
from crate_ray.models.layers import check_images, encoder_layers, in_order, initialise_linear
from crate_ray.models.parametrization import scale_initialisation
from crate_ray.models.patches import patchify, sincos_positions


class Classifier(nn.Module):
    """Patch embedding, trained positions, encoder layers, a norm and a linear head.

    Sources: embedding normed, Yu et al., arXiv:2306.01129, published code: linear layers keep torch's default
    initialisation, positions and class token are drawn from N(0, 1). Embedding linear, facebookresearch/mae
    (fine-tuning): initialised as its pretraining does, the head from N(0, 2e-5), so that training starts at equal odds.

    Args:
        config: Its `num_classes` must be set.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.num_classes is None:
            raise ConfigError(
                "num_classes is not set, and a classifier needs it; `create_model` builds an autoencoder without it"
            )
        self.config = config
        patch_values = 3 * config.patch_size**2
        self.is_normed = config.embedding == "normed"
        if self.is_normed:
            self.patch_norm = nn.LayerNorm(patch_values, eps=config.block_norm_eps)
        self.patch_embed = nn.Linear(patch_values, config.width)
        if self.is_normed:
            self.embed_norm = nn.LayerNorm(config.width, eps=config.block_norm_eps)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + config.num_patches, config.width))
        self.cls_token = nn.Parameter(torch.randn(1, 1, config.width))
        self.blocks = encoder_layers(config)
        norm = nn.LayerNorm(config.width, eps=config.final_norm_eps)
        if config.pool == "mean":
            self.fc_norm = norm
        else:
            self.norm = norm
        self.head = nn.Linear(config.width, config.num_classes)
        if not self.is_normed:
            self._initialise()
        scale_initialisation(self, config)

    @property
    def encoder_layers(self) -> list[nn.Module]:
        """The encoder's layers as they are applied, first first; one whose weights are shared stands there many times."""
        return in_order(self.blocks, self.config)

    @property
    def num_patches(self) -> int:
        """N, without the class token."""
        return self.config.num_patches

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits, (B, classes)."""
        z_BND = self._run_encoder(images_BCHW)
        if self.config.pool == "mean":
            return self.head(self.fc_norm(z_BND[:, 1:].mean(dim=1)))  # type: ignore[no-any-return]
        return self.head(self.norm(z_BND[:, 0]))  # type: ignore[no-any-return]

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Features of every token, class token first: (B, 1 + N, D), after `norm` where there is one."""
        z_BND = self._run_encoder(images_BCHW)
        return z_BND if self.config.pool == "mean" else self.norm(z_BND)  # type: ignore[no-any-return]

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """The tokens that enter the first layer, class token first: (B, 1 + N, D).

        Raises:
            ConfigError: Images of another shape than the configuration's.
        """
        check_images(self.config, images_BCHW)
        patches_BNQ = patchify(images_BCHW, self.config.patch_size)
        if self.is_normed:
            tokens_BND = self.embed_norm(self.patch_embed(self.patch_norm(patches_BNQ)))
        else:
            tokens_BND = self.patch_embed(patches_BNQ)
        cls_B1D = self.cls_token.expand(len(tokens_BND), -1, -1)
        return torch.cat([cls_B1D, tokens_BND], dim=1) + self.pos_embed

    def _run_encoder(self, images_BCHW: Tensor) -> Tensor:
        z_BND = self.embed(images_BCHW)
        for block in self.encoder_layers:
            z_BND = block(z_BND)
        return z_BND

    def _initialise(self) -> None:
        initialise_linear(self, patch_embed=self.patch_embed)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        with torch.no_grad():
            self.pos_embed.copy_(sincos_positions(self.config.width, self.config.image_size // self.config.patch_size))
