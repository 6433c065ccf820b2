"""Is bfloat16 autocast faster than float32 for a training step on this device? Interleaved, medians.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_precision

Prints images/s of a full optimizer step of the digits models and the ratio pair by pair. One CPU thread.
"""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from crate_ray.config import RunConfig
from crate_ray.data import Batch
from crate_ray.models import create_model
from crate_ray.training.optimizer import create_optimizer
from crate_ray.training.step import TrainStep

ROUNDS = 12
ROWS = 64


def make_step(config: RunConfig, precision: str) -> Callable[[], object]:
    """A full optimizer step of a recipe on one batch of noise."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, model_config = config.train.global_batch, config.model
    batch = Batch(
        images_BCHW=torch.randint(0, 256, (rows, 3, model_config.image_size, model_config.image_size), dtype=torch.uint8),
        labels_B=torch.zeros(rows, dtype=torch.int64),
        noise_BN=torch.rand(rows, model_config.num_patches),
        weights_B=torch.ones(rows),
        sample_ids_B=torch.arange(rows),
        epochs_B=torch.zeros(rows, dtype=torch.int64),
        cursor_after=rows,
    )
    model = create_model(model_config).to(device)
    step = TrainStep(model, create_optimizer(model, config.optimizer, lr=1e-3), config, precision=precision)
    return lambda: step(batch, lr=1e-3).read()


def taking_turns(steps: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round, after two rounds of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 2):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    return {name: values[2:] for name, values in seconds.items()}


def main() -> None:
    """Runs every recipe in both precisions, taking turns."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {'cuda' if torch.cuda.is_available() else 'cpu'}, batch {ROWS}")
    for recipe in ("digits_crate_mae", "digits_mae", "digits_mae_small"):
        config = RunConfig.load(recipe, [f"train.global_batch={ROWS}"])
        steps = {precision: make_step(config, precision) for precision in ("float32", "bfloat16")}
        seconds = taking_turns(steps, rounds=ROUNDS)
        rates = {name: ROWS / statistics.median(values) for name, values in seconds.items()}
        ratios = sorted(a / b for a, b in zip(seconds["float32"], seconds["bfloat16"], strict=True))
        print(
            f"{recipe:18} float32 {rates['float32']:6.0f} images/s  bfloat16 {rates['bfloat16']:6.0f} images/s  "
            f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
