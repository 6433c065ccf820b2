"""What is known of a run before it starts, by the names that constraints and objectives use. Arithmetic alone.

In: a RunConfig and the number of training images, where known. Out: parameters in millions, GFLOPs of one image, PFLOPs of the
whole training; the same definitions as the `final/` values of a finished run.
"""

from crate_ray.config import RunConfig
from crate_ray.models.cost import BACKWARD_FACTOR, count_parameters, encode_flops, forward_flops, training_flops_per_image


def quantities(config: RunConfig, *, num_samples: int | None = None) -> dict[str, float]:
    """The derived quantities of a run.

    Args:
        config: The run.
        num_samples: Images of the training data; without them, a length in epochs leaves train_pflops out.

    Returns:
        params_m and encoder_params_m, trainable parameters in millions; gflops, forward pass of one image in training;
        encode_gflops, features of one whole image; train_pflops, forward and backward of every image of the run.
    """
    parameters, forward = count_parameters(config.model), forward_flops(config.model)
    values = {
        "params_m": parameters.trainable / 1e6,
        "encoder_params_m": parameters.encoder / 1e6,
        "gflops": forward / 1e9,
        "encode_gflops": encode_flops(config.model) / 1e9,
    }
    steps = config.train.num_steps(num_samples)
    if steps is not None:
        values["train_pflops"] = BACKWARD_FACTOR * forward * steps * config.train.global_batch / 1e15
    return values


def flops_per_step(config: RunConfig) -> int:
    """Forward and backward of one global batch."""
    return training_flops_per_image(config.model) * config.train.global_batch
