"""How fast is a full optimizer step, beside the published computation and other implementations? One process, taking turns.

    python -m benchmarks.bench_step                     # CPU or GPU, eager, three models, two precisions
    python -m benchmarks.bench_step --compile           # torch.compile as well
    python -m benchmarks.bench_step --quick             # smaller batch, fewer rounds

A step is zero_grad, forward under autocast, backward, fused AdamW; batch and noise are the same for all. A round runs every
implementation, precision and mode once, then the next round begins, so that a slower minute of the machine hits all alike.
Printed as Markdown, each figure the median over rounds:
  images/s
  TFLOP/s   operations that this implementation executes (crate_ray.models.cost), backward twice its forward
  MFU       these against the largest matrix product measured in the same rounds, and against the vendor's figure
  GiB       float32 weights and moments of this model, plus what a step adds at its peak
  ratios    time of the other / time of ours, round by round: median (smallest to largest)
  roofline  the step of an ideal implementation on this machine (benchmarks/roofline.py), and the share of it reached; on a GPU

It needs torch, torchvision, numpy, pyarrow, safetensors, pydantic and pyyaml, and runs from the repository root without
installing this package; peers that are not installed are left out. Autocast is around the forward pass and the loss, as the
published training loops place theirs; those use float16 with a loss scaler on a GPU, which bfloat16 does not need.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Implementation, implementations
from benchmarks.roofline import data_sheet_peak, measure_bandwidth, measure_peak, seconds_of, training_roofline
from crate_ray.config import PRESETS, ModelConfig
from crate_ray.models.cost import BACKWARD_FACTOR
from crate_ray.training.precision import autocast, can_compile

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WARMUPS = 2
STEPS_OF_A_ROUND = {"cpu": 1, "cuda": 10}
"""A GPU's queue is to stay full, as in training."""
STATE_BYTES = 12
"""Of a trainable parameter between steps: float32 weight and two moments."""


@dataclass
class Contender:
    """One implementation in one precision and mode, with its times."""

    implementation: Implementation
    precision: str
    mode: str
    step: Callable[[], object]
    seconds: list[float] = field(default_factory=list)
    memory_bytes: int | None = None

    @property
    def label(self) -> str:
        """As printed."""
        return f"{self.implementation.name} {self.precision} {self.mode}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for."""
    options = _parse(arguments)
    device = torch.device(options.device)
    report: dict[str, Any] = {"machine": describe_machine(device), "options": vars(options), "models": {}}
    print(f"# bench_step, {report['machine']['date']}\n\n" + "\n".join(f"- {k}: {v}" for k, v in report["machine"].items()))
    print(
        f"- command: `python -m benchmarks.bench_step {' '.join(sys.argv[1:] if arguments is None else arguments)}`", flush=True
    )
    bandwidth = measure_bandwidth(device)
    print(f"- batch {options.batch}, {options.rounds} rounds; copying moves {bandwidth / 1e9:.0f} GB/s\n")
    for name in options.models:
        torch.compiler.reset()
        report["models"][name] = bench_model(name, options, device, bandwidth)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1, default=str) + "\n")


def bench_model(name: str, options: argparse.Namespace, device: torch.device, bandwidth: float) -> dict[str, Any]:
    """Times every contender of one preset and prints its tables."""
    config = ModelConfig.parse({"preset": name, **options.overrides})
    print(f"## {name}, {config.image_size}/{config.patch_size}\n")
    contenders = build_contenders(config, options, device)
    clock = time.process_time if options.cpu_time else time.perf_counter
    for contender in contenders:
        for _ in range(WARMUPS):
            contender.step()
        contender.memory_bytes = peak_memory(contender, device)
    peaks: dict[str, list[float]] = {precision: [] for precision in options.precision}
    for _ in range(options.rounds):
        for precision, values in peaks.items():
            values.append(measure_peak(device, DTYPES[precision], clock=clock))
        for contender in contenders:
            contender.seconds.append(seconds_of(contender.step, device, clock) / options.steps)
    measured = {precision: statistics.median(values) for precision, values in peaks.items()}
    rows = [describe(contender, options.batch, measured, device) for contender in contenders]
    ratios = compare(contenders)
    result: dict[str, Any] = {"rows": rows, "ratios": ratios, "peak_flops": peaks, "bandwidth_bytes": bandwidth}
    print_rows(rows, measured)
    print_ratios(ratios)
    if device.type == "cuda":
        result["roofline"] = [
            reach(contender, config, options.batch, measured, bandwidth)
            for contender in contenders
            if contender.implementation.name == "ours"
        ]
        print_roofline(result["roofline"])
    return result


