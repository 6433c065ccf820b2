"""What a model costs, in closed form: parameters and floating point operations. Plain arithmetic, no torch.

In: a ModelConfig. Out: integers. A multiply-add is two operations; norms, softmax, activations and biases are not counted, as
torch.utils.flop_counter does, which the tests compare with. Two conventions stand side by side: the algebra
this project executes (two products in ISTA; last decoder layer and prediction head for hidden tokens) and the published one
(three products, all tokens).

With d width, N tokens of a sequence, class token included:
  CRATE layer        3 d^2 + 5 d parameters;  encoder 8 N d^2 + 4 N^2 d, published 10 N d^2; decoder 6 N d^2 + 4 N^2 d
  transformer layer  12 d^2 + 13 d, without the bias on Q, K, V 12 d^2 + 10 d;  24 N d^2 + 4 N^2 d
Of an encoder layer the halves may be swapped (ablations), with m hidden units of the perceptron:
  attention     tied 2 d^2 + d, 4 N d^2 + 4 N^2 d;  untied 4 d^2 + d and 3 d with bias, 8 N d^2 + 4 N^2 d
  second half   ISTA d^2, 4 N d^2 (published 6 N d^2);  perceptron 2 m d + m + d, 4 N m d;  four d of the norms come to either
Layers that share their weights have the parameters of one and the operations of all.
A decoder layer that gives M tokens of N: CRATE 4 N d^2 + 2 M d^2 + 4 M N d;  transformer 4 N d^2 + 20 M d^2 + 4 M N d.
A CRATE layer of one head has no output projection: d^2 + d parameters and 2 N d^2 operations less.
"""

from dataclasses import dataclass
from typing import Literal

from crate_ray.config import ModelConfig

BACKWARD_FACTOR = 3
"""Forward and backward together, in forwards: a backward costs two."""


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters of one model."""

    paper: int
    """As papers print it: the published class, with frozen position tables and, for `encoder_tokens` all, its unused
    `decoder_embed`. An ablation, which nobody published, is counted in the same way."""
    total: int
    """This project's model with its position tables: what a weights file holds."""
    trainable: int
    """What an optimizer updates."""
    encoder: int
    """Trainable backbone: patch embedding, class token, encoder layers, final norm, learned positions."""
    dead_decoder_embed: int = 0
    """Of `paper`: the linear map of the all-token class that no forward pass uses and no gradient reaches."""
    second_table: int = 0
    """Of `paper`: its second position table; encoder and decoder share the positions added before the encoder."""


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Counts a configuration's parameters."""
    d, e, patch_values = config.width, config.decoder_width, 3 * config.patch_size**2
    positions = 1 + config.num_patches
    encoder = (patch_values * d + d) + d + config.num_encoder_layers * _encoder_layer_parameters(config) + 2 * d
    if config.num_classes is not None:
        encoder += positions * d + (2 * patch_values + 2 * d if config.embedding == "normed" else 0)
        total = encoder + d * config.num_classes + config.num_classes
        return ParameterCount(paper=total, total=total, trainable=total, encoder=encoder)
    decoder_embed = d * e + e
    decoder = e + config.decoder_depth * _decoder_layer_parameters(config) + 2 * e + (e * patch_values + patch_values)
    tables = positions * d + positions * e
    if config.encoder_tokens == "all":
        trainable = encoder + decoder
        paper, table = trainable + decoder_embed + tables, positions * d
        return ParameterCount(paper, trainable + table, trainable, encoder, decoder_embed, table)
    trainable = encoder + decoder_embed + decoder
    return ParameterCount(trainable + tables, trainable + tables, trainable, encoder)


def count_hidden_parameters(config: ModelConfig) -> int:
    """Entries of the matrices between tokens of a width and tokens of a width: what Muon updates where it is chosen."""
    d, e = config.width, config.decoder_width
    attention = (2 if config.num_heads > 1 else 1) if config.is_tied else 4
    encoder = d * (attention * d + (d if config.has_ista else 2 * config.mlp_width))
    of_encoder = config.num_encoder_layers * encoder
    if config.num_classes is not None:
        return of_encoder
    decoder_products = 12 if config.family == "vit" else 3 if config.decoder_num_heads > 1 else 2
    decoder_embed = d * e if config.encoder_tokens == "visible" else 0
    return of_encoder + config.decoder_depth * decoder_products * e * e + decoder_embed


