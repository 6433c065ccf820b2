"""Which lambda, step size and target a CRATE autoencoder's weights were trained with: the settings under which they work best.

In: weights of a CRATE autoencoder, whose state dict says nothing of all three, and held-out shards. Out: the loss on hidden
patches under each setting of a small grid, the same images and masks for all, and pictures. A model works best under the
function that it was trained as, so the smallest loss is consistent with the training setting. It is no proof: only the grid is
tried, a neighbour in it may do as well, and images of another kind than the training's may prefer another setting.

The losses of pixels and of patch-normalised pixels are in different units. Each is also given relative to the loss of
predicting the mean target, one value for each pixel of a patch, over the same hidden patches: below 1 the weights know more
than that mean, and settings of both units can be ranked together.

Shapes: B batch, C channels, H height, W width, N patches, M hidden patches, Q pixel values of a patch.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from crate_ray.config import ConfigError, DataConfig, ModelConfig
from crate_ray.data import load_index, read_all
from crate_ray.evaluation.pictures import encode_png, reconstruct, reconstruction_grid, to_pixels
from crate_ray.models import MaskedAutoencoder, create_model, load_weights, with_shared_weights
from crate_ray.models.patches import draw_masking, normalise_patches, patchify, take_tokens
from crate_ray.training.evaluate import spread_ids
from crate_ray.training.objective import Normalise
from crate_ray.training.precision import choose_device

LAMBDAS = (0.1, 0.5, 1.0, 5.0)
STEP_SIZES = (0.1, 1.0)
DEFAULT_IMAGES = 256
MIN_IMAGES = 2
"""A margin needs differences."""
NUM_PICTURED = 4
SENTENCE = "The best fit is consistent with, not proof of, the training setting."

Setting = tuple[float, float]
"""Lambda and step size."""

_BATCH = 64
_MEAN: tuple[float, float, float] = DataConfig.model_fields["mean"].default
_STD: tuple[float, float, float] = DataConfig.model_fields["std"].default


@dataclass(frozen=True)
class Fit:
    """How well the weights work under one setting."""

    ista_lambda: float
    ista_step_size: float
    norm_pix_loss: bool
    loss: float
    """Mean squared error on hidden patches, in the units of its target."""
    relative_loss: float
    """The loss over that of predicting the mean target."""
    behind: float
    """Relative loss above that of the best setting, mean over images."""
    behind_margin: float
    """Half of the 95% interval of `behind`, from its differences image by image; images count as independent."""

    @property
    def is_as_good(self) -> bool:
        """Whether these images cannot tell it from the best one."""
        return self.behind <= self.behind_margin

    @property
    def name(self) -> str:
        """Such as lambda_0.5-eta_0.1-norm_pix."""
        return f"lambda_{self.ista_lambda:g}-eta_{self.ista_step_size:g}-{'norm_pix' if self.norm_pix_loss else 'pixels'}"


@dataclass(frozen=True)
class Identification:
    """All settings on the same images and masks."""

    num_images: int
    mask_ratio: float
    fits: tuple[Fit, ...]
    """The smallest relative loss first."""
    pictures: Mapping[str, bytes]
    """A PNG for each setting's name: original, visible patches, reconstruction."""

    @property
    def best(self) -> Fit:
        """What is consistent with the training."""
        return self.fits[0]


@dataclass
class _Sums:
    """Sums over hidden patches of one target, in float64, and the loss of each image under each setting."""

    count: int = 0
    target_Q: Tensor | float = 0.0
    squared_Q: Tensor | float = 0.0
    losses: dict[Setting, list[Tensor]] = field(default_factory=dict)

    def add_target(self, target_BMQ: Tensor) -> None:
        self.count += target_BMQ.shape[0] * target_BMQ.shape[1]
        self.target_Q = self.target_Q + target_BMQ.double().sum((0, 1))
        self.squared_Q = self.squared_Q + target_BMQ.double().square().sum((0, 1))

    def add_loss(self, setting: Setting, error_BMQ: Tensor) -> None:
        self.losses.setdefault(setting, []).append(error_BMQ.double().square().mean((1, 2)).cpu())

    def mean_loss(self) -> float:
        """Loss of predicting the mean target: the variance, averaged over the pixels of a patch."""
        mean_Q, square_Q = torch.as_tensor(self.target_Q) / self.count, torch.as_tensor(self.squared_Q) / self.count
        return float((square_Q - mean_Q.square()).mean())


