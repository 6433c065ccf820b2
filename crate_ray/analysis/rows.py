"""A run folder as one row of the comparison: everything is read, nothing is computed again.

In: a finished, probed run folder. Out: a ComparisonRow. A run that lacks a number is refused by name,
so that no comparison is silently made of what happens to be there.
"""

import math
from typing import Any

from crate_ray.analysis.table import ComparisonRow, Estimate
from crate_ray.config import ConfigError
from crate_ray.runs import RunFolder


def read_row(
    folder: RunFolder, *, split: str = "test", name: str | None = None, raw_pixels_top1: float = math.nan
) -> ComparisonRow:
    """Reads a run's row.

    Args:
        folder: A finished run that was probed on `split`.
        split: "validation" or "test".
        name: What figures and tables call it; the run's name where there is none.
        raw_pixels_top1: Accuracy of the probe on pixels, which belongs to the data.

    Raises:
        ConfigError: The run is not finished, or was not probed on this split.
    """
    config = folder.read_config()
    final = _require(folder, "final.json", "train it to its end first")
    flag = " --test" if split == "test" else ""
    probe = _require(folder, f"probe_{split}.json", f"run `crate-ray probe{flag} {folder.uri}` first")
    values, judged, cost = final["values"], probe["values"], final["cost"]
    return ComparisonRow(
        name=name or folder.name,
        family=config.model.family,
        recipe=config.recipe,
        params_trainable=cost["parameters"]["trainable"],
        params_encoder=cost["parameters"]["encoder"],
        params_paper=cost["parameters"]["paper"],
        gflops_forward=cost["training_flops_per_image"] / 3e9,
        training_gflops_per_image=cost["training_flops_per_image"] / 1e9,
        train_pflops=values["final/train_pflops"],
        images_per_s=values.get("final/images_per_s", math.nan),
        train_seconds=cost["train_seconds"],
        eval_loss=values.get("final/eval_loss", math.nan),
        probe_top1=Estimate(*probe["probe_top1"]),
        control_top1=judged["final/control_top1"],
        gain=Estimate(*probe["gain"]),
        cls_top1=judged["final/cls_top1"],
        fewshot10_top1=judged.get("final/fewshot10_top1", math.nan),
        fewshot50_top1=judged.get("final/fewshot50_top1", math.nan),
        knn_top1=judged["final/knn_top1"],
        raw_pixels_top1=raw_pixels_top1,
        mask_ratio=config.model.mask_ratio,
        patch_size=config.model.patch_size,
        norm_pix_loss=config.model.norm_pix_loss,
        seeds=(config.train.seed,),
        rollbacks=int(values.get("final/rollbacks", 0)),
        skipped_steps=int(values.get("final/skipped_steps", 0)),
    )


def compare_parts_of(folder: RunFolder) -> dict[str, Any]:
    """What the run must share with others to be compared."""
    return dict(_require(folder, "fingerprint.json", "train it first")["compare"]["parts"])


def _require(folder: RunFolder, name: str, fix: str) -> dict[str, Any]:
    body = folder.read_json(name)
    if body is None:
        raise ConfigError(f"run '{folder.name}' has no {name}; {fix}")
    return body
