r"""Width transfer (muP): what a parameter's role makes of its initialisation, its learning rate and its weight decay.

In: a model initialised as published, and its configuration. Out: the same model with two matrices scaled, and factors
for its optimizer. The standard parametrization keeps rate and decay at every width. muP scales them with r, the width over that
of the base model, so that coordinates and their change in a step stay as large as there (Yang et al., "Tensor Programs V",
arXiv:2203.03466, table 3, for Adam). At r = 1 nothing is touched, bit for bit.

Rules for rates and variances instead of multipliers in the forward pass: a trained model is then plain tensors, which published
code, torch.export and `load_weights` read without knowing how they were trained. docs/numerics.md derives the rules.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from crate_ray.config import ModelConfig

Role = Literal["input", "hidden", "output", "vector"]
_FAN_IN_GROWS = ("hidden", "output")


def role_of(name: str, parameter: Tensor) -> Role:
    """What grows with the width: an input's rows, an output's columns, both of hidden matrices.

    Biases, gains of norms, tokens, positions, step sizes and lambdas are vectors: a sum over one value, whatever the width.
    """
    if parameter.ndim != 2:
        return "vector"
    owner = name.split(".", maxsplit=1)[0]
    if owner == "patch_embed":
        return "input"
    return "output" if owner in ("decoder_pred", "head") else "hidden"


def lr_factor(role: Role, width_ratio: float) -> float:
    """Of Adam's learning rate: 1/r where the sum over inputs grows, for Adam's steps all have one sign with the inputs."""
    return 1 / width_ratio if role in _FAN_IN_GROWS else 1.0


def weight_decay_factor(role: Role, width_ratio: float) -> float:
    """The inverse: AdamW's decay is rate times weight decay, and that product stays (a time constant in steps)."""
    return width_ratio if role in _FAN_IN_GROWS else 1.0


@torch.no_grad()
def scale_initialisation(model: nn.Module, config: ModelConfig) -> None:
    """Turns the published initialisation into muP's, in place, right after it was drawn.

    Published variances of hidden matrices are a constant over the fan-in, which is muP's. Two others are not: Xavier's of the
    patch embedding falls with the width, though the fan-in is fixed; that of the output falls as 1/r, muP's as 1/r^2.
    torch's default, in the published classifier, has biases that fall with the width too.

    Args:
        model: An autoencoder or a classifier, just initialised.
        config: Its own.
    """
    ratio = config.width_ratio
    if ratio == 1:
        return
    parameters = dict(model.named_parameters())
    if config.embedding == "normed":  # uniform of variance 1 / (3 fan-in), biases too
        parameters["head.weight"].mul_(ratio**-0.5)
        for module in model.modules():
            if isinstance(module, nn.Linear) and module is not model.patch_embed and module.bias is not None:
                module.bias.mul_(ratio**0.5)
        return
    patch_values = 3 * config.patch_size**2
    parameters["patch_embed.weight"].mul_(_xavier_ratio(patch_values, config.width, ratio))
    if config.num_classes is None:
        parameters["decoder_pred.weight"].mul_(_xavier_ratio(patch_values, config.decoder_width, ratio) / ratio)
    else:  # drawn with one standard deviation at every width
        parameters["head.weight"].div_(ratio)


def _xavier_ratio(fixed_fan: int, width: int, ratio: float) -> float:
    """Xavier's standard deviation, sqrt(2 / (fan-in + fan-out)), at the base width over that at this width."""
    return math.sqrt((fixed_fan + width) / (fixed_fan + width / ratio))