@torch.inference_mode()
def identify(
    weights: str | Mapping[str, Any],
    config: ModelConfig,
    url: str,
    *,
    num_images: int | None = DEFAULT_IMAGES,
    mean: tuple[float, float, float] = _MEAN,
    std: tuple[float, float, float] = _STD,
    progress: Callable[[int, int], None] | None = None,
) -> Identification:
    """Scores the weights under every setting of the grid, in float32.

    Args:
        weights: What `load_weights` takes: a CRATE autoencoder with its decoder.
        config: Its architecture; `ista_lambda`, `ista_step_size` and `norm_pix_loss` are those looked for and are not read.
        url: Shards that the weights were not trained on, with their index.
        num_images: Images to look at, at least 2, evenly over the index; None for all.
        mean: Per channel, of pixels in [0, 1], as the training normalised them.
        std: Likewise.
        progress: Is told images done and in all, each counted once a setting.

    Raises:
        ConfigError: Weights that do not fit, that have no lambda, or that have no decoder; fewer than two images.
    """
    ids = spread_ids(load_index(url).num_samples, num_images)
    if len(ids) < MIN_IMAGES:
        raise ConfigError(
            f"--identify compares settings image by image and needs at least {MIN_IMAGES} images; here {len(ids)} of '{url}'"
        )
    models = _models(weights, config)
    device = models[0].pos_embed.device
    normalise = Normalise(mean, std).to(device)
    sums = {False: _Sums(), True: _Sums()}
    done = 0
    pictured: tuple[Tensor, Tensor] | None = None
    for batch in read_all(url, batch_size=_BATCH, image_size=config.image_size, sample_ids=ids, noise_size=config.num_patches):
        assert batch.noise_BN is not None
        images_BCHW, noise_BN = normalise(batch.images_BCHW.to(device)), batch.noise_BN.to(device)
        pictured = pictured or (images_BCHW[:NUM_PICTURED], noise_BN[:NUM_PICTURED])
        for model in models:
            _add(sums, model, images_BCHW, noise_BN, is_first=model is models[0])
            done += len(images_BCHW)
            if progress is not None:
                progress(done, len(ids) * len(models))
    assert pictured is not None
    fits = _rank(sums)
    by_setting = {_setting(model): model for model in models}
    pictures = {
        fit.name: _picture(by_setting[fit.ista_lambda, fit.ista_step_size], fit, *pictured, mean=mean, std=std) for fit in fits
    }
    return Identification(len(ids), config.mask_ratio, fits, pictures)


def _models(weights: str | Mapping[str, Any], config: ModelConfig) -> list[MaskedAutoencoder]:
    """One model for each lambda and step size; all share one set of tensors."""
    base = create_model(config)
    if not config.has_ista or not isinstance(base, MaskedAutoencoder):
        given = " ".join([f"family {config.family}", *config.ablation])
        raise ConfigError(f"--identify looks for lambda and step size of a CRATE autoencoder ({given} is given)")
    if config.ista_learnable != "none":
        raise ConfigError("--identify: with ista_learnable = layer, lambda and step size are among the weights already")
    if not load_weights(base, weights).has_decoder:
        raise ConfigError("--identify compares reconstructions, and these weights have no decoder; take the file that has one")
    base.eval().to(choose_device("auto", 0))
    grid = itertools.product(LAMBDAS, STEP_SIZES)
    return [with_shared_weights(base, ista_lambda=lam, ista_step_size=eta) for lam, eta in grid]


def _add(
    sums: Mapping[bool, _Sums], model: MaskedAutoencoder, images_BCHW: Tensor, noise_BN: Tensor, *, is_first: bool
) -> None:
    """Counts one batch under one setting; both targets from the same forward pass."""
    output = model(images_BCHW, noise_BN)
    masked_BM = draw_masking(noise_BN, model.config.num_kept).masked
    pred_BMQ = take_tokens(output.pred, masked_BM)
    patches_BMQ = take_tokens(patchify(images_BCHW, model.config.patch_size), masked_BM)
    for norm_pix_loss, its_sums in sums.items():
        target_BMQ = normalise_patches(patches_BMQ) if norm_pix_loss else patches_BMQ
        if is_first:
            its_sums.add_target(target_BMQ)
        its_sums.add_loss(_setting(model), pred_BMQ - target_BMQ)


def _setting(model: MaskedAutoencoder) -> Setting:
    return model.config.per_layer("ista_lambda")[0], model.config.per_layer("ista_step_size")[0]


def _rank(sums: Mapping[bool, _Sums]) -> tuple[Fit, ...]:
    """All settings of both targets, the smallest relative loss first."""
    losses = {(s, norm_pix): torch.cat(parts) for norm_pix, its_sums in sums.items() for s, parts in its_sums.losses.items()}
    relative = {key: losses_B / sums[key[1]].mean_loss() for key, losses_B in losses.items()}
    best = min(relative, key=lambda key: float(relative[key].mean()))
    fits = []
    for key, relative_B in sorted(relative.items(), key=lambda item: float(item[1].mean())):
        behind_B = relative_B - relative[best]
        margin = 1.96 * float(behind_B.std()) / len(behind_B) ** 0.5
        means = (float(losses[key].mean()), float(relative_B.mean()), float(behind_B.mean()))
        fits.append(Fit(*key[0], key[1], *means, margin))
    return tuple(fits)


def _picture(
    model: MaskedAutoencoder,
    fit: Fit,
    images_BCHW: Tensor,
    noise_BN: Tensor,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> bytes:
    made = reconstruct(with_shared_weights(model, norm_pix_loss=fit.norm_pix_loss), images_BCHW, noise_BN)
    columns = [to_pixels(images, mean=mean, std=std) for images in (images_BCHW, made.visible, made.pasted)]
    return encode_png(reconstruction_grid(columns[0], columns[1], columns[2:]))
