"""Run folders as a small sweep leaves them: real writers, invented numbers."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from crate_ray.config import RunConfig, fingerprint
from crate_ray.runs import Lease, RecordWriter, RunFolder, open_run

# Preset, width, heads, depth and what a run of it ends with: encoder and total parameters (M), GFLOPs, probe top-1.
# Invented numbers of a plausible size: what is under test is the page.
SHAPES: list[tuple[str, int, int, int, tuple[float, float, float, float]]] = [
    ("crate_mae_tiny", 192, 3, 6, (0.52, 1.06, 0.11, 0.871)),
    ("crate_mae_tiny", 288, 6, 8, (1.55, 3.12, 0.33, 0.902)),
    ("crate_mae_tiny", 384, 6, 12, (4.07, 8.20, 0.85, 0.921)),
    ("mae_small", 192, 3, 6, (2.71, 6.02, 0.16, 0.866)),
    ("mae_small", 288, 6, 8, (8.02, 12.4, 0.39, 0.897)),
    ("mae_small", 384, 6, 12, (21.4, 30.1, 0.92, 0.925)),
]


def make_run(
    root: Path, preset: str, shape: tuple[int, int, int], final: tuple[float, float, float, float], **how: Any
) -> RunFolder:
    """A finished run folder written by the product's own writers; `how` is seed, kind and parent_uid."""
    width, heads, depth = shape
    seed = how.pop("seed", 0)
    model: dict[str, Any] = {
        "preset": preset,
        "image_size": 32,
        "patch_size": 4,
        "width": width,
        "num_heads": heads,
        "encoder_depth": depth,
    }
    if preset == "mae_small":
        model |= {"decoder_width": width, "decoder_num_heads": heads}
    config = RunConfig.parse(
        {
            "recipe": f"{preset}-{width}",
            "model": model,
            "data": {"train": "out/digits/train"},
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 400, "global_batch": 64, "seed": seed},
            "storage": {"path": str(root)},
        }
    )
    folder = open_run(config, fingerprint(config, f"data-{how.get('kind', 'trial')}", "float32"), study="saved-view", **how)
    lease = Lease.take(folder)
    writer = RecordWriter(folder, lease.attempt)
    generator = np.random.default_rng(seed + width)
    floor = 1.5 - 1.25 * final[3]
    for step in range(0, 401, 20):
        fall = math.exp(-step / 120)
        noise = float(generator.normal(0, 0.005))
        values = {
            "train/loss": floor + 0.6 * fall + noise,
            "train/lr": 1e-3 * (1 - step / 400),
            "perf/images_per_s": 900.0 + 1e3 * noise,
        }
        if step % 100 == 0:
            values |= {"eval/loss": floor + 0.01 + 0.6 * fall, "eval/knn_top1": final[3] - 0.5 * fall}
        writer.write(step, values)
    encoder, total, gflops, probe = final
    probe += float(generator.normal(0, 0.004))
    finals = {
        "final/encoder_params_m": encoder,
        "final/params_m": total,
        "final/gflops": gflops,
        "final/probe_top1": round(probe, 4),
    }
    writer.write(400, {**finals, "final/eval_loss": round(floor + 0.03, 4)})
    writer.close()
    folder.write_json("final.json", {"values": finals})
    lease.end("FINISHED")
    return folder


def make_sweep(root: Path) -> list[RunFolder]:
    """A parent, twelve trials of both families, and a control that the view must not show."""
    parent = make_run(root, "crate_mae_tiny", (192, 3, 4), (0.3, 0.6, 0.05, 0.5), kind="sweep", seed=9)
    meta = parent.read_json("run_meta.json")
    assert meta is not None
    trials = [
        make_run(root / "trials", preset, (width, heads, depth), final, seed=seed, kind="trial", parent_uid=meta["run_uid"])
        for preset, width, heads, depth, final in SHAPES
        for seed in (0, 1)
    ]
    control = make_run(root, "mae_small", (192, 3, 6), (2.71, 6.02, 0.16, 0.31), kind="control", seed=8)
    return [parent, *trials, control]