def build_contenders(config: ModelConfig, options: argparse.Namespace, device: torch.device) -> list[Contender]:
    """Every implementation in every precision and mode; the modes of one implementation share its weights."""
    torch.manual_seed(0)
    images = torch.randn(options.batch, 3, config.image_size, config.image_size, device=device)
    noise = torch.rand(options.batch, config.num_patches, device=device)
    modes = ["eager", "compiled"] if options.compile and can_compile(device) else ["eager"]
    contenders = []
    for found in implementations(config, say=print):
        loss = found.loss.to(device)
        optimizer = torch.optim.AdamW([p for p in loss.parameters() if p.requires_grad], lr=1e-6, fused=True)
        for precision in options.precision:
            for mode in modes:
                run = torch.compile(loss) if mode == "compiled" else loss
                step = make_step(run, optimizer, images, noise, precision, options.steps)
                contenders.append(Contender(found, precision, mode, step))
    return contenders


def make_step(
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    images_BCHW: Tensor,
    noise_BN: Tensor,
    precision: str,
    steps: int,
) -> Callable[[], None]:
    """A function that runs `steps` optimizer steps."""

    def step() -> None:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            with autocast(precision, images_BCHW.device):
                value = loss(images_BCHW, noise_BN)
            torch.autograd.backward(value)
            optimizer.step()

    return step


def describe(contender: Contender, batch: int, measured: dict[str, float], device: torch.device) -> dict[str, Any]:
    """A row of the table, with units in its names."""
    seconds = statistics.median(contender.seconds)
    flops = BACKWARD_FACTOR * contender.implementation.forward_flops * batch / seconds
    printed = data_sheet_peak(device, DTYPES[contender.precision])
    return {
        "implementation": contender.implementation.name,
        "precision": contender.precision,
        "mode": contender.mode,
        "images_per_s": batch / seconds,
        "tflops_per_s": flops / 1e12,
        "mfu_measured": flops / measured[contender.precision],
        "mfu_data_sheet": None if printed is None else flops / printed,
        "memory_gib": None if contender.memory_bytes is None else contender.memory_bytes / 2**30,
        "seconds": contender.seconds,
    }


def compare(contenders: list[Contender]) -> list[dict[str, Any]]:
    """Ours against every other of the same precision and mode, and ours in bfloat16 against the published float32."""
    ratios = []
    for ours in contenders:
        if ours.implementation.name != "ours":
            continue
        for other in contenders:
            same = (ours.precision, ours.mode) == (other.precision, other.mode) and other is not ours
            default = other.label == "published float32 eager" and ours.precision == "bfloat16"
            if same or default:
                by_round = sorted(theirs / own for theirs, own in zip(other.seconds, ours.seconds, strict=True))
                ratios.append(
                    {"ours": ours.label, "other": other.label, "median": statistics.median(by_round), "all": by_round}
                )
    return ratios


def reach(
    contender: Contender, config: ModelConfig, batch: int, measured: dict[str, float], bandwidth: float
) -> dict[str, Any]:
    """How near a contender comes to the roofline of its precision."""
    ideal = training_roofline(
        config,
        batch=batch,
        element_bytes=DTYPES[contender.precision].itemsize,
        peak_flops=measured[contender.precision],
        bandwidth_bytes=bandwidth,
    )
    seconds = statistics.median(contender.seconds)
    parts = {"matmul_s": ideal.matmul_s, "stream_s": ideal.stream_s, "optimizer_s": ideal.optimizer_s}
    return {"label": contender.label, **parts, "step_s": seconds, "share": ideal.total_s / seconds}


def peak_memory(contender: Contender, device: torch.device) -> int | None:
    """Bytes of a model's weights and moments, and what its step adds at the peak; None where the system does not tell."""
    state = STATE_BYTES * sum(p.numel() for p in contender.implementation.loss.parameters() if p.requires_grad)
    for parameter in contender.implementation.loss.parameters():
        parameter.grad = None
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        contender.step()
        return state + torch.cuda.max_memory_allocated(device) - before
    before_kib = _resident_kib("VmRSS") if _forget_peak() else None
    contender.step()
    after_kib = _resident_kib("VmHWM")
    return None if before_kib is None or after_kib is None else state + 1024 * (after_kib - before_kib)


