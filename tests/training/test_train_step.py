"""One step over padded and split rows has the gradient of the plain mean loss over the global batch."""

from collections.abc import Callable
from dataclasses import astuple

import pytest
import torch

from crate_ray.config import RunConfig
from crate_ray.data import Batch
from crate_ray.models import MaskedAutoencoder, create_model
from crate_ray.training.objective import Normalise
from crate_ray.training.step import TrainStep, Votes

ROWS, PADDED = 6, 8
LoadTiny = Callable[..., RunConfig]
RECIPES = pytest.mark.parametrize("recipe", ["digits_crate_mae", "digits_mae"])


def draw_batch(seed: int = 0) -> Batch:
    """Six rows and two that pad: the padding holds other images, which must not count."""
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        images_BCHW=torch.randint(0, 256, (PADDED, 3, 16, 16), dtype=torch.uint8, generator=generator),
        labels_B=torch.zeros(PADDED, dtype=torch.int64),
        noise_BN=torch.rand(PADDED, 16, generator=generator),
        weights_B=(torch.arange(PADDED) < ROWS).float(),
        sample_ids_B=torch.arange(PADDED),
        epochs_B=torch.zeros(PADDED, dtype=torch.int64),
        cursor_after=ROWS,
    )


def build(config: RunConfig) -> MaskedAutoencoder:
    torch.manual_seed(3)
    model = create_model(config.model)
    assert isinstance(model, MaskedAutoencoder)
    return model


def plain_loss_and_gradient(config: RunConfig, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """The published full forward pass on the counted rows, differentiated as it stands."""
    model = build(config)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (config.data.mean, config.data.std))
    images = (batch.images_BCHW[:ROWS].float() / 255 - mean) / std
    assert batch.noise_BN is not None
    loss = model(images, batch.noise_BN[:ROWS]).loss
    names, parameters = zip(*model.named_parameters(), strict=True)
    return float(loss.detach()), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def norm(gradients: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([g.flatten() for g in gradients.values()]).norm())


@RECIPES
@pytest.mark.parametrize("micro_batch", ["null", "1", "3", "5", "64"])
def test_the_update_is_that_of_the_plain_mean_loss(recipe: str, micro_batch: str, load_tiny: LoadTiny) -> None:
    config = load_tiny(f"train.global_batch={ROWS}", f"train.micro_batch={micro_batch}", "train.clip_norm=null", recipe=recipe)
    batch = draw_batch()
    loss, gradients = plain_loss_and_gradient(config, batch)
    model = build(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = TrainStep(model, torch.optim.SGD(model.parameters(), lr=9.0, fused=True), config, precision="float32")
    outcome = step(batch, lr=1.0).read()  # the step sets its own rate: with 1, the update is the gradient
    # float32: sums of at most 8 rows in another order, at weights of order 1.
    assert outcome.loss == pytest.approx(loss, rel=1e-5)
    assert outcome.grad_norm == pytest.approx(norm(gradients), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(before[name] - parameter.detach(), gradients[name], rtol=1e-4, atol=2e-6, msg=name)


def test_clipping_scales_the_whole_gradient_and_reports_its_norm_before(load_tiny: LoadTiny) -> None:
    config = load_tiny(f"train.global_batch={ROWS}", "train.clip_norm=0.1")
    batch = draw_batch()
    _, gradients = plain_loss_and_gradient(config, batch)
    assert norm(gradients) > 0.2
    model = build(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    outcome = TrainStep(model, torch.optim.SGD(model.parameters(), fused=True), config, precision="float32")(
        batch, lr=1.0
    ).read()
    updates = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    assert outcome.grad_norm == pytest.approx(norm(gradients), rel=1e-5)
    assert norm(updates) == pytest.approx(0.1, rel=1e-3)
    for name, update in updates.items():
        torch.testing.assert_close(update, gradients[name] * (0.1 / norm(gradients)), rtol=1e-3, atol=2e-6)


def test_no_gradient_is_carried_into_the_next_step(load_tiny: LoadTiny) -> None:
    config = load_tiny(f"train.global_batch={ROWS}")
    model = build(config)
    step = TrainStep(model, torch.optim.SGD(model.parameters(), fused=True), config, precision="float32")
    first, second = (step(draw_batch(), lr=0.0).read() for _ in range(2))
    assert first == second


def test_votes_to_stop_and_to_save_come_back_with_the_loss(load_tiny: LoadTiny) -> None:
    config = load_tiny(f"train.global_batch={ROWS}")
    model = build(config)
    step = TrainStep(model, torch.optim.SGD(model.parameters(), fused=True), config, precision="float32")
    for votes in (Votes(), Votes(stop=True), Votes(save=True), Votes(replaced=3), Votes(written=2)):
        outcome = step(draw_batch(), lr=0.0, votes=votes).read()
        assert (outcome.stop, outcome.save, outcome.replaced, outcome.written) == astuple(votes)


@RECIPES
def test_bfloat16_gives_the_float32_loss_within_its_rounding(recipe: str, load_tiny: LoadTiny) -> None:
    config = load_tiny(f"train.global_batch={ROWS}", recipe=recipe)
    losses = {}
    for precision in ("float32", "bfloat16"):
        model = build(config)
        step = TrainStep(model, torch.optim.SGD(model.parameters(), fused=True), config, precision=precision)
        losses[precision] = step(draw_batch(), lr=0.0).read().loss
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=2e-2)  # 8 bits of mantissa: 4e-3 an operation


def test_pixels_are_scaled_to_zero_mean_and_unit_spread() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(1, 3, 16, 16)
    expected = torch.stack([(torch.arange(256) / 255 - m) / s for m, s in zip(mean, std, strict=True)]).view(1, 3, 16, 16)
    torch.testing.assert_close(Normalise(mean, std)(images), expected, rtol=1e-5, atol=1e-6)
