"""Is bfloat16 autocast faster than float32 for a training step on this device? Interleaved, medians.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_precision

Prints images/s of a full optimizer step of the digits models and the ratio pair by pair. One CPU thread.
"""

import statistics
import time

import torch

from crate_ray.config import RunConfig
from crate_ray.data import Batch
from crate_ray.models import create_model
from crate_ray.training.optimizer import create_optimizer
from crate_ray.training.step import TrainStep

ROUNDS = 12
ROWS = 64


def main() -> None:
    """Runs every recipe in both precisions, taking turns."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"torch {torch.__version__}, {device.type}, batch {ROWS}")
    for recipe in ("digits_crate_mae", "digits_mae", "digits_mae_small"):
        config = RunConfig.load(recipe, [f"train.global_batch={ROWS}"])
        batch = Batch(
            images_BCHW=torch.randint(0, 256, (ROWS, 3, 32, 32), dtype=torch.uint8),
            labels_B=torch.zeros(ROWS, dtype=torch.int64),
            noise_BN=torch.rand(ROWS, config.model.num_patches),
            weights_B=torch.ones(ROWS),
            sample_ids_B=torch.arange(ROWS),
            epochs_B=torch.zeros(ROWS, dtype=torch.int64),
            cursor_after=ROWS,
        )
        steps = {}
        for precision in ("float32", "bfloat16"):
            model = create_model(config.model).to(device)
            optimizer = create_optimizer(model, config.optimizer, lr=1e-3)
            steps[precision] = TrainStep(model, optimizer, config, precision=precision, world_size=1)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(ROUNDS + 2):
            for name, step in steps.items():
                started = time.perf_counter()
                step(batch, lr=1e-3).read()
                seconds[name].append(time.perf_counter() - started)
        rates = {name: ROWS / statistics.median(values[2:]) for name, values in seconds.items()}
        ratios = sorted(a / b for a, b in zip(seconds["float32"][2:], seconds["bfloat16"][2:], strict=True))
        print(
            f"{recipe:18} float32 {rates['float32']:6.0f} images/s  bfloat16 {rates['bfloat16']:6.0f} images/s  "
            f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
