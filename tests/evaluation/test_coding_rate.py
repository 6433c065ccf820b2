"""The coding rate against the published code, against singular values in float64, and between its bounds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from crate_ray.evaluation.coding_rate import coding_rate, coding_rate_ceiling, coding_rate_floor

GOLDEN = Path(__file__).parents[1] / "golden" / "coding_rate.safetensors"
SHAPES = pytest.mark.parametrize(("heads", "tokens", "width"), [(4, 17, 12), (4, 12, 17), (2, 65, 32), (1, 5, 5), (3, 1, 8)])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rate_by_singular_values(tokens_BHNP: torch.Tensor, eps: float = 0.01) -> np.ndarray:
    """ln det(I + a X X^T) is the sum of ln(1 + a s^2): no Gram matrix, no determinant."""
    x = tokens_BHNP.double().numpy()
    lengths = np.sqrt((x**2).sum(-1, keepdims=True))
    x = np.divide(x, lengths, out=np.zeros_like(x), where=lengths > 0)
    singular = np.linalg.svd(x, compute_uv=False)
    return 0.5 * np.log1p(x.shape[-1] / (x.shape[-2] * eps) * singular**2).sum((-2, -1))


def test_the_rate_is_the_published_one() -> None:
    golden = load_file(GOLDEN)
    rates = coding_rate(golden["subspace_tokens_BHNP"])
    assert float(rates.mean()) == pytest.approx(golden["mean_nats"].item(), rel=1e-6)
    assert float(rates.std()) == pytest.approx(golden["std_nats"].item(), rel=1e-4)


@SHAPES
def test_either_gram_matrix_gives_the_float64_rate(heads: int, tokens: int, width: int) -> None:
    x = draw(3, heads, tokens, width) * torch.linspace(0.01, 100, tokens).unsqueeze(-1)
    np.testing.assert_allclose(coding_rate(x), rate_by_singular_values(x), rtol=2e-6)
    np.testing.assert_allclose(coding_rate(x, eps=0.5), rate_by_singular_values(x, eps=0.5), rtol=2e-6)


@SHAPES
def test_rates_of_any_tokens_lie_between_floor_and_ceiling(heads: int, tokens: int, width: int) -> None:
    floor, ceiling = coding_rate_floor(heads, width), coding_rate_ceiling(heads, tokens, width)
    for seed in range(20):
        scales = draw(width, seed=seed + 1).mul(3).exp()  # from round clouds to nearly flat ones
        rates = coding_rate(draw(8, heads, tokens, width, seed=seed) * scales)
        assert bool((rates >= floor * (1 - 1e-4)).all())
        assert bool((rates <= ceiling * (1 + 1e-5)).all())


@SHAPES
def test_tokens_on_one_line_reach_the_floor(heads: int, tokens: int, width: int) -> None:
    line = draw(1, heads, 1, width) * draw(1, heads, tokens, 1, seed=1)
    # Rank one is the worst conditioned matrix there is, 1 + P / eps: float32 keeps four digits of it.
    assert float(coding_rate(line)) == pytest.approx(coding_rate_floor(heads, width), rel=1e-4)


@SHAPES
def test_tokens_that_fill_the_subspace_evenly_reach_the_ceiling(heads: int, tokens: int, width: int) -> None:
    rows = tokens - tokens % width or tokens  # whole turns through the axes, or fewer tokens than axes
    even = torch.eye(width)[torch.arange(rows) % width].expand(1, heads, rows, width)
    assert float(coding_rate(even)) == pytest.approx(coding_rate_ceiling(heads, rows, width), rel=1e-5)


def test_with_fewer_tokens_than_coordinates_the_form_for_many_tokens_is_never_reached() -> None:
    assert coding_rate_ceiling(4, 12, 17) < 4 * 17 / 2 * np.log1p(1 / 0.01)
    assert coding_rate_ceiling(4, 17, 12) == pytest.approx(4 * 12 / 2 * np.log1p(1 / 0.01))


def test_bounds_of_the_published_sizes() -> None:
    sizes = {(6, 64): (26.3, 886), (12, 48): (50.9, 1329), (12, 64): (52.6, 1772)}
    for (heads, width), (floor, ceiling) in sizes.items():
        assert coding_rate_floor(heads, width) == pytest.approx(floor, abs=0.05)
        assert coding_rate_ceiling(heads, 197, width) == pytest.approx(ceiling, abs=0.5)


def test_only_directions_count() -> None:
    x = draw(2, 3, 9, 6)
    rotation, _ = torch.linalg.qr(draw(6, 6, seed=1))
    lengths = draw(2, 3, 9, 1, seed=2).exp()
    torch.testing.assert_close(coding_rate(x * lengths @ rotation), coding_rate(x), rtol=1e-5, atol=0)


def test_a_token_of_length_zero_adds_nothing_but_counts_as_one() -> None:
    x = draw(2, 3, 9, 6)
    x[:, :, 4] = 0
    np.testing.assert_allclose(coding_rate(x), rate_by_singular_values(x), rtol=2e-6)
    assert coding_rate(torch.zeros(2, 3, 9, 6)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_none_shows_in_its_own_image_only(bad: float) -> None:
    x = draw(3, 2, 9, 6)
    x[1, 0, 3, 2] = bad
    rates = coding_rate(x)
    assert rates.isnan().tolist() == [False, True, False]


def test_the_rate_is_float32_whatever_surrounds_it() -> None:
    x = draw(2, 2, 33, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = coding_rate(x)
    assert torch.equal(inside, coding_rate(x))
    half = coding_rate(x.bfloat16())
    assert half.dtype == torch.float32
    assert torch.equal(half, coding_rate(x.bfloat16().float()))
