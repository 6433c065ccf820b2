"""The masked autoencoder, for both families and both ways to feed the encoder.

In: images (B, 3, H, W), normalised floats, and uniform noise (B, N). Out: loss, prediction, mask, latent.

`encoder_tokens` decides where mask tokens enter:
  all      before the encoder, in place of hidden patches (published CRATE-MAE and its ViT baseline): the encoder
           sees every position, no position is added before the decoder, encoder and decoder share one width.
  visible  before the decoder (published MAE): the encoder sees the kept patches only, a linear map changes
           the width, and the decoder has its own position table.

`losses` is the training path: one number an image; the last decoder layer and the prediction head give hidden tokens only.
`forward` predicts every patch, as published, for pictures and tests. The published `decoder_embed` of the `all` case
never takes part in a forward pass; it does not exist here, so every parameter gets a gradient.

Shapes: B batch, N patches, K kept, M hidden, Q pixel values of a patch, D width, E decoder width; 1+N with class token.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from crate_ray.config import ConfigError, ModelConfig
from crate_ray.models.layers import check_images, decoder_layers, encoder_layers, in_order, initialise_linear
from crate_ray.models.linear import Linear
from crate_ray.models.parametrization import scale_initialisation
from crate_ray.models.patches import Masking, draw_masking, normalise_patches, patchify, sincos_positions, take_tokens


class MaskedAutoencoderOutput(NamedTuple):
    """What a full forward pass gives."""

    loss: Tensor
    """Scalar: mean over hidden patches and images."""
    pred: Tensor
    """Predicted patches, (B, N, Q), in normalised pixels if `norm_pix_loss`."""
    mask: Tensor
    """(B, N) float, 1 where hidden."""
    latent: Tensor
    """Encoder output after its norm, class token first: (B, 1 + N, D), or (B, 1 + K, D) for visible tokens."""


class MaskedAutoencoder(nn.Module):
    """CRATE-MAE or MAE, initialised as published from torch's global generator.

    Args:
        config: Its `num_classes` must be None.
    """

    pos_embed: Tensor
    decoder_pos_embed: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        grid_side = config.image_size // config.patch_size
        patch_values = 3 * config.patch_size**2
        self.patch_embed = Linear(patch_values, config.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.register_buffer("pos_embed", sincos_positions(config.width, grid_side))
        self.blocks = encoder_layers(config)
        self.norm = nn.LayerNorm(config.width, eps=config.final_norm_eps)
        if config.encoder_tokens == "visible":
            self.decoder_embed = Linear(config.width, config.decoder_width)
            self.register_buffer("decoder_pos_embed", sincos_positions(config.decoder_width, grid_side))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.decoder_width))
        self.decoder_blocks = decoder_layers(config)
        self.decoder_norm = nn.LayerNorm(config.decoder_width, eps=config.final_norm_eps)
        self.decoder_pred = Linear(config.decoder_width, patch_values)
        self._initialise()

    @property
    def encoder_layers(self) -> list[nn.Module]:
        """The encoder's layers as they are applied, first first; one whose weights are shared stands there many times."""
        return in_order(self.blocks, self.config)

    @property
    def num_patches(self) -> int:
        """N, without the class token."""
        return self.config.num_patches

    def forward(self, images_BCHW: Tensor, noise_BN: Tensor | None = None) -> MaskedAutoencoderOutput:
        """Masks, encodes, reconstructs and scores.

        Args:
            images_BCHW: Normalised images.
            noise_BN: The patches of the smallest values are kept. None draws it from torch's global generator.

        Raises:
            ConfigError: Images or noise of another shape than the configuration's.
        """
        target_BNQ, masking, latent = self._encode_masked(images_BCHW, noise_BN)
        pred_BNQ = self.decoder_pred(self.decoder_norm(self._decode(latent, masking)))[:, 1:]
        mask_BN = masking.mask.to(torch.float32)
        loss = (self._patch_losses(pred_BNQ, target_BNQ) * mask_BN).sum() / mask_BN.sum()
        return MaskedAutoencoderOutput(loss, pred_BNQ, mask_BN, latent)

    def losses(self, images_BCHW: Tensor, noise_BN: Tensor) -> Tensor:
        """Each image's loss, (B,) float32: the mean squared error over its hidden patches.

        Every image hides as many patches, so the mean over the batch is `forward`'s loss. The last decoder layer computes
        hidden tokens only, from all as keys and values; so do norm and prediction head.

        Raises:
            ConfigError: Images or noise of another shape than the configuration's.
        """
        target_BNQ, masking, latent = self._encode_masked(images_BCHW, noise_BN)
        decoded_BME = self._decode(latent, masking, wanted_BM=1 + masking.masked)
        pred_BMQ = self.decoder_pred(self.decoder_norm(decoded_BME))
        return self._patch_losses(pred_BMQ, take_tokens(target_BNQ, masking.masked)).mean(dim=1)

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Features of whole images, (B, 1 + N, D), after the encoder's norm, class token first."""
        return self._run_encoder(self.embed(images_BCHW))

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """The tokens of whole images that enter the first layer, (B, 1 + N, D), class token first."""
        check_images(self.config, images_BCHW)
        tokens_BND = self.patch_embed(patchify(images_BCHW, self.config.patch_size)) + self.pos_embed[:, 1:]
        return self._prepend_class_token(tokens_BND)

    def _encode_masked(self, images_BCHW: Tensor, noise_BN: Tensor | None) -> tuple[Tensor, Masking, Tensor]:
        """Pixels to predict, what is hidden, and the latent."""
        config = self.config
        check_images(config, images_BCHW)
        if noise_BN is None:
            noise_BN = torch.rand(len(images_BCHW), config.num_patches, device=images_BCHW.device)
        if tuple(noise_BN.shape) != (len(images_BCHW), config.num_patches):
            raise ConfigError(
                f"noise has shape {tuple(noise_BN.shape)}; give one value for each patch of each image: "
                f"({len(images_BCHW)}, {config.num_patches})"
            )
        masking = draw_masking(noise_BN, config.num_kept)
        patches_BNQ = patchify(images_BCHW, config.patch_size)
        tokens_BND = self.patch_embed(patches_BNQ)
        if config.encoder_tokens == "all":
            tokens_BND = torch.where(masking.mask.unsqueeze(-1), self.mask_token, tokens_BND) + self.pos_embed[:, 1:]
        else:
            tokens_BND = take_tokens(tokens_BND + self.pos_embed[:, 1:], masking.kept)
        return patches_BNQ, masking, self._run_encoder(self._prepend_class_token(tokens_BND))

    def _prepend_class_token(self, tokens_BND: Tensor) -> Tensor:
        cls_B1D = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens_BND), -1, -1)
        return torch.cat([cls_B1D, tokens_BND], dim=1)

    def _run_encoder(self, z_BND: Tensor) -> Tensor:
        for block in self.encoder_layers:
            z_BND = block(z_BND)
        return self.norm(z_BND)  # type: ignore[no-any-return]

    def _decode(self, latent: Tensor, masking: Masking, wanted_BM: Tensor | None = None) -> Tensor:
        """Decoder tokens before the decoder's norm: all, (B, 1 + N, E), or those at the given positions, (B, M, E)."""
        if self.config.encoder_tokens == "visible":
            latent = self._fill_in_mask_tokens(self.decoder_embed(latent), masking) + self.decoder_pos_embed
        *earlier, last = self.decoder_blocks
        for block in earlier:
            latent = block(latent)
        return last(latent, wanted_BM)  # type: ignore[no-any-return]

    def _fill_in_mask_tokens(self, visible: Tensor, masking: Masking) -> Tensor:
        """Kept tokens back at their positions, mask tokens elsewhere, class token first."""
        visible = visible.to(self.mask_token.dtype)  # autocast gives half precision; scatter needs one type
        index_BKE = masking.kept.unsqueeze(-1).expand(-1, -1, visible.shape[-1])
        filled_BNE = self.mask_token.expand(*masking.mask.shape, -1).scatter(1, index_BKE, visible[:, 1:])
        return torch.cat([visible[:, :1], filled_BNE], dim=1)

    def _patch_losses(self, pred: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of each patch, in float32; the target normalised by patch if so configured."""
        target = target.float()
        if self.config.norm_pix_loss:
            target = normalise_patches(target)
        return (pred.float() - target).square().mean(dim=-1)

    def _initialise(self) -> None:
        """As published: xavier for linear layers, N(0, 0.02) for tokens; dictionaries keep kaiming_uniform."""
        initialise_linear(self, patch_embed=self.patch_embed)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        scale_initialisation(self, self.config)
