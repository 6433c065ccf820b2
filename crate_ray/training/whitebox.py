"""The white-box measures of a run in training, on the same images every time.

In: the run's configuration. Out: values under `whitebox/`, comparable between steps because the batch is frozen: unmasked
validation images, spread over the split, held on the device. Only rank 0 has one. Sharing the work would need a
collective; this way no rank can hang in it, and the others wait for it in their next all-reduce (docs/numerics.md has
the cost, under 1% of training every 500 steps).
"""

import torch

from crate_ray.config import RunConfig
from crate_ray.data import load_index
from crate_ray.evaluation.spectrum import measure_latents
from crate_ray.evaluation.whitebox import as_metrics, measure_layers, patch_latents
from crate_ray.models import Classifier, MaskedAutoencoder
from crate_ray.training.evaluate import read_images, spread_ids
from crate_ray.training.objective import Normalise


class WhiteboxMonitor:
    """A frozen batch and what is measured on it.

    Args:
        config: Names the validation shards, and how many images to take from them.
        device: Where the model is.

    Raises:
        ConfigError: The validation shards cannot be read.
    """

    def __init__(self, config: RunConfig, *, device: torch.device) -> None:
        assert config.data.eval is not None
        ids = spread_ids(load_index(config.data.eval).num_samples, config.eval.whitebox_images)
        batches = read_images(config, config.data.eval, sample_ids=ids)
        images_BCHW = torch.cat([batch.images_BCHW[batch.weights_B > 0] for batch in batches])
        self._images_BCHW = Normalise(config.data.mean, config.data.std)(images_BCHW).to(device)

    def measure(self, model: MaskedAutoencoder | Classifier) -> dict[str, float]:
        """Values of every encoder layer and of the latents; what the family does not have is absent."""
        layers = measure_layers(model, self._images_BCHW)
        return as_metrics(layers, measure_latents(patch_latents(model, self._images_BCHW)))
