"""The coordinate check: do activations change as much in a wide model as in a narrow one?

In: a run's configuration. Out: for each named tensor of the model, a few updates after initialisation, the slope of its mean
change of a coordinate over the width, both logarithmic, with an interval over seeds; in the standard parametrization and in
muP. A slope of 0 is what muP promises: no tensor explodes or stands still when the width grows (Yang et al.,
arXiv:2203.03466, appendix D).

Every update is a real `TrainStep` at the peak learning rate, without warm-up, always on the same images and masks, on the CPU
in float32. The images are synthetic, so that no data set is needed: the check is about the model. They are dark on the whole,
so that there is more to learn at once than to predict nothing, which would only undo what the initial head says.

Shapes: B images, N tokens, D width, H heads, P = D / H.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from crate_ray.config import ConfigError, ModelConfig, RunConfig
from crate_ray.data import Batch
from crate_ray.models import Classifier, MaskedAutoencoder, create_model
from crate_ray.models.blocks import CrateDecoderLayer, SelfAttention, SubspaceAttention
from crate_ray.training.objective import Normalise, noise_size
from crate_ray.training.optimizer import create_optimizer
from crate_ray.training.step import TrainStep

Parametrization = Literal["standard", "mup"]
LIMIT = 0.1
"""Largest |slope| of a tensor that passes."""
WIDTHS = (64, 128, 256, 512)
"""Of the check where the model's shape allows them; else see `default_widths`."""
BATCH = 16
"""Images of the one batch."""
OWN_PART = "head's own part"
_STACKS = ("blocks", "decoder_blocks")
_ENDS = ("patch_embed", "norm", "fc_norm", "decoder_embed", "decoder_norm", "decoder_pred", "head")


@dataclass(frozen=True)
class CoordinateRow:
    """One tensor after some updates."""

    name: str
    parametrization: Parametrization
    step: int
    slope: float
    """d log(mean |change of a coordinate|) / d log(width), least squares over the widths; the mean is over seeds too."""
    low: float
    high: float
    """Ends of the 95% t interval over seeds."""
    passes: bool
    """Whether |slope| < LIMIT."""

    @property
    def verdict(self) -> Literal["passes", "grows", "shrinks", "unclear"]:
        """Unclear where it does not pass, but the interval reaches slopes that do: more seeds would tell."""
        if self.passes:
            return "passes"
        if self.low < LIMIT and self.high > -LIMIT:
            return "unclear"
        return "grows" if self.slope > 0 else "shrinks"

    def as_dict(self) -> dict[str, Any]:
        """The row as plain values, verdict included."""
        return {**asdict(self), "verdict": self.verdict}


def coordinate_check(
    config: RunConfig,
    *,
    widths: Sequence[int] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    steps: Sequence[int] = (1, 2, 5, 10),
) -> list[CoordinateRow]:
    """Trains the model at every width with every seed, in both parametrizations, and fits the slopes.

    The base model of muP is the configuration's own, or the model as configured. At the other widths a head is as wide as in
    that model, and the decoder is in the same proportion to the encoder.

    Args:
        config: Model, optimizer and clipping are taken from it; its data are not read.
        widths: Of the encoder, at least four; default: `default_widths`.
        seeds: Of the initialisation, at least two.
        steps: Updates after which changes are measured, such as 1 and 10.

    Returns:
        A row for each parametrization, step and tensor, tensors in the order of the forward pass. The same arguments give
        the same rows.

    Raises:
        ConfigError: Too few widths or seeds, or a width that the model's heads do not divide.
    """
    widths = sorted(set(default_widths(config.model) if widths is None else widths))
    seeds, steps = list(dict.fromkeys(seeds)), sorted(set(steps))
    if len(widths) < 4 or len(seeds) < 2 or not steps or steps[0] < 1:
        raise ConfigError(
            f"a coordinate check over widths {widths}, seeds {seeds} and steps {steps}: give at least four widths, two seeds "
            "and one step of 1 or more"
        )
    rows = []
    for parametrization in get_args(Parametrization):
        models = [at_width(config.model, width, parametrization) for width in widths]
        changes = {
            (model.width, seed): coordinate_changes(config, model, seed=seed, steps=steps) for model in models for seed in seeds
        }
        for step in steps:
            for name in changes[widths[0], seeds[0]][step]:
                values = [[changes[width, seed][step][name] for width in widths] for seed in seeds]
                rows.append(_row(name, parametrization, step, values, widths))
    return rows


