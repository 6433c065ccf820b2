"""What training keeps in memory, in closed form. Plain arithmetic, no torch.

In: a ModelConfig. Out: bytes. Weights, gradients and the optimizer's state are there once (`training_state_bytes`); what
autograd keeps for the backward pass grows by `activation_bytes` with every image. Temporaries, the copies of weights that
autocast makes, and the allocator's rounding are not in either, so a device needs more than their sum.

Convention: `losses` (of a classifier: its logits), run eagerly, attention fused, so that no N x N matrix is kept. So it is in
float32 everywhere and in bfloat16 on a GPU; on a CPU attention in bfloat16 is plain and keeps its weights, two bytes for
each head and pair of tokens, and copies of what it multiplies. In bfloat16 LayerNorm takes and gives float32, as
autocast has it on a GPU. A compiled model may keep less.

Of each token a layer keeps, in values (d width; "half" has the precision of matrix products, the rest is float32):
  every layer    input d, its middle d (half-step, or synthesis in a decoder of CRATE), 4 of the norms, H of attention
  CRATE encoder  half: 5 d (two norms, coordinates in subspaces, attention, residual of ISTA); d more where eta is trained
  CRATE decoder  half: 4 d (two norms, coordinates, attention)
  transformer    half: 14 d (two norms, Q, K, V, attention, 4 d on each side of the GELU)
In an encoder the halves may be swapped (ablations): tied attention keeps 3 d, untied 5 d, ISTA 2 d, a perceptron of m hidden
units d + 2 m; layers that share their weights keep as much as layers that do not.
The last decoder layer keeps less of tokens that are not hidden (`_last_decoder_layer_bytes`).
Where layers are recomputed, each keeps its input alone, and all of one layer at a time is there again in the backward pass.
"""

from typing import Literal

from crate_ray.config import ModelConfig, RunConfig
from crate_ray.models.cost import count_hidden_parameters, count_parameters

Precision = Literal["float32", "bfloat16"]

_FLOAT32 = 4
_INT64 = 8
_NORM_STATISTICS = 2 * _FLOAT32


def training_state_bytes(
    config: ModelConfig, *, optimizer: Literal["adamw", "lion", "muon"] | None = None, ema: bool = False
) -> int:
    """Bytes of weights, gradients and optimizer state in float32, without activations.

    Args:
        config: The model.
        optimizer: None and adamw keep two moments a parameter, lion one; muon one of its matrices and two of the rest.
        ema: Whether an average of the weights is kept as well.
    """
    parameters = count_parameters(config).trainable
    moments = 2 * parameters
    if optimizer == "lion":
        moments = parameters
    elif optimizer == "muon":
        moments -= count_hidden_parameters(config)
    return _FLOAT32 * (2 * parameters + moments + (parameters if ema else 0))


def activation_bytes(config: ModelConfig, *, precision: Precision = "float32", recompute: bool = False) -> int:
    """Bytes kept for the backward pass of one image; see the module for what is counted.

    Args:
        config: The model.
        precision: Of matrix products: float32, or bfloat16 under autocast.
        recompute: Layers keep their input alone (`scale.activation_checkpointing`); the largest layer is counted whole besides.
    """
    product = _FLOAT32 if precision == "float32" else 2
    again = largest_layer_bytes(config, precision=precision) if recompute else 0
    if config.num_classes is not None:
        return again + _classifier_bytes(config, product, recompute)
    n, d = config.num_patches, config.width
    patches = product * n * 3 * config.patch_size**2
    decoder = _decoder_bytes(config, product, recompute)
    if config.encoder_tokens == "all":
        mask = n
        return again + patches + mask + _encoder_bytes(config, 1 + n, product, recompute) + decoder
    visible = 1 + config.num_kept
    positioned, decoder_embed = _FLOAT32 * n * d, product * visible * d
    return again + patches + positioned + _encoder_bytes(config, visible, product, recompute) + decoder_embed + decoder


def run_state_bytes(config: RunConfig) -> int:
    """`training_state_bytes` of a run's model, optimizer and average, on a worker that holds all of them."""
    return training_state_bytes(config.model, optimizer=config.optimizer.name, ema=config.train.ema is not None)


def run_activation_bytes(config: RunConfig, *, precision: Precision) -> int:
    """`activation_bytes` of a run's model, with layers recomputed where the run asks for it."""
    return activation_bytes(config.model, precision=precision, recompute=config.scale.activation_checkpointing)


