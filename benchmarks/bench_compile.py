"""Seconds to compile and seconds a step: the whole objective as one graph, or every layer by itself.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_compile --depth 12
    OMP_NUM_THREADS=1 python -m benchmarks.bench_compile --depth 24 --recipe imagenet_mae_base

One process; inductor's caches off and one compile thread, so that the CPU time of process and compilers is all there is. A
compilation of something else comes first, so that nobody pays for imports. Steps of the three forms take turns.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import torch
import torch._dynamo
import torch._inductor.config
from torch import nn

from crate_ray.config import RunConfig
from crate_ray.models import create_model
from crate_ray.models.layers import distinct_layers
from crate_ray.training.precision import autocast

FORMS = ("eager", "whole", "layers")


def cpu_seconds() -> float:
    """Of this process and of the compilers that it ran."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def build(config: RunConfig, form: str, batch: int, precision: str) -> Callable[[], None]:
    """A function that runs forward and backward of one batch."""
    torch.manual_seed(0)
    model = create_model(config.model)
    images_BCHW = torch.randn(batch, 3, config.model.image_size, config.model.image_size)
    noise_BN = torch.rand(batch, config.model.num_patches)
    losses: Callable[..., torch.Tensor] = model.losses  # type: ignore[union-attr, assignment]
    if form == "whole":
        losses = torch.compile(losses)
    if form == "layers":
        for layer in distinct_layers(model):
            layer.compile(fullgraph=True)

    def step() -> None:
        model.zero_grad()
        with autocast(precision, torch.device("cpu")):
            loss = losses(images_BCHW, noise_BN).mean()
        loss.backward()  # type: ignore[no-untyped-call]

    return step


def main() -> None:
    """Prints one line a form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="imagenet_crate_mae_base")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--decoder-depth", type=int, default=8)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--order", default=",".join(FORMS), help="who compiles first")
    arguments = parser.parse_args()
    torch._inductor.config.force_disable_caches = True
    torch._inductor.config.compile_threads = 1
    width = [f"model.width={arguments.width}", f"model.num_heads={arguments.heads}"]
    depth = [f"model.encoder_depth={arguments.depth}", f"model.decoder_depth={arguments.decoder_depth}"]
    config = RunConfig.load(arguments.recipe, [*width, *depth, "data.train=unused"])
    torch.compile(nn.Linear(3, 3))(torch.ones(2, 3)).sum().backward()
    steps, compile_s = {}, {}
    for form in arguments.order.split(","):
        steps[form] = build(config, form, arguments.batch, arguments.precision)
        wall, cpu = time.perf_counter(), cpu_seconds()
        steps[form]()
        compile_s[form] = (time.perf_counter() - wall, cpu_seconds() - cpu)
        print(f"{form}: first step done", flush=True)
        steps[form]()
    seconds: dict[str, list[tuple[float, float]]] = {form: [] for form in steps}
    for _ in range(arguments.rounds):
        for form, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            seconds[form].append((time.perf_counter() - wall, time.process_time() - cpu))
    print(
        f"{arguments.recipe}, depth {arguments.depth} and {arguments.decoder_depth}, width {arguments.width}, "
        f"batch {arguments.batch}, {arguments.precision}"
    )
    for form in FORMS:
        walls, cpus = ([pair[i] for pair in seconds[form]] for i in (0, 1))
        print(
            f"{form:7} first step {compile_s[form][0]:6.1f} s wall {compile_s[form][1]:6.1f} s CPU; a step "
            f"{statistics.median(walls):.3f} s wall, {statistics.median(cpus):.3f} s CPU ({min(cpus):.3f} to {max(cpus):.3f})"
        )


if __name__ == "__main__":
    main()
