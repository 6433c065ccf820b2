"""How a run would scale from 8 to 1,024 GPUs: arithmetic on a step time, the gradient's bytes and the fabric. No measurement.

    python -m benchmarks.scaling_model crate_mae_base --peak-tflops 989 --mfu 0.35
    python -m benchmarks.scaling_model crate_mae_base --images-per-gpu 64 --port-gbps 3
    python -m benchmarks.scaling_model crate_mae_base --step-ms 410 --step-images 256   # from a step that you measured

Model, for W GPUs in nodes of g that share a global batch B (DDP, float32 gradients of G bytes):

  compute      t_c = B / W images at the measured rate of one GPU, or training FLOPs / (peak x MFU); never less than
               --floor-ms, since kernels of a few rows do not fill a GPU
  all-reduce   inside a node at --node-gbps: t_n = 2 (g - 1) / g x G / node bandwidth; across n nodes each GPU reduces its
               g-th of the gradient over its own port: t_f = 2 (n - 1) / n x (G / g) / port bandwidth + 2 (n - 1) x latency
  overlap      the backward is 2/3 of t_c, and all of it but the first bucket hides the all-reduce:
               exposed = bucket share x (t_n + t_f) + max(0, (1 - bucket share) (t_n + t_f) - 2/3 t_c)
  step         t_c + exposed + --host-ms, what a step costs that no one computes or sends

Left out: loading of images (the reader keeps up or says so), stragglers, congestion, evaluation and checkpoints.
"""

import argparse
import math
from dataclasses import dataclass

from crate_ray.config import ModelConfig
from crate_ray.models.cost import count_parameters, training_flops_per_image

IMAGENET_IMAGES = 1_281_167
BUCKET_BYTES = 25 * 2**20
"""DistributedDataParallel's own default."""
COLUMNS = (
    "GPUs", "images a GPU", "compute, ms", "all-reduce, ms", "exposed, ms", "step, ms", "images/s", "efficiency", "hours",
    "GPU-hours",
)  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """GPUs and what joins them."""

    gpus_per_node: int
    node_bytes_per_s: float
    port_bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Step:
    """Seconds of one step's parts."""

    compute_s: float
    all_reduce_s: float
    exposed_s: float
    host_s: float

    @property
    def total_s(self) -> float:
        """Of the step."""
        return self.compute_s + self.exposed_s + self.host_s


def all_reduce_seconds(gradient_bytes: int, gpus: int, cluster: Cluster) -> float:
    """Hierarchical ring: scattered inside the node, reduced over each GPU's own port, gathered inside the node."""
    inside = min(gpus, cluster.gpus_per_node)
    nodes = math.ceil(gpus / cluster.gpus_per_node)
    node_s = 2 * (inside - 1) / inside * gradient_bytes / cluster.node_bytes_per_s
    fabric_s = 2 * (nodes - 1) / nodes * gradient_bytes / inside / cluster.port_bytes_per_s
    return node_s + fabric_s + 2 * (nodes - 1) * cluster.latency_s


def model_step(
    *, images: int, image_s: float, floor_s: float, host_s: float, gradient_bytes: int, gpus: int, cluster: Cluster
) -> Step:
    """One step of `images` on so many GPUs; `image_s` is what one image costs one GPU."""
    compute_s = max(floor_s, math.ceil(images / gpus) * image_s)
    all_reduce_s = all_reduce_seconds(gradient_bytes, gpus, cluster)
    first = min(1.0, BUCKET_BYTES / gradient_bytes)
    exposed_s = first * all_reduce_s + max(0.0, (1 - first) * all_reduce_s - 2 / 3 * compute_s)
    return Step(compute_s, all_reduce_s, exposed_s, host_s)


def main() -> None:
    """Prints the table."""
    options = _parse()
    config = ModelConfig.model_validate({"preset": options.model})
    parameters, flops = count_parameters(config).trainable, training_flops_per_image(config)
    if options.step_ms is not None:
        image_s = options.step_ms / 1e3 / options.step_images
        source = f"{options.step_ms:g} ms measured for {options.step_images} images"
    else:
        image_s = flops / (options.peak_tflops * 1e12 * options.mfu)
        source = f"assumed {options.mfu:.0%} of {options.peak_tflops:g} TFLOP/s"
    cluster = Cluster(options.gpus_per_node, options.node_gbps * 1e9, options.port_gbps * 1e9, options.latency_us / 1e6)
    print(
        f"{options.model}: {4 * parameters / 2**20:.0f} MiB of gradient, {flops / 1e9:.1f} training GFLOPs an image; {source}."
    )
    batch = f"{options.images_per_gpu} images a GPU" if options.images_per_gpu else f"Global batch {options.global_batch:,}"
    print(f"{batch}; {options.epochs} epochs of ImageNet-1k.\n")
    print(f"| {' | '.join(COLUMNS)} |")
    print(f"|{'---|' * len(COLUMNS)}")
    rate_of_one = 1 / image_s
    for gpus in options.gpus:
        images = gpus * options.images_per_gpu if options.images_per_gpu else options.global_batch
        step = model_step(
            images=images,
            image_s=image_s,
            floor_s=options.floor_ms / 1e3,
            host_s=options.host_ms / 1e3,
            gradient_bytes=4 * parameters,
            gpus=gpus,
            cluster=cluster,
        )
        rate = images / step.total_s
        hours = options.epochs * IMAGENET_IMAGES / rate / 3600
        parts = " | ".join(f"{1e3 * value:.1f}" for value in (step.compute_s, step.all_reduce_s, step.exposed_s, step.total_s))
        print(
            f"| {gpus} | {math.ceil(images / gpus)} | {parts} | {rate:,.0f} | {rate / gpus / rate_of_one:.0%} "
            f"| {hours:.1f} | {hours * gpus:,.0f} |"
        )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="A preset.")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--global-batch", type=int, default=4096)
    parser.add_argument("--images-per-gpu", type=int, help="Instead of a global batch: it grows with the GPUs.")
    parser.add_argument("--epochs", type=int, default=800)
    parser.add_argument("--step-ms", type=float, help="A measured step of one GPU without communication.")
    parser.add_argument("--step-images", type=int, default=256, help="Images of that step.")
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    parser.add_argument("--mfu", type=float, default=0.35)
    parser.add_argument("--floor-ms", type=float, default=15.0)
    parser.add_argument("--host-ms", type=float, default=1.0)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--node-gbps", type=float, default=300.0, help="Gigabytes a second that a GPU sends inside its node.")
    parser.add_argument("--port-gbps", type=float, default=40.0, help="Gigabytes a second of a GPU's own network port.")
    parser.add_argument("--latency-us", type=float, default=10.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
