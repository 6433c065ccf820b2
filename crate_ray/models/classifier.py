"""The supervised CRATE classifier.

In: images (B, 3, H, W), normalised floats. Out: logits (B, classes). The published model, kept beside the
autoencoder because its encoder layers are the same; only embedding, positions and head differ.

Shapes: B batch, N patches, D width; 1+N with class token.
"""

import torch
from torch import Tensor, nn

from crate_ray.config import ConfigError, ModelConfig
from crate_ray.models.layers import check_images, encoder_layers
from crate_ray.models.patches import patchify


class Classifier(nn.Module):
    """LN-Linear-LN patch embedding, learned positions, CRATE encoder layers, LN and a linear head on the class token.

    Source: Yu et al., arXiv:2306.01129, published code. Linear layers keep torch's default initialisation,
    positions and class token are drawn from N(0, 1), as there.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.family != "crate" or config.num_classes is None:
            raise ConfigError(
                f"family = '{config.family}', num_classes = {config.num_classes}: a classifier needs family 'crate' and "
                "a number of classes; leave num_classes out for a masked autoencoder"
            )
        self.config = config
        patch_values = 3 * config.patch_size**2
        self.patch_norm = nn.LayerNorm(patch_values, eps=config.block_norm_eps)
        self.patch_embed = nn.Linear(patch_values, config.width)
        self.embed_norm = nn.LayerNorm(config.width, eps=config.block_norm_eps)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + config.num_patches, config.width))
        self.cls_token = nn.Parameter(torch.randn(1, 1, config.width))
        self.blocks = encoder_layers(config)
        self.norm = nn.LayerNorm(config.width, eps=config.final_norm_eps)
        self.head = nn.Linear(config.width, config.num_classes)

    @property
    def num_patches(self) -> int:
        """N, without the class token."""
        return self.config.num_patches

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits, (B, classes)."""
        return self.head(self.norm(self._run_encoder(images_BCHW)[:, 0]))  # type: ignore[no-any-return]

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Features of every token after the last norm, class token first: (B, 1 + N, D)."""
        return self.norm(self._run_encoder(images_BCHW))  # type: ignore[no-any-return]

    def _run_encoder(self, images_BCHW: Tensor) -> Tensor:
        check_images(self.config, images_BCHW)
        patches_BNQ = patchify(images_BCHW, self.config.patch_size)
        tokens_BND = self.embed_norm(self.patch_embed(self.patch_norm(patches_BNQ)))
        cls_B1D = self.cls_token.expand(len(tokens_BND), -1, -1)
        z_BND = torch.cat([cls_B1D, tokens_BND], dim=1) + self.pos_embed
        for block in self.blocks:
            z_BND = block(z_BND)
        return z_BND