def default_widths(config: ModelConfig) -> tuple[int, ...]:
    """Multiples of the least width that the model's heads and decoder divide: those nearest to WIDTHS, or the first four.

    A MAE of 768 with heads of 64 and a decoder of 512 has whole heads and a whole decoder at multiples of 192 alone.
    """

    def is_whole(width: int) -> bool:
        try:
            at_width(config, width, "mup")
        except ConfigError:
            return False
        return True

    unit = next(width for width in range(4, config.width + 1, 4) if is_whole(width))
    nearest = {max(1, round(width / unit)) * unit for width in WIDTHS}
    return tuple(sorted(nearest)) if len(nearest) == len(WIDTHS) else tuple(unit * k for k in range(1, len(WIDTHS) + 1))


def at_width(config: ModelConfig, width: int, parametrization: Parametrization) -> ModelConfig:
    """The model at another width: heads as wide as before, the decoder in proportion.

    Raises:
        ConfigError: The number of heads, or the decoder's width, would not be whole.
    """
    own = {"width": config.width} | {key: getattr(config, key) for key in ("num_heads", "decoder_width", "decoder_num_heads")}
    base = {f"mup_base_{key}": value for key, value in own.items()}
    if config.parametrization == "mup":
        base = {key: getattr(config, key) for key in base}
    scaled = {key: value * width // config.width for key, value in own.items()}
    # Sizes that are not whole are refused in either parametrization, with muP's message.
    model = ModelConfig.parse(
        {**config.model_dump(), **scaled, **base, "parametrization": "mup"}, where=f"the coordinate check at width {width}"
    )
    return model if parametrization == "mup" else model.model_copy(update={"parametrization": "standard"})


def coordinate_changes(
    config: RunConfig, model: ModelConfig, *, seed: int, steps: Sequence[int]
) -> dict[int, dict[str, float]]:
    """Mean |coordinate after t updates - coordinate at initialisation| of every tensor, for every t of `steps`.

    Beside what `observe` gives, OWN_PART: the output for the head's input at initialisation, which only the head's own updates
    change. The output itself also undoes what the initial head made of its input, and that shrinks as the width grows.

    Args:
        config: Its optimizer and clipping.
        model: What is trained.
        seed: Of the initialisation.
        steps: In ascending order.
    """
    lr = config.optimizer.peak_lr(config.train.global_batch)
    train = config.train.model_copy(update={"global_batch": BATCH, "micro_batch": None, "compile": False})
    config = config.model_copy(update={"model": model, "train": train})
    batch = _fixed_batch(config)
    images_BCHW = Normalise(config.data.mean, config.data.std)(batch.images_BCHW)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = create_model(model)
    update = TrainStep(network, create_optimizer(network, config.optimizer, lr=lr), config, precision="float32")
    head = network.head if isinstance(network, Classifier) else network.decoder_pred
    entered: list[Tensor] = []
    with head.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0])):
        first = observe(network, images_BCHW, batch.noise_BN)
    first[OWN_PART] = head(entered[0]).detach()
    changes: dict[int, dict[str, float]] = {}
    for step in range(1, steps[-1] + 1):
        update(batch, lr=lr)
        if step in steps:
            now = observe(network, images_BCHW, batch.noise_BN) | {OWN_PART: head(entered[0]).detach()}
            changes[step] = {name: float((now[name] - first[name]).abs().mean(dtype=torch.float64)) for name in first}
    return changes