def forward_flops(
    config: ModelConfig, *, ista_products: Literal[2, 3] = 2, predicted: Literal["masked", "all"] = "masked"
) -> int:
    """Operations of one image's forward pass in pretraining, masking included (or of a classifier's).

    Args:
        config: The model.
        ista_products: Matrix products of an ISTA step: 2 as executed here, 3 as published.
        predicted: Tokens that the last decoder layer and the prediction head give: the hidden ones (`losses`), or all with
            the class token (`forward` and the published code).
    """
    n, kept, patch_values = config.num_patches, config.num_kept, 3 * config.patch_size**2
    embedding = 2 * n * patch_values * config.width
    if config.num_classes is not None:
        return embedding + _encoder_flops(config, 1 + n, ista_products) + 2 * config.width * config.num_classes
    visible = config.encoder_tokens == "visible"
    encoder = _encoder_flops(config, 1 + (kept if visible else n), ista_products)
    decoder_embed = 2 * (1 + kept) * config.width * config.decoder_width if visible else 0
    given = n - kept if predicted == "masked" else 1 + n
    decoder = (config.decoder_depth - 1) * _decoder_layer_flops(config, 1 + n) + _decoder_layer_flops(config, 1 + n, given)
    head = 2 * given * config.decoder_width * patch_values
    return embedding + encoder + decoder_embed + decoder + head


def published_forward_flops(config: ModelConfig) -> int:
    """The same pass as the published code executes it: three products in ISTA, every token predicted."""
    return forward_flops(config, ista_products=3, predicted="all")


def encode_flops(config: ModelConfig) -> int:
    """Operations of `encode` on one whole image: what using the features costs."""
    embedding = 2 * config.num_patches * 3 * config.patch_size**2 * config.width
    return embedding + _encoder_flops(config, 1 + config.num_patches, 2)


def training_flops_per_image(config: ModelConfig) -> int:
    """Forward and backward of one image in training: three times the executed forward pass."""
    return BACKWARD_FACTOR * forward_flops(config)


def _encoder_layer_parameters(config: ModelConfig) -> int:
    d, m = config.width, config.mlp_width
    if config.is_tied:
        attention = d * d + _projection_parameters(d, config.num_heads)
    else:
        attention = 4 * d * d + d + (3 * d if config.qkv_bias else 0)
    learned_scalars = 2 if config.ista_learnable == "layer" else 0
    second_half = d * d + learned_scalars if config.has_ista else 2 * m * d + m + d
    return attention + second_half + 4 * d


def _decoder_layer_parameters(config: ModelConfig) -> int:
    d = config.decoder_width
    if config.family == "vit":
        return 12 * d * d + 10 * d + (3 * d if config.qkv_bias else 0)
    return 2 * d * d + 4 * d + _projection_parameters(d, config.decoder_num_heads)


def _projection_parameters(d: int, num_heads: int) -> int:
    """Of subspace attention's output."""
    return d * d + d if num_heads > 1 else 0


def _encoder_flops(config: ModelConfig, n: int, ista_products: int) -> int:
    d = config.width
    attention = _subspace_attention_flops(d, config.num_heads, n) if config.is_tied else 8 * n * d * d + 4 * n * n * d
    second_half = 2 * ista_products * n * d * d if config.has_ista else 4 * n * config.mlp_width * d
    return config.encoder_depth * (attention + second_half)


def _decoder_layer_flops(config: ModelConfig, n: int, given: int | None = None) -> int:
    d = config.decoder_width
    if config.family == "vit":
        return _transformer_layer_flops(d, n, given)
    return 2 * n * d * d + _subspace_attention_flops(d, config.decoder_num_heads, n, given)


def _subspace_attention_flops(d: int, num_heads: int, n: int, given: int | None = None) -> int:
    m = n if given is None else given
    return 2 * n * d * d + (2 * m * d * d if num_heads > 1 else 0) + 4 * m * n * d


def _transformer_layer_flops(d: int, n: int, given: int | None = None) -> int:
    m = n if given is None else given
    return 4 * n * d * d + 20 * m * d * d + 4 * m * n * d