def _forget_peak() -> bool:
    """Hands freed memory back and sets Linux's record of the largest resident size to the present one."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _resident_kib(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)


def describe_machine(device: torch.device) -> dict[str, str]:
    """What a reader needs to repeat the figures."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        extensions = {"AMX": torch.cpu._is_amx_tile_supported(), "AVX512-BF16": torch.cpu._is_avx512_bf16_supported()}
        has = ", ".join(key if present else f"no {key}" for key, present in extensions.items())
        name = f"{_cpu_name()}, {torch.get_num_threads()} threads, {has}"
    load = f"{os.getloadavg()[0]:.1f} over {os.cpu_count()} cores" if hasattr(os, "getloadavg") else "not known"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": name,
        "torch": torch.__version__,
        "load when started": load,
        "GPU": "none: no figures for one" if not torch.cuda.is_available() else torch.cuda.get_device_name(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def print_rows(rows: list[dict[str, Any]], measured: dict[str, float]) -> None:
    peaks = ", ".join(f"{precision} {value / 1e12:.3g}" for precision, value in measured.items())
    print(f"\nMeasured matmul peak, TFLOP/s: {peaks}\n")
    print(
        "| implementation | precision | mode | images/s | TFLOP/s | MFU measured | MFU data sheet | GiB |\n" + "|---" * 8 + "|"
    )
    for row in rows:
        printed = "" if row["mfu_data_sheet"] is None else f"{row['mfu_data_sheet']:.1%}"
        memory = "" if row["memory_gib"] is None else f"{row['memory_gib']:.2f}"
        print(
            f"| {row['implementation']} | {row['precision']} | {row['mode']} | {row['images_per_s']:.2f} "
            f"| {row['tflops_per_s']:.3g} | {row['mfu_measured']:.1%} | {printed} | {memory} |"
        )


def print_ratios(ratios: list[dict[str, Any]]) -> None:
    print("\n| ours | against | times as fast, median (smallest to largest) |\n|---|---|---|")
    for ratio in ratios:
        spread = f"{ratio['all'][0]:.2f} to {ratio['all'][-1]:.2f}"
        print(f"| {ratio['ours']} | {ratio['other']} | {ratio['median']:.2f} ({spread}) |")
    print(flush=True)


def print_roofline(rows: list[dict[str, Any]]) -> None:
    print("| ours | matmul ms | stream ms | optimizer ms | step ms | share of the roofline |\n|---|---|---|---|---|---|")
    for row in rows:
        parts = " | ".join(f"{1e3 * row[key]:.2f}" for key in ("matmul_s", "stream_s", "optimizer_s", "step_s"))
        print(f"| {row['label']} | {parts} | {row['share']:.1%} |")
    print(flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_step", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--models",
        type=_listed,
        default=["crate_mae_small", "crate_mae_base", "mae_base"],
        help="autoencoder presets, by commas",
    )
    parser.add_argument("--precision", type=_listed, default=list(DTYPES), help=f"of {', '.join(DTYPES)}, by commas")
    parser.add_argument("--compile", action="store_true", help="run each implementation compiled as well")
    parser.add_argument("--batch", type=int, help="images a step; 8 on a CPU, 128 on a GPU")
    parser.add_argument("--rounds", type=int, help="5, or 2 with --quick")
    parser.add_argument("--quick", action="store_true", help="fewer rounds of smaller batches")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of this process: for one thread beside other work")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of every model")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every time measured")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no CUDA device; leave the option out to run on the CPU")
    autoencoders = [name for name, keys in PRESETS.items() if "num_classes" not in keys]
    if unknown := [name for name in options.models if name not in autoencoders]:
        parser.error(f"--models {','.join(unknown)}: no preset of an autoencoder; valid: {', '.join(autoencoders)}")
    if unknown := [precision for precision in options.precision if precision not in DTYPES]:
        parser.error(f"--precision {','.join(unknown)} is unknown; valid: {', '.join(DTYPES)}")
    options.batch = options.batch or (
        (32 if options.quick else 128) if options.device == "cuda" else (2 if options.quick else 8)
    )
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.steps = STEPS_OF_A_ROUND[options.device]
    options.overrides = dict(pair.split("=", 1) for pair in options.set)
    if "num_classes" in options.overrides:
        parser.error("--set num_classes: a classifier has no peers here; leave it out")
    return options


def _listed(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


if __name__ == "__main__":
    main()
