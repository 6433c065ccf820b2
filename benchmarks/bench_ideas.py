"""Which changes make a training step faster? Each idea beside what it would replace, taking turns.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_ideas [--ideas ista,attention] [--rounds 9] [--cpu-time] [--device cuda]

Prints Markdown: milliseconds of forward and backward (of the update for `optimizer`), median over rounds; the ratio to the
first variant round by round, median (smallest to largest); and the norm of a gradient's difference from the first
variant's, relative to the norm of that. Batch 8, 197 tokens, width and heads of CRATE-MAE-S where nothing else is said.
What was kept, and why, stands in docs/numerics.md under Speed.
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.roofline import seconds_of
from crate_ray.models import MaskedAutoencoder, blocks, create_model
from crate_ray.models.linear import Linear, linear
from crate_ray.models.patches import patchify, take_tokens
from crate_ray.training.precision import autocast

BATCH, TOKENS, WIDTH, HEADS = 8, 197, 576, 12
Variants = dict[str, Callable[[], Tensor | None]]
"""Name to a pass that gives a gradient to compare, if there is one."""


def ista(device: torch.device, precision: str) -> Variants:
    """The ISTA step: number of products, and elementwise work folded into them."""
    step = blocks.IstaStep(WIDTH, step_size=0.1, lam=0.5).to(device)
    y = torch.randn(BATCH, TOKENS, WIDTH, device=device, requires_grad=True)
    dictionary, eta, threshold = step.dictionary, 0.1, 0.05

    def three_products() -> Tensor:
        gram = linear(linear(y, dictionary), dictionary.t())
        return functional.relu(y + eta * (linear(y, dictionary.t()) - gram) - threshold)

    def products_with_epilogues() -> Tensor:
        rows = y.flatten(0, 1)
        residual = torch.addmm(rows, rows, dictionary.t(), alpha=-1)
        return functional.relu(torch.addmm(rows - threshold, residual, dictionary, alpha=eta)).view_as(y)

    def scaled_sum() -> Tensor:
        residual = y - linear(y, dictionary)
        return functional.relu(torch.add(y, linear(residual, dictionary.t()), alpha=eta) - threshold)

    def all_in_half() -> Tensor:
        half = y.bfloat16()
        return functional.relu(half + eta * (linear(half - linear(half, dictionary), dictionary.t()) - 0.5))

    variants = {
        "two products (kept)": lambda: step(y),
        "three products, published": three_products,
        "addmm epilogues": products_with_epilogues,
        "eta as alpha of the sum": scaled_sum,
    }
    if precision == "bfloat16":
        variants["elementwise in bfloat16"] = all_in_half
    return {name: _pass(run, y, device, precision) for name, run in variants.items()}


def product(device: torch.device, precision: str) -> Variants:
    """A linear layer: torch's choice of library, and what `crate_ray.models.linear` chooses."""
    layer = Linear(WIDTH, WIDTH).to(device)
    x = torch.randn(BATCH, TOKENS, WIDTH, device=device, requires_grad=True)
    variants = {"torch's choice": lambda: functional.linear(x, layer.weight, layer.bias), "by rule (kept)": lambda: layer(x)}
    return {name: _pass(run, x, device, precision) for name, run in variants.items()}


class _TiedAttention(torch.autograd.Function):
    """softmax(v v^T / sqrt(P)) v whose backward adds the logits' gradient to its transpose: five products instead of six."""

    @staticmethod
    def forward(ctx, v_BHNP):  # type: ignore[no-untyped-def]
        v = v_BHNP.flatten(0, 1)
        logits = torch.baddbmm(v.new_empty(1, 1, 1), v, v.mT, beta=0, alpha=v.shape[-1] ** -0.5)
        weights = logits.softmax(-1)
        ctx.save_for_backward(v, weights)
        return (weights @ v).view(v_BHNP.shape)

    @staticmethod
    def backward(ctx, gradient_BHNP):  # type: ignore[no-untyped-def]
        v, weights = ctx.saved_tensors
        gradient = gradient_BHNP.flatten(0, 1)
        d_logits = torch._softmax_backward_data(gradient @ v.mT, weights, -1, weights.dtype)
        symmetric = d_logits + d_logits.mT
        return torch.baddbmm(weights.mT @ gradient, symmetric, v, alpha=v.shape[-1] ** -0.5).view(gradient_BHNP.shape)


