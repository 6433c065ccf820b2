"""How far our model is from published numbers."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from crate_ray.models import create_model, load_weights

OUTPUT_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


def relative_error(ours: Tensor, published: Tensor) -> float:
    """max|difference| / max|reference|."""
    return float((ours.detach().double() - published.detach().double()).abs().max() / published.detach().double().abs().max())


def published_names(model: nn.Module, published: Mapping[str, Tensor]) -> dict[str, str]:
    """Our parameter's name to the published one, found by loading a state dict of numbered markers."""
    names = list(published)
    marked = create_model(model.config)  # type: ignore[arg-type]
    markers = {name: torch.full_like(published[name], float(index)) for index, name in enumerate(names)}
    load_weights(marked, markers, convert=True)
    return {
        ours: names[int(value.flatten()[0])]
        for ours, value in marked.named_parameters()
        if ".ista.log_" not in ours  # the published code holds them as constants
    }


def check_gradient_norms(
    model: nn.Module, published: Mapping[str, Tensor], norms: Mapping[str, float], *, tolerance: float = GRADIENT_TOLERANCE
) -> None:
    """Every gradient norm is the published one, and no published gradient is left over."""
    names = published_names(model, published)
    parameters = dict(model.named_parameters())
    for ours, theirs in names.items():
        gradient = parameters[ours].grad
        assert gradient is not None, ours
        assert float(gradient.norm()) == pytest.approx(norms[theirs], rel=tolerance), (ours, theirs)
    assert set(names.values()) == norms.keys()
