# ruff: noqa: D102 - what a layer's forward computes is its class's docstring
"""The published computation in plain PyTorch: the oracle of the tests and the baseline of the speed benchmarks.

In: a ModelConfig; images (B, 3, H, W) and uniform noise (B, N). Out: (loss, pred, mask, latent), or a classifier's logits.
It is written to be compared with, so it takes the published way wherever ours is shorter: three products in an ISTA
step, attention as two products with a softmax between, a convolution as patch embedding, hidden patches dropped by one
argsort and put back by another, every token predicted, the squared error of every patch computed and then masked,
parameters that no forward pass uses. It shares no code with `crate_ray.models`, has the published names in its state
dicts, and reproduces tests/golden (tests/models/test_published_grid.py). It needs torch and `crate_ray.config` only.

Shapes: B batch, N patches, K kept, Q pixel values of a patch, D width, E decoder width, H heads, P head width; 1+N with
class token.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from crate_ray.config import ModelConfig


class PreNorm(nn.Module):
    """fn(LN(x)); the residual is left to the caller."""

    def __init__(self, width: int, fn: nn.Module, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.fn = fn

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.fn(self.norm(x_BND))


class SubspaceAttention(nn.Module):
    """MSSA: one projection is query, key and value; one head has no output projection."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width)) if num_heads > 1 else nn.Identity()

    def forward(self, z_BND: Tensor) -> Tensor:
        batch, tokens, width = z_BND.shape
        w_BHNP = self.qkv(z_BND).reshape(batch, tokens, self.num_heads, width // self.num_heads).permute(0, 2, 1, 3)
        logits_BHNN = torch.matmul(w_BHNP, w_BHNP.transpose(-1, -2)) * (width // self.num_heads) ** -0.5
        mixed_BHNP = torch.matmul(logits_BHNN.softmax(dim=-1), w_BHNP)
        return self.to_out(mixed_BHNP.permute(0, 2, 1, 3).reshape(batch, tokens, width))


class IstaStep(nn.Module):
    """ReLU(y + eta (D^T y - D^T D y) - eta lambda), each product by itself."""

    def __init__(self, width: int, step_size: float, lam: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))
        nn.init.kaiming_uniform_(self.weight)
        self.step_size, self.lam = step_size, lam

    def forward(self, y_BND: Tensor) -> Tensor:
        gram_BND = functional.linear(functional.linear(y_BND, self.weight), self.weight.t())
        analysis_BND = functional.linear(y_BND, self.weight.t())
        update_BND = self.step_size * (analysis_BND - gram_BND) - self.step_size * self.lam
        return functional.relu(y_BND + update_BND)


class Synthesis(nn.Module):
    """The decoder's dictionary, a product without bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))
        nn.init.kaiming_uniform_(self.weight)

    def forward(self, y_BND: Tensor) -> Tensor:
        return functional.linear(y_BND, self.weight)


class CrateEncoder(nn.Module):
    """CRATE layers, one for each (eta, lambda): z + MSSA(LN z), then ISTA(LN z)."""

    def __init__(self, width: int, num_heads: int, eps: float, ista: list[tuple[float, float]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PreNorm(width, SubspaceAttention(width, num_heads), eps),
                    PreNorm(width, IstaStep(width, step_size, lam), eps),
                ]
            )
            for step_size, lam in ista
        )

    def forward(self, z_BND: Tensor) -> Tensor:
        for attention, ista in self.layers:
            z_BND = z_BND + attention(z_BND)
            z_BND = ista(z_BND)
        return z_BND


class CrateDecoder(nn.Module):
    """One CRATE decoder layer: y = E LN(y), then y - MSSA(LN y). The list of one is in the published names."""

    def __init__(self, width: int, num_heads: int, eps: float) -> None:
        super().__init__()
        synthesis, attention = Synthesis(width), SubspaceAttention(width, num_heads)
        self.layers = nn.ModuleList([nn.ModuleList([PreNorm(width, synthesis, eps), PreNorm(width, attention, eps)])])

    def forward(self, y_BND: Tensor) -> Tensor:
        for synthesis, attention in self.layers:
            y_BND = synthesis(y_BND)
            y_BND = y_BND - attention(y_BND)
        return y_BND


class SelfAttention(nn.Module):
    """Multi-head attention of ViT."""

    def __init__(self, width: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        batch, tokens, width = x_BND.shape
        stacked = self.qkv(x_BND).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        q_BHNP, k_BHNP, v_BHNP = stacked[0], stacked[1], stacked[2]
        logits_BHNN = torch.matmul(q_BHNP, k_BHNP.transpose(-1, -2)) * (width // self.num_heads) ** -0.5
        mixed_BHNP = torch.matmul(logits_BHNN.softmax(dim=-1), v_BHNP)
        return self.proj(mixed_BHNP.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Linear, exact GELU, linear; hidden width 4D."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x_BND)))


class VitLayer(nn.Module):
    """The pre-norm layer of ViT."""

    def __init__(self, width: int, num_heads: int, eps: float, qkv_bias: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = SelfAttention(width, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width)

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.attn(self.norm1(x_BND))
        return x_BND + self.mlp(self.norm2(x_BND))


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.proj(images_BCHW).flatten(2).transpose(1, 2)


class PublishedMaskedAutoencoder(nn.Module):
    """The autoencoder of the CRATE repository (`encoder_tokens` all) or of facebookresearch/mae (visible), either layer.

    With family crate and visible tokens it is facebook's forward pass around CRATE layers, which nobody published:
    the definition of `crate_mae_visible_*`, written a second time.

    Args:
        config: `ista_learnable` is not in the published code and is ignored: eta and lambda stay at their values.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.num_kept = int(config.num_patches * (1 - config.mask_ratio))
        side = config.image_size // config.patch_size
        self.patch_embed = PatchEmbed(config.patch_size, config.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(position_table(config.width, side), requires_grad=False)
        self.blocks = nn.ModuleList(_encoder_layers(config))
        self.norm = nn.LayerNorm(config.width, eps=config.final_norm_eps)
        self.decoder_embed = nn.Linear(config.width, config.decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.decoder_width))
        self.decoder_pos_embed = nn.Parameter(position_table(config.decoder_width, side), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(_decoder_layers(config))
        self.decoder_norm = nn.LayerNorm(config.decoder_width, eps=config.final_norm_eps)
        self.decoder_pred = nn.Linear(config.decoder_width, 3 * config.patch_size**2)
        self._initialise()

    def forward(self, images_BCHW: Tensor, noise_BN: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss (scalar), prediction (B, N, Q), mask (B, N) with 1 where hidden, latent (B, 1 + N or 1 + K, D)."""
        tokens_BND = self.patch_embed(images_BCHW)
        order_BN = torch.argsort(noise_BN, dim=1)
        restore_BN = torch.argsort(order_BN, dim=1)
        if self.config.encoder_tokens == "all":
            latent = self._encode_all(tokens_BND, order_BN, restore_BN)
            decoded = latent
        else:
            latent = self._encode_visible(tokens_BND, order_BN)
            embedded = self.decoder_embed(latent)
            filled = self._append_mask_tokens_and_unshuffle(embedded[:, 1:], restore_BN)
            decoded = torch.cat([embedded[:, :1], filled], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            decoded = block(decoded)
        pred_BNQ = self.decoder_pred(self.decoder_norm(decoded))[:, 1:]
        mask_BN = torch.ones_like(noise_BN)
        mask_BN[:, : self.num_kept] = 0
        mask_BN = torch.gather(mask_BN, 1, restore_BN)
        return self._loss(images_BCHW, pred_BNQ, mask_BN), pred_BNQ, mask_BN, latent

    def _encode_all(self, tokens_BND: Tensor, order_BN: Tensor, restore_BN: Tensor) -> Tensor:
        """Mask tokens before the encoder; the decoder's table serves as its positions, as published."""
        kept_BKD = _pick(tokens_BND, order_BN[:, : self.num_kept])
        filled_BND = self._append_mask_tokens_and_unshuffle(kept_BKD, restore_BN) + self.decoder_pos_embed[:, 1:]
        return self._run_encoder(filled_BND, self.cls_token + self.decoder_pos_embed[:, :1])

    def _encode_visible(self, tokens_BND: Tensor, order_BN: Tensor) -> Tensor:
        kept_BKD = _pick(tokens_BND + self.pos_embed[:, 1:], order_BN[:, : self.num_kept])
        return self._run_encoder(kept_BKD, self.cls_token + self.pos_embed[:, :1])

    def _run_encoder(self, tokens_BND: Tensor, cls_11D: Tensor) -> Tensor:
        z_BND = torch.cat([cls_11D.expand(tokens_BND.shape[0], -1, -1), tokens_BND], dim=1)
        for block in self.blocks:
            z_BND = block(z_BND)
        return self.norm(z_BND)

    def _append_mask_tokens_and_unshuffle(self, kept_BKE: Tensor, restore_BN: Tensor) -> Tensor:
        num_hidden = restore_BN.shape[1] - kept_BKE.shape[1]
        shuffled_BNE = torch.cat([kept_BKE, self.mask_token.repeat(kept_BKE.shape[0], num_hidden, 1)], dim=1)
        return _pick(shuffled_BNE, restore_BN)

    def _loss(self, images_BCHW: Tensor, pred_BNQ: Tensor, mask_BN: Tensor) -> Tensor:
        target_BNQ = cut_patches(images_BCHW, self.config.patch_size)
        if self.config.norm_pix_loss:
            mean, variance = target_BNQ.mean(dim=-1, keepdim=True), target_BNQ.var(dim=-1, keepdim=True)
            target_BNQ = (target_BNQ - mean) / (variance + 1e-6) ** 0.5
        error_BN = ((pred_BNQ - target_BNQ) ** 2).mean(dim=-1)
        return (error_BN * mask_BN).sum() / mask_BN.sum()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)


class PublishedClassifier(nn.Module):
    """The supervised classifier of the CRATE repository."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.num_classes is not None
        self.patch_size = config.patch_size
        values, eps = 3 * config.patch_size**2, config.block_norm_eps
        self.to_patch_embedding = nn.Sequential(
            nn.Identity(),  # the published list cuts the patches in its first place
            nn.LayerNorm(values, eps=eps),
            nn.Linear(values, config.width),
            nn.LayerNorm(config.width, eps=eps),
        )
        self.pos_embedding = nn.Parameter(torch.randn(1, 1 + config.num_patches, config.width))
        self.cls_token = nn.Parameter(torch.randn(1, 1, config.width))
        self.transformer = CrateEncoder(config.width, config.num_heads, eps, _ista(config))
        self.mlp_head = nn.Sequential(
            nn.LayerNorm(config.width, eps=config.final_norm_eps), nn.Linear(config.width, config.num_classes)
        )

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits, (B, classes)."""
        tokens_BND = self.to_patch_embedding(cut_patches(images_BCHW, self.patch_size))
        z_BND = torch.cat([self.cls_token.expand(tokens_BND.shape[0], -1, -1), tokens_BND], dim=1) + self.pos_embedding
        return self.mlp_head(self.transformer(z_BND)[:, 0])


def cut_patches(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """Square patches as rows of pixels, (B, N, Q), in the order row, column, channel."""
    batch, _, height, width = images_BCHW.shape
    rows, columns = height // patch_size, width // patch_size
    grid = images_BCHW.reshape(batch, 3, rows, patch_size, columns, patch_size)
    return torch.einsum("bcrpsq->brspqc", grid).reshape(batch, rows * columns, 3 * patch_size**2)


def position_table(width: int, side: int) -> Tensor:
    """Sine and cosine of the column, then of the row, at width / 4 frequencies; zeros for the class token."""
    places = torch.arange(side, dtype=torch.float64)
    angles = places[:, None] / 10_000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    column, row = angles.expand(side, side, -1), angles[:, None].expand(side, side, -1)
    table = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=-1).flatten(0, 1)
    return functional.pad(table, (0, 0, 1, 0)).float()[None]


def _pick(x_BND: Tensor, index_BK: Tensor) -> Tensor:
    return torch.gather(x_BND, 1, index_BK.unsqueeze(-1).repeat(1, 1, x_BND.shape[2]))


def _ista(config: ModelConfig) -> list[tuple[float, float]]:
    return list(zip(config.per_layer("ista_step_size"), config.per_layer("ista_lambda"), strict=True))


def _encoder_layers(config: ModelConfig) -> list[nn.Module]:
    eps = config.block_norm_eps
    if config.family == "crate":
        return [CrateEncoder(config.width, config.num_heads, eps, [pair]) for pair in _ista(config)]
    return [VitLayer(config.width, config.num_heads, eps, config.qkv_bias) for _ in range(config.encoder_depth)]


def _decoder_layers(config: ModelConfig) -> list[nn.Module]:
    width, heads, eps = config.decoder_width, config.decoder_num_heads, config.block_norm_eps
    if config.family == "crate":
        return [CrateDecoder(width, heads, eps) for _ in range(config.decoder_depth)]
    return [VitLayer(width, heads, eps, config.qkv_bias) for _ in range(config.decoder_depth)]