def attention(device: torch.device, precision: str) -> Variants:
    """A CRATE encoder layer with each attention."""
    layer = blocks.CrateEncoderLayer(WIDTH, HEADS, eps=1e-5, step_size=0.1, lam=0.5).to(device)
    z = torch.randn(BATCH, TOKENS, WIDTH, device=device, requires_grad=True)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v

    def laid_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        v = v.contiguous()
        return plain(v, v, v)

    kernels = {
        "as chosen": blocks.attend,
        "plain": plain,
        "fused": functional.scaled_dot_product_attention,
        "plain, heads contiguous": laid_out,
        "tied, symmetric backward": lambda q, k, v: _TiedAttention.apply(v),  # type: ignore[no-untyped-call]
    }

    def run(kernel: Callable[..., Tensor]) -> Tensor:
        with mock.patch.object(blocks, "attend", kernel):
            return layer(z)  # type: ignore[no-any-return]

    return {name: _pass(lambda kernel=kernel: run(kernel), z, device, precision) for name, kernel in kernels.items()}  # type: ignore[misc]


def tail(device: torch.device, precision: str, *, preset: str = "crate_mae_small") -> Variants:
    """A whole model, batch 4: which tokens the prediction head and the last decoder layer compute."""
    model = create_model(preset).to(device)
    assert isinstance(model, MaskedAutoencoder)
    images, noise = torch.randn(4, 3, 224, 224, device=device), torch.rand(4, 196, device=device)

    def head_on_hidden() -> Tensor:
        target, masking, latent = model._encode_masked(images, noise)
        hidden = take_tokens(model._decode(latent, masking)[:, 1:], masking.masked)
        pred = model.decoder_pred(model.decoder_norm(hidden))
        return model._patch_losses(pred, take_tokens(target, masking.masked)).mean()

    variants: dict[str, Callable[[], Tensor]] = {
        "every token predicted": lambda: model(images, noise).loss,
        "head on hidden tokens": head_on_hidden,
        "last layer and head on hidden tokens (kept)": lambda: model.losses(images, noise).mean(),
    }
    return {name: _pass(run, model.cls_token, device, precision) for name, run in variants.items()}


def tail_vit(device: torch.device, precision: str) -> Variants:
    """The same for the published MAE-B."""
    return tail(device, precision, preset="mae_base")


def norm(device: torch.device, precision: str) -> Variants:
    """LayerNorm before a product, as autocast runs it and wholly in the product's type."""
    module, after = nn.LayerNorm(WIDTH).to(device), Linear(WIDTH, WIDTH, bias=False).to(device)
    z = torch.randn(BATCH, TOKENS, WIDTH, device=device, requires_grad=True)
    variants: dict[str, Callable[[], Tensor]] = {"as autocast runs it (kept)": lambda: after(module(z))}
    if precision == "bfloat16":
        variants["bfloat16 in and out"] = lambda: after(module(z.bfloat16()))
        variants["bfloat16 out"] = lambda: after(module(z).bfloat16())
    return {name: _pass(run, z, device, precision) for name, run in variants.items()}


def patches(device: torch.device, precision: str) -> Variants:
    """Images to embedded patches and prediction targets, which the loss needs in any case."""
    embed = Linear(768, WIDTH).to(device)
    images = torch.randn(BATCH, 3, 224, 224, device=device)

    def convolved() -> Tensor:
        kernel = embed.weight.view(WIDTH, 16, 16, 3).permute(0, 3, 1, 2)
        embedded = functional.conv2d(images, kernel, embed.bias, stride=16).flatten(2).mT
        return embedded + 0 * patchify(images, 16).sum()

    def unfolded() -> Tensor:
        cut = functional.unfold(images, 16, stride=16).mT
        return embed(cut.unflatten(-1, (3, 256)).mT.flatten(2))  # type: ignore[no-any-return, no-untyped-call]

    variants = {"reshape and linear (kept)": lambda: embed(patchify(images, 16)), "convolution": convolved, "unfold": unfolded}
    return {name: _pass(run, embed.weight, device, precision) for name, run in variants.items()}


def gather(device: torch.device, precision: str) -> Variants:
    """Hidden tokens of a batch: gather with an index for each value, or rows of the flattened batch."""
    x = torch.randn(BATCH, TOKENS, WIDTH, device=device, requires_grad=True)
    index = torch.rand(BATCH, TOKENS, device=device).argsort(1)[:, :147]

    def rows() -> Tensor:
        flat = index + TOKENS * torch.arange(BATCH, device=device).unsqueeze(1)
        return x.flatten(0, 1).index_select(0, flat.flatten()).view(BATCH, 147, WIDTH)

    variants = {"gather (kept)": lambda: take_tokens(x, index), "index_select": rows}
    return {name: _pass(run, x, device, precision) for name, run in variants.items()}


