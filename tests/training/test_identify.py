"""Weights trained under a known setting are recognised by it."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crate_ray.config import ConfigError, ModelConfig
from crate_ray.data import build_source, read_all
from crate_ray.models import MaskedAutoencoder, create_model
from crate_ray.training.identify import LAMBDAS, STEP_SIZES, identify
from crate_ray.training.objective import Normalise

SHAPE: dict[str, Any] = {
    "family": "crate",
    "image_size": 16,
    "patch_size": 4,
    "width": 32,
    "num_heads": 2,
    "encoder_depth": 2,
    "decoder_depth": 1,
}
HALF: tuple[float, float, float] = (0.5, 0.5, 0.5)


def build(**keys: Any) -> MaskedAutoencoder:
    torch.manual_seed(0)
    model = create_model(ModelConfig.parse({**SHAPE, **keys}))
    assert isinstance(model, MaskedAutoencoder)
    return model


def pixels(url: Path) -> tuple[Tensor, Tensor]:
    (batch,) = read_all(str(url), batch_size=400, image_size=16, noise_size=16)
    assert batch.noise_BN is not None
    return Normalise(HALF, HALF)(batch.images_BCHW), batch.noise_BN


def train(model: MaskedAutoencoder, url: Path, *, steps: int) -> None:
    images, _ = pixels(url)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = images[torch.randint(len(images), (48,))]
        model.losses(rows, torch.rand(48, 16)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("lam", "eta", "norm_pix_loss"), [(5.0, 0.1, True), (5.0, 1.0, False)])
def test_the_setting_that_weights_were_trained_with_fits_best(
    shards: Path, lam: float, eta: float, norm_pix_loss: bool
) -> None:
    setting = {"ista_lambda": lam, "ista_step_size": eta, "norm_pix_loss": norm_pix_loss}
    model = build(**setting)
    train(model, shards / "train", steps=100)
    found = identify(model.state_dict(), build().config, str(shards / "validation"), mean=HALF, std=HALF)
    best = found.best
    assert {key: getattr(best, key) for key in setting} == setting
    assert best.relative_loss < 1
    assert best.behind == best.behind_margin == 0


@pytest.mark.slow
def test_step_size_and_target_are_always_found_and_small_lambdas_may_be_taken_for_each_other(tmp_path: Path) -> None:
    """Below lambda 5 the thresholds are small beside the codes, so that the weights work nearly as well under any of them."""
    build_source("shapes:480", str(tmp_path), image_size=16)
    settings = list(itertools.product(LAMBDAS, STEP_SIZES, (False, True)))
    exact = 0
    for lam, eta, norm_pix_loss in settings:
        model = build(ista_lambda=lam, ista_step_size=eta, norm_pix_loss=norm_pix_loss)
        train(model, tmp_path / "train", steps=200)
        best = identify(model.state_dict(), build().config, str(tmp_path / "validation"), mean=HALF, std=HALF).best
        assert (best.ista_step_size, best.norm_pix_loss) == (eta, norm_pix_loss)
        assert (best.ista_lambda == 5) == (lam == 5)
        exact += best.ista_lambda == lam
    assert exact >= 12  # 14 of 16 where this was written; 4 by chance


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return build().state_dict()


def test_every_loss_is_the_models_own(shards: Path, weights: dict[str, Tensor]) -> None:
    images, noise = pixels(shards / "validation")
    found = identify(weights, build().config, str(shards / "validation"), mean=HALF, std=HALF)
    assert len(found.fits) == 2 * len(LAMBDAS) * len(STEP_SIZES)
    for fit in found.fits:
        model = build(ista_lambda=fit.ista_lambda, ista_step_size=fit.ista_step_size, norm_pix_loss=fit.norm_pix_loss)
        with torch.no_grad():
            losses = model.losses(images, noise)
        assert fit.loss == pytest.approx(float(losses.mean()), rel=1e-5), fit.name


def test_losses_are_put_beside_that_of_the_mean_target(shards: Path, weights: dict[str, Tensor]) -> None:
    images, noise = pixels(shards / "validation")
    found = identify(weights, build().config, str(shards / "validation"), mean=HALF, std=HALF)
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(len(images), 16, 48).double()
    hidden = patches[noise.argsort(dim=1).argsort(dim=1) >= 4]
    normed = (hidden - hidden.mean(1, keepdim=True)) / (hidden.var(1, keepdim=True) + 1e-6).sqrt()
    for fit in found.fits:
        target = normed if fit.norm_pix_loss else hidden
        assert fit.loss / fit.relative_loss == pytest.approx(float(target.var(0, correction=0).mean()), rel=1e-5)


def test_fits_are_ranked_with_a_margin_and_a_picture_each(shards: Path, weights: dict[str, Tensor]) -> None:
    found = identify(weights, build().config, str(shards / "validation"), num_images=3, mean=HALF, std=HALF)
    assert found.num_images == 3
    assert all(a.relative_loss <= b.relative_loss for a, b in itertools.pairwise(found.fits))
    for fit in found.fits:
        assert fit.behind == pytest.approx(fit.relative_loss - found.best.relative_loss, abs=1e-12)
        assert math.isfinite(fit.behind_margin)
        assert found.pictures[fit.name].startswith(b"\x89PNG")


def test_progress_counts_images_once_a_setting(shards: Path, weights: dict[str, Tensor]) -> None:
    seen = []
    identify(weights, build().config, str(shards / "validation"), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(6 * i, 48) for i in range(1, 9)]


@pytest.mark.parametrize("num_images", [0, 1])
def test_one_image_gives_no_margin_and_is_refused(shards: Path, weights: dict[str, Tensor], num_images: int) -> None:
    with pytest.raises(ConfigError, match=f"needs at least 2 images; here {num_images} of"):
        identify(weights, build().config, str(shards / "validation"), num_images=num_images)


def test_weights_without_a_decoder_are_refused(shards: Path, weights: dict[str, Tensor]) -> None:
    encoder = {k: v for k, v in weights.items() if not k.startswith("decoder_") and k != "mask_token"}
    with pytest.raises(ConfigError, match="have no decoder"):
        identify(encoder, build().config, str(shards / "validation"))


@pytest.mark.parametrize(
    ("keys", "says"),
    [({"family": "vit"}, "of a CRATE autoencoder"), ({"ista_learnable": "layer"}, "among the weights already")],
)
def test_a_model_without_unknown_lambda_is_refused(
    shards: Path, weights: dict[str, Tensor], keys: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        identify(weights, build(**keys).config, str(shards / "validation"))
