"""AdamW, Lion or Muon with the published parameter groups, scaled with the width where the model's parametrization says so.

In: a model and rates. Out: groups whose `lr_scale` multiplies the rate of every step, and a step that is taken only where
the device finds loss and gradient finite.
"""

from typing import Any

import torch
from torch import Tensor, nn

from crate_ray.config import OptimizerConfig
from crate_ray.models import Classifier, MaskedAutoencoder
from crate_ray.models.parametrization import lr_factor, role_of, weight_decay_factor
from crate_ray.training.lion import Lion
from crate_ray.training.muon import MuonWithAdamW

_TOKENS = ("cls_token", "mask_token", "pos_embed")
_EMBEDDING = ("patch_norm", "patch_embed", "embed_norm", "cls_token", "pos_embed")


def parameter_groups(
    model: MaskedAutoencoder | Classifier, weight_decay: float, layer_decay: float | None = None, *, hidden_apart: bool = False
) -> list[dict[str, Any]]:
    """Weights with decay; norms, biases, per-layer scalars and tokens without. Two groups, more with layer decay or muP.

    Source: facebookresearch/mae, which leaves one-dimensional parameters out; its class and mask
    tokens decay there, ours do not, as in the supervised recipes of both families. In a model of `parametrization` mup,
    rate and decay of a matrix have the factors of `models.parametrization` besides; at its base width they are 1.

    Args:
        model: Its configuration says how it is parametrized.
        weight_decay: Of the weights.
        layer_decay: A group's `lr_scale` is this to the power of the layers above it. Source: facebookresearch/mae
            (fine-tuning), after BEiT: embedding and tokens are layer 0, `blocks.i` is i + 1, norm and head come last.
        hidden_apart: Keeps matrices that are neither patch embedding nor head in groups of their own, with `is_hidden` true.
    """
    top, ratio = len(model.blocks) + 1, model.config.width_ratio
    groups: dict[tuple[int, bool, float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_free = parameter.ndim <= 1 or name.rsplit(".", 1)[-1] in _TOKENS
            layer, role = top if layer_decay is None else layer_of(name, top), role_of(name, parameter)
            is_hidden = hidden_apart and role == "hidden"
            key = (layer, is_free, lr_factor(role, ratio), weight_decay_factor(role, ratio), is_hidden)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if is_free else weight_decay * decay_factor,
            "lr_scale": factor if layer_decay is None else factor * layer_decay ** (top - layer),
            **({"is_hidden": is_hidden} if hidden_apart else {}),
        }
        for (layer, is_free, factor, decay_factor, is_hidden), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def layer_of(name: str, top: int) -> int:
    """The layer of a parameter, from 0 at the embedding to `top` at the head."""
    first, *rest = name.split(".")
    if first == "blocks":
        return int(rest[0]) + 1
    return 0 if first in _EMBEDDING else top


def create_optimizer(
    model: MaskedAutoencoder | Classifier, config: OptimizerConfig, *, lr: float
) -> torch.optim.AdamW | Lion | MuonWithAdamW:
    """The optimizer of `optimizer.name`; the loop sets the rate of every step.

    Raises:
        ConfigError: This torch has no Muon.
    """
    groups = parameter_groups(model, config.weight_decay, config.layer_decay, hidden_apart=config.name == "muon")
    if config.name == "lion":
        return Lion(groups, lr=lr, betas=config.betas)
    if config.name == "muon":
        return MuonWithAdamW(groups, lr=lr, betas=config.betas, eps=config.eps)
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=config.eps, fused=True)


def step_where_finite(optimizer: torch.optim.Optimizer, is_finite: Tensor) -> None:
    """Takes the step, or leaves weights and state as they are, bit for bit; decided on the device, which is not waited for.

    Args:
        optimizer: From `create_optimizer`: all of them look at `found_inf`, as fused AdamW does under a GradScaler.
        is_finite: Scalar on the device, true where the step counts; the same on every rank.
    """
    optimizer.found_inf = is_finite.logical_not().float()  # type: ignore[attr-defined]
    optimizer.step()


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state by parameter name: AdamW's `exp_avg.<name>`, `exp_avg_sq.<name>` and `step.<name>`, and so on."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = torch.as_tensor(value).detach()
    return tensors


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Puts back what `optimizer_tensors` gave.

    Raises:
        ValueError: The tensors belong to parameters that this model does not have.
    """
    by_name = dict(model.named_parameters())
    unknown = sorted({key.split(".", 1)[1] for key in tensors} - by_name.keys())
    if unknown:
        raise ValueError(f"the checkpoint's optimizer has state for parameters that this model lacks: {', '.join(unknown[:5])}")
    for key, value in tensors.items():
        kind, name = key.split(".", 1)
        parameter = by_name[name]
        # The fused kernel keeps its step counter beside the parameter, in float32.
        optimizer.state[parameter][kind] = value.to(parameter.device)
