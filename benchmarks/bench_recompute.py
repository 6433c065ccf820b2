"""What recomputing layers saves and costs: bytes that autograd keeps for an image, and the CPU time of forward and backward.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_recompute --model crate_mae_base --batch 2

One process, the two forms taking turns; CPU time, so that other work on the machine counts little.
"""

import argparse
import statistics
import time

import torch

from crate_ray.config import ModelConfig
from crate_ray.models import MaskedAutoencoder
from crate_ray.models.layers import recompute_layers
from crate_ray.models.memory import activation_bytes
from crate_ray.training.precision import autocast


def kept_bytes(model: MaskedAutoencoder, images_BCHW: torch.Tensor, noise_BN: torch.Tensor, precision: str) -> int:
    """Bytes of the distinct tensors that a forward pass leaves for the backward pass, weights included."""
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(precision, torch.device("cpu")):
        model.losses(images_BCHW, noise_BN)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def main() -> None:
    """Prints bytes and times of both forms, in both precisions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="crate_mae_base")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    config = ModelConfig.parse({"preset": arguments.model})
    models = {"kept": MaskedAutoencoder(config), "recomputed": MaskedAutoencoder(config)}
    recompute_layers(models["recomputed"])
    images_BCHW = torch.randn(arguments.batch + 1, 3, config.image_size, config.image_size)
    noise_BN = torch.rand(arguments.batch + 1, config.num_patches)
    for precision in ("float32", "bfloat16"):
        seconds: dict[str, list[float]] = {form: [] for form in models}
        for _ in range(arguments.rounds + 1):
            for form, model in models.items():
                model.zero_grad()
                start = time.process_time()
                with autocast(precision, torch.device("cpu")):
                    loss = model.losses(images_BCHW[:-1], noise_BN[:-1]).mean()
                loss.backward()  # type: ignore[no-untyped-call]
                seconds[form].append(time.process_time() - start)
        for form, model in models.items():
            one_more, fewer = (
                kept_bytes(model, images_BCHW[:n], noise_BN[:n], precision) for n in (arguments.batch + 1, arguments.batch)
            )
            closed = activation_bytes(config, precision=precision, recompute=form == "recomputed")
            times = seconds[form][1:]
            print(
                f"{arguments.model} {precision:8} {form:10} {(one_more - fewer) / 2**20:6.1f} MiB kept an image "
                f"(closed form with the layer at work {closed / 2**20:.1f}); {statistics.median(times):.2f} s CPU "
                f"({min(times):.2f} to {max(times):.2f})"
            )


if __name__ == "__main__":
    main()
