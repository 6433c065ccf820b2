"""Run folders as a sweep leaves them: real writers, invented numbers of a plausible size, as the page is under test."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crate_ray.config import RunConfig, digest, fingerprint
from crate_ray.models.cost import count_parameters
from crate_ray.runs import Lease, RecordWriter, RunFolder, open_run, system_stream
from crate_ray.training.final import write_result

STEPS = 400
SEEDS = range(5)


@dataclass(frozen=True)
class Shape:
    """A configuration."""

    preset: str
    width: int
    heads: int
    depth: int
    mask_ratio: float

    @property
    def family(self) -> str:
        return "crate" if self.preset.startswith("crate") else "vit"


def shapes() -> Iterator[Shape]:
    """Twelve: both families at three sizes and two mask ratios."""
    sizes = ((192, 3, 6), (288, 6, 8), (384, 6, 12))
    for preset, (width, heads, depth), mask_ratio in itertools.product(("crate_mae_tiny", "mae_small"), sizes, (0.6, 0.75)):
        yield Shape(preset, width, heads, depth, mask_ratio)


def make_sweep(root: Path) -> list[RunFolder]:
    """A parent with its 60 trials, and a control that no view shows."""
    designs = list(shapes())
    parent = make_run(root, designs[0], kind="sweep", seed=99)
    meta = parent.read_json("run_meta.json")
    assert meta is not None
    trials = [
        make_run(root / "trials", shape, seed=seed, kind="trial", stage="confirm", parent_uid=meta["run_uid"])
        for shape in designs
        for seed in SEEDS
    ]
    return [parent, *trials, make_run(root, designs[-1], seed=98, kind="control")]


def make_run(root: Path, shape: Shape, *, seed: int, **how: Any) -> RunFolder:
    """A finished run folder written by the product's own writers; `how` is kind, stage and parent_uid."""
    config = _config(root, shape, seed)
    folder = open_run(config, fingerprint(config, f"data-{how['kind']}", "float32"), study="saved-view", **how)
    folder.write_json("datasets.json", {"datasets": _datasets()})
    lease = Lease.take(folder)
    generator = np.random.default_rng(1000 * seed + shape.width + round(100 * shape.mask_ratio))
    _write_records(config, folder, shape, lease.attempt, generator)
    entry = {"bytes": 1, "sha256": f"{seed:064x}"}
    folder.write_json(f"checkpoints/step_{STEPS:08d}/manifest.json", {"step": STEPS, "files": {"model.safetensors": entry}})
    lease.end("FINISHED")
    return folder


def _config(root: Path, shape: Shape, seed: int) -> RunConfig:
    model: dict[str, Any] = {
        "preset": shape.preset,
        "image_size": 32,
        "patch_size": 4,
        "width": shape.width,
        "num_heads": shape.heads,
        "encoder_depth": shape.depth,
        "mask_ratio": shape.mask_ratio,
    }
    if shape.family == "vit":
        model |= {"decoder_width": shape.width, "decoder_num_heads": shape.heads}
    return RunConfig.parse(
        {
            "recipe": f"{shape.preset}-{shape.width}",
            "model": model,
            "data": {"train": "out/digits/train"},
            "optimizer": {"lr": 1e-3},
            "train": {"steps": STEPS, "global_batch": 64, "seed": seed},
            "storage": {"path": str(root)},
        }
    )


def _datasets() -> list[dict[str, Any]]:
    splits = {"train": 1200, "eval": 300, "test": 297}
    return [
        {"split": split, "url": f"/data/digits/{split}", "digest": digest(split), "images": images, "classes": 10}
        for split, images in splits.items()
    ]


def _write_records(config: RunConfig, folder: RunFolder, shape: Shape, attempt: int, generator: np.random.Generator) -> None:
    writer = RecordWriter(folder, attempt)
    size_m = count_parameters(config.model).encoder / 1e6
    probe = 0.95 - 0.09 / size_m**0.5 - (0.02 if shape.family == "crate" else 0.05) - (0.01 if shape.mask_ratio == 0.6 else 0)
    floor, probe = 1.5 - 1.25 * probe, probe + float(generator.normal(0, 0.004))
    for step in range(0, STEPS + 1, 20):
        fall, noise = math.exp(-step / 120), float(generator.normal(0, 0.005))
        values = {
            "train/loss": floor + 0.6 * fall + noise,
            "train/grad_norm": 0.3 + 2 * fall + abs(noise),
            "train/lr": 1e-3 * min(step / 40, 1 - step / STEPS),
            "train/skipped_steps": 0.0,
            "perf/images_per_s": 900.0 * 5 / size_m + 1e3 * noise,
            "perf/data_wait_fraction": 0.02 + abs(noise),
            "memory/peak_gib": 0.4 + size_m / 25,
        }
        if step % 100 == 0:
            values |= {"eval/loss": floor + 0.01 + 0.6 * fall, "eval/knn_top1": probe - 0.5 * fall} | _layers(shape, 1 - fall)
        writer.write(step, values)
    measured = {
        "final/probe_top1": probe,
        "final/knn_top1": probe - 0.02,
        "final/eval_loss": floor + 0.03,
        "final/images_per_s": 900.0 * 5 / size_m,
    }
    write_result(config, folder, writer, step=STEPS, train_seconds=60.0, precision="float32", measured=measured)
    writer.close()
    system = RecordWriter(folder, attempt, stream=system_stream(0))
    for second in range(0, 60, 10):
        system.write(
            second, {"system/cpu_utilization_percentage": 80.0 + second / 10, "system/gpu_0_utilization_percentage": 93.0}
        )
    system.close()


def _layers(shape: Shape, progress: float) -> dict[str, float]:
    """White-box measures: coding rate falls through the layers once trained, and codes become sparser."""
    if shape.family != "crate":
        return {}
    values = {}
    for layer in range(1, shape.depth + 1):
        place = layer / shape.depth
        values |= {
            f"whitebox/layer{layer:02d}/coding_rate_pre_nats": 120 + shape.width / 4 - 70 * place * progress,
            f"whitebox/layer{layer:02d}/coding_rate_post_nats": 112 + shape.width / 4 - 78 * place * progress,
            f"whitebox/layer{layer:02d}/nonzero_fraction": 0.5 - 0.35 * place * progress,
            f"whitebox/layer{layer:02d}/ista_descent_ratio": 0.4 + 0.5 * place * progress,
            f"whitebox/layer{layer:02d}/ista_objective_ratio": 0.9 - 0.2 * place * progress,
        }
    return values | {"whitebox/latent/rankme": 40 + 60 * progress, "whitebox/latent/alpha_req": 1.4 - 0.4 * progress}