def largest_layer_bytes(config: ModelConfig, *, precision: Precision = "float32") -> int:
    """The most that one layer keeps of one image."""
    product = _FLOAT32 if precision == "float32" else 2
    n = 1 + (config.num_kept if config.num_classes is None and config.encoder_tokens == "visible" else config.num_patches)
    encoder = _encoder_layer_bytes(config, n, product)
    return (
        encoder
        if config.num_classes is not None
        else max(encoder, _decoder_layer_bytes(config, 1 + config.num_patches, product))
    )


def _encoder_bytes(config: ModelConfig, n: int, product: int, recompute: bool) -> int:
    """Encoder layers and the norm behind them."""
    norm = _FLOAT32 * n * config.width + _NORM_STATISTICS * n
    return config.encoder_depth * _kept_encoder_layer_bytes(config, n, product, recompute) + norm


def _kept_encoder_layer_bytes(config: ModelConfig, n: int, product: int, recompute: bool) -> int:
    return _FLOAT32 * n * config.width if recompute else _encoder_layer_bytes(config, n, product)


def _decoder_bytes(config: ModelConfig, product: int, recompute: bool) -> int:
    """Decoder layers; of the hidden tokens the last layer, norm, prediction and squared error."""
    n, e, hidden = 1 + config.num_patches, config.decoder_width, config.num_patches - config.num_kept
    if recompute:  # the first input is a sum or a norm; CRATE passes products on, a transformer its residual
        layers = n * e * (_FLOAT32 + (config.decoder_depth - 1) * (product if config.family == "crate" else _FLOAT32))
    else:
        layers = (config.decoder_depth - 1) * _decoder_layer_bytes(config, n, product)
        layers += _last_decoder_layer_bytes(config, n, hidden, product)
    positions = _INT64 * (hidden + (config.num_patches if config.encoder_tokens == "visible" else 0))
    norm = _FLOAT32 * hidden * e + _NORM_STATISTICS * hidden
    prediction = product * hidden * e + _FLOAT32 * hidden * 3 * config.patch_size**2
    return layers + positions + norm + prediction


def _classifier_bytes(config: ModelConfig, product: int, recompute: bool) -> int:
    n, d, values = config.num_patches, config.width, 3 * config.patch_size**2
    embedding = product * n * values
    if config.embedding == "normed":
        embedding += _FLOAT32 * n * (values + d) + 2 * _NORM_STATISTICS * n
    layers = config.encoder_depth * _kept_encoder_layer_bytes(config, 1 + n, product, recompute)
    pooled = _FLOAT32 * d if config.pool == "mean" else 0
    keeps_output = config.pool == "cls" or (config.has_ista and not recompute)
    output = _FLOAT32 * (1 + n) * d if keeps_output else 0
    return embedding + layers + output + pooled + _NORM_STATISTICS + product * d


def _encoder_layer_bytes(config: ModelConfig, n: int, product: int) -> int:
    d, attention = config.width, (3 if config.is_tied else 5) * product
    if not config.has_ista:
        hidden = n * 2 * config.mlp_width * product
        return _layer_bytes(n, d, config.num_heads, attention + product) + hidden
    trained_step = _FLOAT32 if config.ista_learnable == "layer" else 0
    return _layer_bytes(n, d, config.num_heads, attention + 2 * product + trained_step)


def _decoder_layer_bytes(config: ModelConfig, n: int, product: int) -> int:
    products = 14 if config.family == "vit" else 4
    return _layer_bytes(n, config.decoder_width, config.decoder_num_heads, products * product)


def _last_decoder_layer_bytes(config: ModelConfig, n: int, hidden: int, product: int) -> int:
    """Keys and values of all tokens, the rest of the hidden ones; what they are picked from is kept as it was computed."""
    e, attention = config.decoder_width, _FLOAT32 * config.decoder_num_heads * hidden
    if config.family == "crate":  # all: input, synthesis, norms, coordinates; hidden: queries, attention
        picked_from = product if product < _FLOAT32 else 0
        all_tokens = n * (e * (2 * _FLOAT32 + 3 * product + picked_from) + 2 * _NORM_STATISTICS)
        return all_tokens + hidden * e * 2 * product + attention
    picked_from = _FLOAT32 if product < _FLOAT32 else 0  # all: input, norm, keys, values; hidden: the rest
    all_tokens = n * (e * (_FLOAT32 + 3 * product + picked_from) + _NORM_STATISTICS)
    return all_tokens + hidden * (e * (_FLOAT32 + 12 * product) + _NORM_STATISTICS) + attention


def _layer_bytes(n: int, d: int, num_heads: int, width_bytes: int) -> int:
    """Input and middle of the layer in float32, `width_bytes` for each of n d values, statistics of norms and attention."""
    statistics = 2 * _NORM_STATISTICS + _FLOAT32 * num_heads
    return n * (d * (2 * _FLOAT32 + width_bytes) + statistics)
