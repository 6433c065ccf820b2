"""What a machine can do, and the shortest time a step could take on it.

In: a device and a dtype, or a ModelConfig. Out: FLOP/s and bytes/s that were measured here, or that a vendor prints; seconds.

The roofline of a training step is that of an ideal implementation, not a law of nature:
  matmul      every matrix product of forward and backward, with its own shape: the longer of its operations at the measured
              peak and of its operands and result moved once at the measured bandwidth; attention is one fused operation
              that never writes its N x N matrix
  stream      the residual stream stays float32, and its elementwise work is fused: at each half-layer 12 bytes an element
              forward (stream and branch read, stream and normalised input written), 16 backward
  optimizer   28 bytes a parameter: weight, gradient and two moments read, weight and two moments written, in float32
A backward is two forwards, as in `crate_ray.models.cost`, also for the first layer, whose input needs no gradient.

Shapes: m rows, k contracted, n columns; all counts are for one image.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from crate_ray.config import ModelConfig
from crate_ray.models.cost import count_parameters
from crate_ray.models.linear import linear
from crate_ray.models.peaks import peak_tflops

STREAM_BYTES = 12 + 16
OPTIMIZER_BYTES = 28


@dataclass(frozen=True)
class Matmul:
    """`count` products of the same shape in one image's forward pass."""

    count: int
    flops: int
    """Of one product."""
    elements: int
    """Activations that one product reads or writes."""
    weights: int = 0
    """Values of its weight, read once a step whatever the batch."""


@dataclass(frozen=True)
class Roofline:
    """Seconds of one training step."""

    matmul_s: float
    stream_s: float
    optimizer_s: float

    @property
    def total_s(self) -> float:
        """Their sum."""
        return self.matmul_s + self.stream_s + self.optimizer_s


def measure_peak(
    device: torch.device, dtype: torch.dtype, *, repeats: int = 3, clock: Callable[[], float] = time.perf_counter
) -> float:
    """FLOP/s of the best of `repeats` large square products, by torch's choice of library and by ours, in both layouts."""
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    products = [lambda f=f, x=x: f(a, x) for f in (functional.linear, linear) for x in (b, b.t())]  # type: ignore[misc]
    return 2 * side**3 / min(seconds_of(product, device, clock) for _ in range(repeats) for product in products)


def measure_bandwidth(device: torch.device, *, repeats: int = 5) -> float:
    """Bytes/s of copying a tensor that no cache holds, reading and writing counted."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return (
        2
        * source.numel()
        * source.element_size()
        / min(seconds_of(lambda: target.copy_(source), device) for _ in range(repeats))
    )


def data_sheet_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that the vendor prints; None for a CPU or a GPU not in the table."""
    if device.type != "cuda":
        return None
    peak = peak_tflops(torch.cuda.get_device_name(device), "bfloat16" if dtype == torch.bfloat16 else "float32")
    return None if peak is None else 1e12 * peak


def seconds_of(work: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that `work` takes, by events on a GPU, by `clock` on a CPU."""
    if device.type != "cuda":
        started = clock()
        work()
        return clock() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def training_roofline(
    config: ModelConfig, *, batch: int, element_bytes: int, peak_flops: float, bandwidth_bytes: float
) -> Roofline:
    """The shortest step of this project's training path.

    Args:
        config: A masked autoencoder.
        batch: Images a step.
        element_bytes: Of an activation in a product: 2 in bfloat16, 4 in float32.
        peak_flops: Measured, a second.
        bandwidth_bytes: Measured, a second.
    """
    passes_s = 0.0
    for product in matmuls(config):
        bytes_moved = element_bytes * (batch * product.elements + product.weights)
        passes_s += product.count * max(batch * product.flops / peak_flops, bytes_moved / bandwidth_bytes)
    encoder_tokens = 1 + (config.num_kept if config.encoder_tokens == "visible" else config.num_patches)
    stream = 2 * config.encoder_depth * encoder_tokens * config.width
    stream += 2 * config.decoder_depth * (1 + config.num_patches) * config.decoder_width
    trainable = count_parameters(config).trainable
    return Roofline(
        matmul_s=3 * passes_s,
        stream_s=STREAM_BYTES * batch * stream / bandwidth_bytes,
        optimizer_s=OPTIMIZER_BYTES * trainable / bandwidth_bytes,
    )


def matmuls(config: ModelConfig) -> list[Matmul]:
    """The products of one image's forward pass in training; their operations sum to `cost.forward_flops`."""
    n, hidden, pixels = config.num_patches, config.num_patches - config.num_kept, 3 * config.patch_size**2
    d, e = config.width, config.decoder_width
    visible = config.encoder_tokens == "visible"
    encoder_n = 1 + (config.num_kept if visible else n)
    products = [_linear(n, pixels, d)]
    products += _repeat(_encoder_layer(config, encoder_n), config.encoder_depth)
    products += [_linear(encoder_n, d, e)] if visible else []
    products += _repeat(_decoder_layer(config, 1 + n, 1 + n), config.decoder_depth - 1)
    return [*products, *_decoder_layer(config, 1 + n, hidden), _linear(hidden, e, pixels)]


def _encoder_layer(config: ModelConfig, n: int) -> list[Matmul]:
    d = config.width
    if config.family == "vit":
        return _transformer_layer(d, n, n)
    return [*_subspace_attention(d, config.num_heads, n, n), _linear(n, d, d), _linear(n, d, d)]


def _decoder_layer(config: ModelConfig, n: int, given: int) -> list[Matmul]:
    d = config.decoder_width
    if config.family == "vit":
        return _transformer_layer(d, n, given)
    return [_linear(n, d, d), *_subspace_attention(d, config.decoder_num_heads, n, given)]


def _subspace_attention(d: int, num_heads: int, n: int, given: int) -> list[Matmul]:
    projection = [_linear(given, d, d)] if num_heads > 1 else []
    return [_linear(n, d, d), _attention(given, n, d, tied=True), *projection]


def _transformer_layer(d: int, n: int, given: int) -> list[Matmul]:
    mlp = [_linear(given, d, 4 * d), _linear(given, 4 * d, d)]
    return [_linear(given, d, d), _linear(n, d, 2 * d), _attention(given, n, d, tied=False), _linear(given, d, d), *mlp]


def _linear(m: int, k: int, n: int) -> Matmul:
    return Matmul(count=1, flops=2 * m * k * n, elements=m * k + m * n, weights=k * n)


def _attention(m: int, n: int, d: int, *, tied: bool) -> Matmul:
    """Logits and weighted sum of m queries over n tokens; tied queries, keys and values are one tensor."""
    return Matmul(count=1, flops=4 * m * n * d, elements=m * d + (n * d if tied else m * d + 2 * n * d))


def _repeat(layer: list[Matmul], depth: int) -> list[Matmul]:
    return [Matmul(depth, product.flops, product.elements, product.weights) for product in layer]