def observe(network: MaskedAutoencoder | Classifier, images_BCHW: Tensor, noise_BN: Tensor | None) -> dict[str, Tensor]:
    """What the named parts of a model give for a batch, in the order of the forward pass.

    Of every layer: the logits of attention (B, H, N, N), what attention and the second half-layer give, and, where the residual
    makes it another tensor, the layer's own output (B, N, D); of a CRATE decoder layer also its synthesis. Of a layer that is
    applied several times, the last time.
    """
    seen: dict[str, Tensor] = {}

    def record(name: str, value: Tensor) -> None:
        if not any(value is other for other in seen.values()):  # a layer may end in what its last part gave
            seen[name] = value

    handles = list(_watch(network, record))
    try:
        with torch.no_grad():
            network(images_BCHW) if noise_BN is None else network(images_BCHW, noise_BN)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _watch(network: MaskedAutoencoder | Classifier, record: Callable[[str, Tensor], None]) -> Iterator[RemovableHandle]:
    modules = dict(network.named_modules())  # a module that is used twice has one name
    for name, module in modules.items():
        owner, _, last = name.rpartition(".")
        is_layer = owner in _STACKS
        if is_layer or name in _ENDS or last in ("attn", "ista", "mlp"):
            yield module.register_forward_hook(lambda _, __, value, name=name: record(name, value))
        if last == "qkv":
            attention = modules[owner]
            assert isinstance(attention, SubspaceAttention | SelfAttention)
            yield module.register_forward_hook(
                lambda _, __, value, name=owner, attn=attention: record(f"{name}.logits", _logits(attn, value))
            )
        if isinstance(module, CrateDecoderLayer):
            yield module.norm2.register_forward_pre_hook(lambda _, inputs, name=name: record(f"{name}.synthesis", inputs[0]))


def _logits(attention: SubspaceAttention | SelfAttention, projected: Tensor) -> Tensor:
    """The product q k^T / sqrt(P), (B, H, N, N), of what `qkv` gave."""
    parts = (projected,) if isinstance(attention, SubspaceAttention) else projected.chunk(3, dim=-1)
    q_BHNP, k_BHNP = (
        torch.unflatten(x, -1, (attention.num_heads, -1)).transpose(1, 2) for x in (parts[0], parts[len(parts) // 2])
    )
    return q_BHNP @ k_BHNP.transpose(-2, -1) / math.sqrt(q_BHNP.shape[-1])


def _row(
    name: str, parametrization: Parametrization, step: int, changes: Sequence[Sequence[float]], widths: Sequence[int]
) -> CoordinateRow:
    """The slope of the mean over seeds, and the t interval of its jackknife over them.

    Slopes of single seeds would be too large where a narrow model has few heads: the logarithm of a noisy mean lies below
    that of its expectation, the more the noisier.

    Args:
        name: Of the tensor.
        parametrization: Of the models.
        step: Updates.
        changes: A row for each seed, over the widths.
        widths: In the same order.
    """
    from scipy import stats

    values, num_seeds = np.array(changes), len(changes)
    log_widths = np.log(widths) - np.log(widths).mean()
    fit = log_widths / (log_widths @ log_widths)  # least squares
    slope = float(np.log(values.mean(axis=0)) @ fit)
    without_one = np.log((values.sum(axis=0) - values) / (num_seeds - 1)) @ fit
    half = float(stats.t.ppf(0.975, num_seeds - 1) * stats.sem(num_seeds * slope - (num_seeds - 1) * without_one))
    return CoordinateRow(name, parametrization, step, slope, slope - half, slope + half, passes=abs(slope) < LIMIT)


def _fixed_batch(config: RunConfig) -> Batch:
    """Bright spots on a dark ground, with grain: enlarged 4 x 4 random colours, most of them dark."""
    side = config.model.image_size
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(BATCH, 3, 4, 4, generator=generator) ** 3
    smooth_BCHW = functional.interpolate(colours, size=(side, side), mode="bicubic", align_corners=False)
    grain_BCHW = 0.1 * torch.randn(BATCH, 3, side, side, generator=generator)
    rows = torch.arange(BATCH)
    num_classes = config.model.num_classes
    return Batch(
        images_BCHW=((smooth_BCHW + grain_BCHW).clamp(0, 1) * 255).to(torch.uint8),
        labels_B=rows % (num_classes or 1),
        noise_BN=torch.rand(BATCH, noise_size(config), generator=generator) if num_classes is None else None,
        weights_B=torch.ones(BATCH),
        sample_ids_B=rows,
        epochs_B=torch.zeros_like(rows),
        cursor_after=BATCH,
    )
