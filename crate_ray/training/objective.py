"""What a task minimises and what it reports: all that differs between pretraining and classification.

In: a model and batches. Out: a scalar to minimise, and numbers for each image to evaluate by. The step and the loop know
no task; they ask the objective what a batch's targets are, and what is measured.

Shapes: B and M rows, C x H x W image, N patches, K classes.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from crate_ray.config import RunConfig
from crate_ray.data import Batch
from crate_ray.models import Classifier, MaskedAutoencoder
from crate_ray.training.mixing import PairMixing


class Normalise(nn.Module):
    """Pixels in 0 to 255 to the model's input: (x / 255 - mean) / std, a channel at a time."""

    multiplier: Tensor
    offset: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        scale = torch.tensor(std).view(1, -1, 1, 1)
        self.register_buffer("multiplier", 1 / (255 * scale), persistent=False)
        self.register_buffer("offset", -torch.tensor(mean).view(1, -1, 1, 1) / scale, persistent=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) uint8 or float to float32."""
        return images_BCHW.float() * self.multiplier + self.offset


class Objective(nn.Module):
    """Pixels, targets and row weights to one scalar: what is compiled and replicated.

    Args:
        model: The model to train or evaluate.
        config: Its task, pixel statistics, and what belongs to the task.
    """

    measures: ClassVar[tuple[str, ...]] = ("loss",)
    """Names of what `measure` gives for each image."""

    def __init__(self, model: nn.Module, config: RunConfig) -> None:
        super().__init__()
        self.model = model
        self.normalise = Normalise(config.data.mean, config.data.std)

    def forward(self, images_MCHW: Tensor, targets: Tensor, weights_M: Tensor) -> Tensor:
        """Sum over rows of weight times loss."""
        return (self.losses(images_MCHW, targets).float() * weights_M).sum()

    def targets(self, batch: Batch) -> Tensor:
        """What `forward` takes beside images and weights, one row an image."""
        raise NotImplementedError

    def augment(self, images_MCHW: Tensor, targets: Tensor, *, cursor: int) -> tuple[Tensor, Tensor]:
        """What is done on the device to some rows of a training batch, before `forward`; nothing by default."""
        return images_MCHW, targets

    def losses(self, images_MCHW: Tensor, targets: Tensor) -> Tensor:
        """Each row's loss, (M,)."""
        raise NotImplementedError

    def measure(self, images_BCHW: Tensor, targets: Tensor) -> Tensor:
        """The `measures` of each image, (B, len(measures))."""
        return self.losses(images_BCHW, targets).unsqueeze(1)


class Reconstruction(Objective):
    """Pretraining: mean squared error on hidden patches; the target is the noise that hides them."""

    model: MaskedAutoencoder

    def targets(self, batch: Batch) -> Tensor:
        """Mask noise, (B, N)."""
        assert batch.noise_BN is not None
        return batch.noise_BN

    def losses(self, images_MCHW: Tensor, targets: Tensor) -> Tensor:
        """See Objective."""
        return self.model.losses(self.normalise(images_MCHW), targets)


class Classification(Objective):
    """Cross-entropy, with label smoothing and mixing in training; without either in `measure`, which adds top-1."""

    measures: ClassVar[tuple[str, ...]] = ("loss", "top1")
    model: Classifier

    def __init__(self, model: Classifier, config: RunConfig) -> None:
        super().__init__(model, config)
        assert config.model.num_classes is not None
        self._smoothing = config.train.label_smoothing or 0.0
        self._mixing = (
            PairMixing(config.data, num_classes=config.model.num_classes, seed=config.train.seed)
            if config.data.is_mixing
            else None
        )

    def targets(self, batch: Batch) -> Tensor:
        """Class of each image, (B,)."""
        return batch.labels_B

    def augment(self, images_MCHW: Tensor, targets: Tensor, *, cursor: int) -> tuple[Tensor, Tensor]:
        """Mixes the pairs of rows, where the run mixes; targets become (M, K)."""
        return (images_MCHW, targets) if self._mixing is None else self._mixing(images_MCHW, targets, cursor=cursor)

    def losses(self, images_MCHW: Tensor, targets: Tensor) -> Tensor:
        """See Objective; targets are classes (M,) or probabilities (M, K)."""
        logits_MK = self.model(self.normalise(images_MCHW)).float()
        return functional.cross_entropy(logits_MK, targets, reduction="none", label_smoothing=self._smoothing)

    def measure(self, images_BCHW: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy without smoothing, and 1 where the largest logit is the right one."""
        logits_BK = self.model(self.normalise(images_BCHW)).float()
        losses_B = functional.cross_entropy(logits_BK, targets, reduction="none")
        return torch.stack([losses_B, (logits_BK.argmax(dim=1) == targets).float()], dim=1)


def create_objective(model: MaskedAutoencoder | Classifier, config: RunConfig) -> Objective:
    """The objective of the run's task, on the model's device."""
    device = next(model.parameters()).device
    if isinstance(model, Classifier):
        return Classification(model, config).to(device)
    return Reconstruction(model, config).to(device)


def noise_size(config: RunConfig) -> int:
    """Length of the mask noise that the task needs of each image; 0 for none."""
    return config.model.num_patches if config.task == "pretrain" else 0
