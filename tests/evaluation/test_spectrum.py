"""Effective rank and spectral decay against numpy in float64 and against spectra that are known."""

import numpy as np
import pytest
import torch

from crate_ray.evaluation.spectrum import LatentMeasures, alpha_req, measure_latents, rankme


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(variances: torch.Tensor, rows: int = 400) -> torch.Tensor:
    """Centred float32 features whose covariance has exactly these eigenvalues, in rotated axes."""
    cloud = draw(rows, len(variances)).double()
    axes, _ = torch.linalg.qr(cloud - cloud.mean(dim=0))
    rotation, _ = torch.linalg.qr(draw(len(variances), len(variances), seed=1).double())
    return ((axes * variances.double().sqrt()) @ rotation).float()


@pytest.mark.parametrize(("rows", "width"), [(200, 32), (20, 64)])
def test_both_numbers_equal_a_float64_computation_on_singular_values(rows: int, width: int) -> None:
    latent = draw(rows, width) * torch.linspace(0.1, 3, width) + 0.5
    x = latent.double().numpy()
    singular = np.linalg.svd(x, compute_uv=False)
    share = singular / singular.sum() + 1e-7
    assert rankme(latent) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)

    variance = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
    last = min(100, int((variance > 1e-10 * variance[0]).sum()))
    rank = np.arange(4, last + 1)
    slope, _ = np.polyfit(np.log(rank), np.log(variance[3:last]), 1, w=np.sqrt(1 / rank))
    assert alpha_req(latent) == pytest.approx(-slope, rel=1e-6)
    assert measure_latents(latent) == LatentMeasures(rankme(latent), alpha_req(latent))


@pytest.mark.parametrize("used", [1, 3, 24])
def test_directions_that_share_the_features_evenly_are_counted(used: int) -> None:
    even = torch.cat([torch.ones(used), torch.zeros(24 - used)])
    assert rankme(with_spectrum(even)) == pytest.approx(used, rel=1e-4)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("width", [12, 64, 160])
def test_a_power_law_gives_its_exponent(alpha: float, width: int) -> None:
    power_law = torch.arange(1, width + 1, dtype=torch.float64) ** -alpha
    assert alpha_req(with_spectrum(power_law) + 7.0) == pytest.approx(alpha, rel=1e-3)  # the mean is taken off


def test_the_first_three_ranks_do_not_enter_the_decay() -> None:
    power_law = torch.arange(1, 65, dtype=torch.float64) ** -1.5
    power_law[:3] *= 50
    assert alpha_req(with_spectrum(power_law)) == pytest.approx(1.5, rel=1e-3)


def test_a_spectrum_too_short_to_fit_has_no_decay() -> None:
    assert alpha_req(with_spectrum(torch.ones(7))) is None
    assert alpha_req(with_spectrum(torch.ones(8))) == pytest.approx(0, abs=1e-4)
    assert alpha_req(with_spectrum(torch.cat([torch.ones(7), torch.zeros(20)]))) is None


@pytest.mark.parametrize("latent", [torch.zeros(9, 8), torch.full((9, 8), torch.nan), torch.full((9, 8), torch.inf)])
def test_features_without_a_direction_or_a_number_have_neither(latent: torch.Tensor) -> None:
    assert measure_latents(latent) == LatentMeasures(None, None)
