"""What each CRATE encoder layer does to a batch: does it compress, does it sparsify, are its steps small enough.

In: a model and normalised whole images. Out: one LayerMeasures an encoder layer. The layers are walked step by step
instead of hooked, so that what is measured can be read here; a test holds the walk to the model's own forward pass.
Everything runs in float32, whatever surrounds the call. A number that is not defined is None and makes no metric:
without tied attention a layer has no subspaces that queries, keys and values share, without ISTA no sparse code.

Shapes: B images, N tokens with the class token, D width, H heads, P = D / H head width.
C = H P basis vectors.
"""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from crate_ray.evaluation.coding_rate import coding_rate
from crate_ray.evaluation.spectrum import LatentMeasures
from crate_ray.models import Classifier, MaskedAutoencoder
from crate_ray.models.blocks import CrateEncoderLayer, IstaStep, SubspaceAttention, TransformerLayer

POWER_ITERATIONS = 200


@dataclass(frozen=True)
class LayerMeasures:
    """One encoder layer on one batch; None where the layer has no such number.

    Attributes:
        coding_rate_pre_nats: Mean over images of `coding_rate` of U^T LN1(Z), Z the layer's input.
        coding_rate_post_nats: The same after attention, of U^T LN1(Z'), with the same U and LN1.
        nonzero_fraction: Share of entries of the layer's output that are not exactly zero, 0 to 1.
        ista_descent_ratio: See `ista_descent_ratio`.
        ista_objective_ratio: See `ista_objective_ratio`.
        dictionary_coherence: See `mutual_coherence`.
        subspace_overlap: See `subspace_overlap`.
    """

    coding_rate_pre_nats: float | None = None
    coding_rate_post_nats: float | None = None
    nonzero_fraction: float | None = None
    ista_descent_ratio: float | None = None
    ista_objective_ratio: float | None = None
    dictionary_coherence: float | None = None
    subspace_overlap: float | None = None


@dataclass(frozen=True)
class LayerStates:
    """The tensors inside one encoder layer.

    Attributes:
        pre_BHNP: U_h^T LN1(Z), which tied attention uses as query, key and value; None for another.
        post_BHNP: U_h^T LN1(Z') after attention; None likewise.
        ista_input_BND: y = LN2(Z'); of a layer with a perceptron its input.
        code_BND: The layer's output: ISTA(y), or Z' + MLP(y).
    """

    pre_BHNP: Tensor | None
    post_BHNP: Tensor | None
    ista_input_BND: Tensor
    code_BND: Tensor


def measure_layers(model: MaskedAutoencoder | Classifier, images_BCHW: Tensor) -> list[LayerMeasures]:
    """Measures every encoder layer on whole images, first layer first.

    The model keeps its weights, type and mode; nothing is drawn from a global random generator.

    Args:
        model: Either family. A model that is not float32 is measured on a float32 copy.
        images_BCHW: Normalised, on the model's device.

    Returns:
        One entry a layer, as they are applied; for transformer layers every field is None.

    Raises:
        ConfigError: Images of another shape than the model's, where there is something to measure.
    """
    if not (model.config.is_tied or model.config.has_ista):
        return [LayerMeasures()] * model.config.encoder_depth
    measures = []
    with _frozen_float32(model) as frozen:
        z_BND = frozen.embed(images_BCHW.float())
        for layer in frozen.encoder_layers:
            assert isinstance(layer, CrateEncoderLayer | TransformerLayer)
            states = layer_states(layer, z_BND)
            measures.append(LayerMeasures(**_measure_attention(layer, states), **_measure_ista(layer, states)))
            z_BND = states.code_BND
    return measures


def patch_latents(model: MaskedAutoencoder | Classifier, images_BCHW: Tensor) -> Tensor:
    """The encoder's output for every patch of whole images, (B (N - 1), D) float32: what `measure_latents` is given.

    Not the images' mean features: a rank is at most the number of rows, so a few images would cap it at their number
    where their patches fill the width. Patches of one image are alike, so a number is comparable at one batch only.
    See `measure_layers` for arguments and errors.
    """
    with _frozen_float32(model) as frozen:
        return frozen.encode(images_BCHW.float())[:, 1:].flatten(0, 1)


def layer_states(layer: CrateEncoderLayer | TransformerLayer, z_BND: Tensor) -> LayerStates:
    """The layer's forward pass with its inner tensors."""
    normed_BND = layer.norm1(z_BND)
    half_BND = z_BND + layer.attn(normed_BND)
    second_BND = layer.norm2(half_BND)
    attention = layer.attn if isinstance(layer.attn, SubspaceAttention) else None
    return LayerStates(
        pre_BHNP=attention.project(normed_BND) if attention else None,
        post_BHNP=attention.project(layer.norm1(half_BND)) if attention else None,
        ista_input_BND=second_BND,
        code_BND=layer.ista(second_BND) if isinstance(layer, CrateEncoderLayer) else half_BND + layer.mlp(second_BND),
    )


def as_metrics(layers: Sequence[LayerMeasures], latents: LatentMeasures | None = None) -> dict[str, float]:
    """Metric names and values: `whitebox/layer01/coding_rate_pre_nats`, `whitebox/latent/rankme`.

    Layers count from 1. What is None is left out.
    """
    parts: list[tuple[str, LayerMeasures | LatentMeasures]] = [(f"layer{i:02d}", m) for i, m in enumerate(layers, start=1)]
    if latents is not None:
        parts.append(("latent", latents))
    return {
        f"whitebox/{part}/{name}": value
        for part, measures in parts
        for name, value in dataclasses.asdict(measures).items()
        if value is not None
    }


