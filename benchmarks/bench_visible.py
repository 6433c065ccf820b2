"""How much faster is a training step of CRATE-MAE when its encoder sees the visible tokens only? Interleaved, medians.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_visible

Prints images/s of a full optimizer step of both forms of the digits recipe and of CRATE-MAE-S at 224/16, bfloat16 where the
device has it, and the ratio pair by pair. What it does to accuracy is a question for `benchmarks.tune_digits`:
docs/experiments.md has both.
"""

import statistics

import torch

from benchmarks.bench_precision import make_step, taking_turns
from crate_ray.config import RunConfig
from crate_ray.training.precision import resolve_precision

CASES = {
    "digits_crate_mae": ["train.global_batch=64"],
    "imagenet_crate_mae_base": ["model.preset=crate_mae_small", "train.global_batch=8", "data.train=unread"],
}
ROUNDS = 12


def main() -> None:
    """Times both forms of each case, taking turns."""
    torch.set_num_threads(1)
    precision = resolve_precision("auto", "cuda" if torch.cuda.is_available() else "cpu")
    for recipe, overrides in CASES.items():
        configs = {
            tokens: RunConfig.load(recipe, [*overrides, f"model.encoder_tokens={tokens}"]) for tokens in ("all", "visible")
        }
        seconds = taking_turns({tokens: make_step(config, precision) for tokens, config in configs.items()}, rounds=ROUNDS)
        rows = configs["all"].train.global_batch
        ratios = sorted(a / b for a, b in zip(seconds["all"], seconds["visible"], strict=True))
        rates = ", ".join(f"{tokens} {rows / statistics.median(values):.1f}" for tokens, values in seconds.items())
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"width {configs['all'].model.width}, {precision}: images/s {rates}; ratio {spread}", flush=True)


if __name__ == "__main__":
    main()
