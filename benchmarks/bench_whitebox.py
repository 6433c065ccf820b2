"""What does the white box cost a run that looks into it every 500 steps? One measurement against one training step.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_whitebox

Prints the median seconds of both, taking turns, and the share of training time: measurement / (500 x step). The measurement
is that of the loop: 16 images, float32, every layer and the latents. The steps are full optimizer steps at the precision that
the loop would choose, on random pixels; reading images is left out, which makes the share larger than it is.
"""

import statistics
import time
from collections.abc import Callable

import torch

from crate_ray.config import EvalConfig, RunConfig
from crate_ray.data import Batch
from crate_ray.evaluation.spectrum import measure_latents
from crate_ray.evaluation.whitebox import as_metrics, measure_layers, patch_latents
from crate_ray.models import create_model
from crate_ray.training.optimizer import create_optimizer
from crate_ray.training.precision import choose_device, resolve_precision
from crate_ray.training.step import TrainStep

ROUNDS = 5
EVAL = EvalConfig()
# The ImageNet shapes step on few images: a small step makes the share a large one.
CASES = {
    "digits_crate_mae": ["digits_crate_mae"],
    "digits_mae": ["digits_mae"],
    "crate_mae_small": ["imagenet_crate_mae_base", "model.preset=crate_mae_small", "train.global_batch=16"],
}


def main() -> None:
    """Every case in turn."""
    device = choose_device("auto", local_rank=0)
    precision = resolve_precision("auto", device.type)
    every = EVAL.whitebox_every_steps
    assert every is not None
    print(f"torch {torch.__version__}, {device.type}, {torch.get_num_threads()} threads, {precision}, every {every} steps")
    for name, (recipe, *overrides) in CASES.items():
        config = RunConfig.load(recipe, [*overrides, "eval.every_steps=null", "train.micro_batch=null"])
        step, measurement = interleave(*create_calls(config, device, precision))
        print(
            f"{name:16} batch {config.train.global_batch:3}  step {step:6.3f} s  "
            f"measurement of {EVAL.whitebox_images} images {measurement:6.3f} s  share {measurement / (every * step):.3%}"
        )


def create_calls(config: RunConfig, device: torch.device, precision: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """One training step, and one measurement, of one model; both wait for the device."""
    model = create_model(config.model).to(device)
    train_step = TrainStep(model, create_optimizer(model, config.optimizer, lr=1e-4), config, precision=precision)
    batch = draw_batch(config)
    size = config.model.image_size
    images_BCHW = torch.randn(EVAL.whitebox_images, 3, size, size, device=device)

    def measure() -> dict[str, float]:
        return as_metrics(measure_layers(model, images_BCHW), measure_latents(patch_latents(model, images_BCHW)))

    return lambda: train_step(batch, lr=1e-4).read(), measure


def draw_batch(config: RunConfig) -> Batch:
    """A global batch of random pixels."""
    rows, size = config.train.global_batch, config.model.image_size
    return Batch(
        images_BCHW=torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8),
        labels_B=torch.zeros(rows, dtype=torch.int64),
        noise_BN=torch.rand(rows, config.model.num_patches),
        weights_B=torch.ones(rows),
        sample_ids_B=torch.arange(rows),
        epochs_B=torch.zeros(rows, dtype=torch.int64),
        cursor_after=rows,
    )


def interleave(*calls: Callable[[], object]) -> list[float]:
    """Median seconds of each call over the rounds after a first one."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS + 1):
        for taken, call in zip(seconds, calls, strict=True):
            started = time.perf_counter()
            call()
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken[1:]) for taken in seconds]


if __name__ == "__main__":
    main()