@torch.no_grad()
def ista_descent_ratio(ista: IstaStep) -> float:
    r"""\eta \sigma_max(D)^2: the step size against the curvature of the step's smooth part; no unit.

    Below 2, a proximal gradient step on F(z) = 1/2 |y - D z|^2 + \lambda |z|_1 over z >= 0 that starts at a feasible z
    cannot increase F (Beck and Teboulle 2009; at most 1 is their usual choice). Above 2 nothing is guaranteed, and
    nothing need diverge: a layer takes one step and LayerNorm resets the scale. A layer starts at z = y, which has
    negative entries and is not feasible, so that what a step did is a measurement: `ista_objective_ratio`.
    """
    return float(ista.step_size) * max_singular_value(ista.dictionary) ** 2


@torch.no_grad()
def ista_objective_ratio(ista: IstaStep, y_BND: Tensor, code_BND: Tensor) -> float | None:
    r"""F(z^+) / F(ReLU(y)): what the step made of its objective; below 1 it descended. No unit.

    F as in `ista_descent_ratio`, summed over all tokens; z^+ the layer's output, ReLU(y) the feasible point next to
    where the step starts. None if F(ReLU(y)) is 0, which takes y = 0.
    """
    start = _objective(ista, y_BND, functional.relu(y_BND))
    return _objective(ista, y_BND, code_BND) / start if start else None


@torch.no_grad()
def max_singular_value(matrix: Tensor) -> float:
    """The largest singular value, by 200 power iterations on A^T A; NaN for a matrix that is not finite.

    The start is the same on every call, and the result is a lower bound: within 1e-4 of the exact value for
    a dictionary at initialisation, within 2e-3 where many singular values crowd just below the largest.
    """
    start = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0))
    vector = start.to(matrix)
    for _ in range(POWER_ITERATIONS):
        vector = functional.normalize(matrix.T @ (matrix @ vector), dim=0, eps=torch.finfo(matrix.dtype).tiny)
    return float(torch.linalg.vector_norm(matrix @ vector))


@torch.no_grad()
def mutual_coherence(dictionary_DD: Tensor) -> float:
    """The largest |cosine| between two atoms, 0 (an orthogonal dictionary) to 1; Donoho and Huo 2001. No unit.

    An atom is a column: a code z stands for D z, the sum of z_j times column j. An atom of length 0 has cosine 0
    with every other.
    """
    atoms = functional.normalize(dictionary_DD, dim=0)
    cosines = (atoms.T @ atoms).fill_diagonal_(0)
    return float(cosines.abs().max())


@torch.no_grad()
def subspace_overlap(attention: SubspaceAttention) -> float | None:
    r"""How much two heads' subspaces share, 0 (orthogonal) to 1 (the same): the mean over pairs of heads of

    .. math:: |Q_h^T Q_k|_F^2 / P

    Q_h: an orthonormal basis of the span of U_h, D x P. It is the mean squared cosine of the P principal angles
    (Bjorck and Golub 1973). Random subspaces have P / D on average. None for one head. No unit.
    """
    heads = attention.num_heads
    if heads == 1:
        return None
    width = attention.qkv.weight.shape[1]
    bases_HDP = attention.qkv.weight.reshape(heads, -1, width).transpose(1, 2)
    q_HDP: Tensor = torch.linalg.qr(bases_HDP).Q
    q_DC = q_HDP.transpose(0, 1).flatten(1)
    squares = float((q_DC.T @ q_DC).square().sum())  # every pair twice, and P for every head with itself
    return (squares * heads / width - heads) / (heads * (heads - 1))


def _measure_attention(layer: CrateEncoderLayer | TransformerLayer, states: LayerStates) -> dict[str, float | None]:
    if not isinstance(layer.attn, SubspaceAttention):
        return {}
    assert states.pre_BHNP is not None
    assert states.post_BHNP is not None
    return {
        "coding_rate_pre_nats": float(coding_rate(states.pre_BHNP).mean()),
        "coding_rate_post_nats": float(coding_rate(states.post_BHNP).mean()),
        "subspace_overlap": subspace_overlap(layer.attn),
    }


def _measure_ista(layer: CrateEncoderLayer | TransformerLayer, states: LayerStates) -> dict[str, float | None]:
    if not isinstance(layer, CrateEncoderLayer):
        return {}
    return {
        "nonzero_fraction": float((states.code_BND != 0).float().mean()),
        "ista_descent_ratio": ista_descent_ratio(layer.ista),
        "ista_objective_ratio": ista_objective_ratio(layer.ista, states.ista_input_BND, states.code_BND),
        "dictionary_coherence": mutual_coherence(layer.ista.dictionary),
    }


def _objective(ista: IstaStep, y_BND: Tensor, z_BND: Tensor) -> float:
    residual_BND = y_BND - functional.linear(z_BND, ista.dictionary)
    return float(residual_BND.square().sum() / 2 + ista.lam * z_BND.abs().sum())


@contextmanager
def _frozen_float32(model: MaskedAutoencoder | Classifier) -> Iterator[MaskedAutoencoder | Classifier]:
    """The model in evaluation mode, without gradients and autocast; a float32 copy if it is of another type."""
    parameter = next(model.parameters())
    frozen = model if parameter.dtype == torch.float32 else copy.deepcopy(model).float()
    was_training = frozen.training
    frozen.eval()
    try:
        with torch.no_grad(), torch.autocast(parameter.device.type, enabled=False):
            yield frozen
    finally:
        frozen.train(was_training)
