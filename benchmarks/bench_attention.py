"""Which attention is faster on this CPU, plain or fused? One CRATE encoder layer, forward and backward.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_attention

Milliseconds: median of 7 (smallest to largest), the kernels taking turns, one thread. `blocks.attend` is
replaced by each kernel in turn; what it chooses by itself stands in docs/numerics.md.
"""

import statistics
import time

import torch
from torch.nn import functional

from crate_ray.models import blocks

SHAPES = ((128, 17, 128, 4), (128, 65, 128, 4), (16, 50, 384, 6), (16, 197, 384, 6))
ROUNDS = 9


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Two products and a softmax."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


def main() -> None:
    """Times every shape in both precisions."""
    torch.set_num_threads(1)
    kernels = {"plain": plain, "fused": functional.scaled_dot_product_attention}
    for b, n, d, h in SHAPES:
        layer = blocks.CrateEncoderLayer(d, h, eps=1e-5, step_size=0.1, lam=0.5)
        x = torch.randn(b, n, d, requires_grad=True)
        for bf16 in (False, True):
            times: dict[str, list[float]] = {name: [] for name in kernels}
            for _ in range(ROUNDS):
                for name, kernel in kernels.items():
                    blocks.attend = kernel  # type: ignore[assignment]
                    started = time.perf_counter()
                    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                        y = layer(x)
                    y.float().square().mean().backward()
                    times[name].append(1e3 * (time.perf_counter() - started))
            cells = [f"{k} {statistics.median(t[2:]):.1f} ({min(t[2:]):.1f}-{max(t[2:]):.1f})" for k, t in times.items()]
            print(f"B {b} N {n} D {d} H {h} {'bf16' if bf16 else 'float32'}: {', '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