def loss(device: torch.device, precision: str) -> Variants:
    """The error of hidden patches: a square and its mean, or torch's fused loss."""
    pred = torch.randn(BATCH, 147, 768, device=device, requires_grad=True)
    target = torch.randn(BATCH, 147, 768, device=device)
    half = torch.bfloat16 if precision == "bfloat16" else torch.float32

    def squared() -> Tensor:
        return (pred.to(half).float() - target).square().mean(dim=-1)

    def fused() -> Tensor:
        return functional.mse_loss(pred.to(half).float(), target, reduction="none").mean(dim=-1)

    return {name: _pass(run, pred, device, precision) for name, run in {"square (kept)": squared, "mse_loss": fused}.items()}


def optimizer(device: torch.device, precision: str) -> Variants:
    """AdamW on CRATE-MAE-S, gradients given."""
    kinds: dict[str, dict[str, bool]] = {
        "fused (kept)": {"fused": True},
        "foreach": {"foreach": True},
        "loop": {"foreach": False},
    }
    variants: Variants = {}
    for name, kind in kinds.items():
        model = create_model("crate_mae_small").to(device)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        step = torch.optim.AdamW(model.parameters(), lr=1e-4, **kind).step  # type: ignore[arg-type]
        variants[name] = lambda step=step: step()  # type: ignore[misc, assignment]
    return variants


def allocator(device: torch.device, precision: str) -> Variants:
    """A CRATE-MAE-S step, batch 8: glibc maps and unmaps each large tensor, or keeps freed memory for the next one."""
    model = create_model("crate_mae_small").to(device)
    assert isinstance(model, MaskedAutoencoder)
    images, noise = torch.randn(BATCH, 3, 224, 224, device=device), torch.rand(BATCH, 196, device=device)
    step = _pass(lambda: model.losses(images, noise).mean(), model.cls_token, device, precision)
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h

    def with_setting(trim_bytes: int, maps: int) -> Tensor | None:
        mallopt(trim_threshold, trim_bytes)
        mallopt(mmap_max, maps)
        return step()

    return {"glibc's default": lambda: with_setting(2**17, 2**16), "memory kept": lambda: with_setting(2**31 - 1, 0)}


IDEAS = {
    idea.__name__: idea
    for idea in (product, ista, attention, norm, patches, gather, loss, optimizer, tail, tail_vit, allocator)
}


def main() -> None:
    """Times each idea in both precisions."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_ideas", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--ideas", default=",".join(IDEAS), help=f"of {', '.join(IDEAS)}, by commas")
    parser.add_argument("--precision", default="float32,bfloat16", help="by commas")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of this process: for one thread beside other work")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    device = torch.device(options.device)
    threads = torch.get_num_threads()
    print(f"{device.type}, torch {torch.__version__}, {threads} threads, {options.rounds} rounds, {clock.__name__}\n")
    print("| idea | precision | variant | ms | ratio to the first | difference |\n|---|---|---|---|---|---|")
    for name in options.ideas.split(","):
        for precision in options.precision.split(",") if name != "optimizer" else ["float32"]:
            torch.manual_seed(0)
            run_idea(name, IDEAS[name](device, precision), precision, options.rounds, device, clock)


def run_idea(
    name: str, variants: Variants, precision: str, rounds: int, device: torch.device, clock: Callable[[], float]
) -> None:
    """Rounds of every variant; one line a variant."""
    gradients = {variant: run() for variant, run in variants.items()}
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant, run in variants.items():
            seconds[variant].append(seconds_of(run, device, clock))
    first = next(iter(variants))
    for variant, times in seconds.items():
        ratios = sorted(mine / base for mine, base in zip(times, seconds[first], strict=True))
        print(
            f"| {name} | {precision} | {variant} | {1e3 * statistics.median(times):.2f} "
            f"| {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) "
            f"| {_difference(gradients[variant], gradients[first])} |",
            flush=True,
        )


def _difference(gradient: Tensor | None, reference: Tensor | None) -> str:
    if gradient is None or reference is None:
        return ""
    return f"{float((gradient - reference).norm() / reference.norm()):.1e}"


def _pass(run: Callable[[], Tensor], leaf: Tensor, device: torch.device, precision: str) -> Callable[[], Tensor | None]:
    """Forward under autocast, and backward of a fixed weighting of the output; gives the gradient of `leaf`."""
    with torch.no_grad(), autocast(precision, device):
        output = run()
    weighting = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)

    def both() -> Tensor | None:
        leaf.grad = None
        with autocast(precision, device):
            output = run()
        torch.autograd.backward(output, weighting.to(output.dtype))
        return leaf.grad

    return both


if __name__ == "__main__":
    main()
