"""AdamW with the published parameter groups."""

import torch
from torch import nn

from crate_ray.config import OptimizerConfig

_TOKENS = ("cls_token", "mask_token", "pos_embed", "pos_embedding")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: weights with decay; norms, biases, per-layer scalars and tokens without.

    Source: facebookresearch/mae, which leaves one-dimensional parameters out; its class and mask
    tokens decay there, ours do not, as in the supervised recipes of both families.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_free = parameter.ndim <= 1 or name.rsplit(".", 1)[-1] in _TOKENS
            (free if is_free else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def create_optimizer(model: nn.Module, config: OptimizerConfig, *, lr: float) -> torch.optim.AdamW:
    """Fused AdamW; the loop sets the rate of every step."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=lr, betas=config.betas, eps=config.eps, fused=True
    )


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state by parameter name: `exp_avg.<name>`, `exp_avg_sq.<name>`, `step.<name>`."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
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
