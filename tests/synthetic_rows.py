"""Rows of runs that never were, whose truth is known: families with a scaling law each, and noise of seeds.

In: laws, sizes, seeds and how noisy they are. Out: RunRows as a finished sweep gives them. What is to be found (a ratio,
nothing, a difference that must be refused) is in the arguments, so a test knows the answer without the code it tests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from crate_ray.analysis.comparison.compare import compare
from crate_ray.analysis.comparison.layers import LayerMeasures
from crate_ray.analysis.comparison.result import Comparison
from crate_ray.config import digest
from crate_ray.runs.rows import Estimate, RunRow

FAMILY = {"crate_mae": "crate", "crate_mae_visible": "crate", "mae": "vit", "mae_all_tokens": "vit"}
COMPARE = {
    "data.digest": "d" * 8,
    "data.augment": "random_resized_crop",
    "evaluation.probe": 1,
    "evaluation.eval_loss": 1,
    "schedule.warmup_epochs": 40.0,
    "schedule.final_lr_fraction": 0.0,
    "precision": "bfloat16",
}
LOSS_TARGET = {"mask_ratio": 0.75, "patch_size": 16, "image_size": 224, "norm_pix_loss": False}
WIDTHS = (64, 96, 128, 192, 256, 384, 512, 768)


@dataclass(frozen=True)
class Law:
    """Accuracy a - b x^-c of x million encoder parameters."""

    a: float = 0.95
    b: float = 0.12
    c: float = 0.5

    def at(self, x: float) -> float:
        """The true accuracy of x million encoder parameters."""
        return self.a - self.b * x**-self.c

    def needing(self, ratio: float) -> "Law":
        """The law of a family that needs `ratio` of these parameters for the same accuracy."""
        return replace(self, b=self.b * ratio**self.c)


def synthetic_row(model: str = "crate_mae", params: int = 1_000_000, *, value: float = 0.9, **changes: Any) -> RunRow:
    """One finished, probed run; any field may be set, `settings` over those of its shape."""
    width = changes.pop("width", 128)
    seed = changes.pop("seed", 0)
    settings = {
        "arch": f"{model} 4x{width}",
        "depth": 4,
        "width": width,
        "heads": 4,
        "patch": 16,
        "mask_ratio": 0.75,
        "ista_step_size": 0.1 if FAMILY[model] == "crate" else None,
        "ista_lambda": 0.5 if FAMILY[model] == "crate" else None,
        "lr": 1e-3,
        "wd": 0.05,
        "global_batch": 256,
        **changes.pop("settings", {}),
    }
    images = changes.pop("images", 1_280_000)
    per_image = changes.pop("train_flops_per_image", 6.0 * params * 50)
    name = f"{model}-{digest([model, params, settings])[:6]}-s{seed}"
    values: dict[str, Any] = {
        "run_uid": digest([name, changes.get("stage"), changes.get("sweep")])[:32],
        "name": name,
        "uri": f"/runs/{name}",
        "kind": "trial" if changes.get("sweep") else "train",
        "family": FAMILY[model],
        "model": model,
        "recipe": model,
        "seed": seed,
        "state": "FINISHED",
        "is_complete": True,
        "configuration": digest([model, params, settings])[:8],
        "settings": {**settings, "seed": seed},
        "compare": COMPARE,
        "commit": "c0ffee",
        "is_dirty": False,
        "params_total": 2 * params,
        "params_encoder": params,
        "params_paper": 2 * params + 1000,
        "train_flops_per_image": per_image,
        "images": images,
        "train_pflops": per_image * images / 1e15,
        "train_hours": 1.0,
        "hardware": "1 x Synthetic",
        "images_per_s": 4e9 / params,
        "timing": "exclusive",
        "judged_split": "test",
        "probe_protocol": 1,
        "loss_target": LOSS_TARGET,
        "values": {
            "probe_top1": value,
            "control_top1": 0.4,
            "probe_top1_gain": value - 0.4,
            "cls_top1": value - 0.02,
            "knn_top1": value - 0.05,
            "fewshot10_top1": value - 0.2,
            "eval_loss": 1 - value,
            "rankme": 30 + 40 * value,
            "alpha_req": 2 - value,
            "coding_rate": 100 * value,
            "raw_pixels_top1": 0.35,
        },
        "intervals": {
            "probe_top1": Estimate(value, value - 0.02, value + 0.02),
            "control_top1": Estimate(0.4, 0.37, 0.43),
            "gain": Estimate(value - 0.4, value - 0.43, value - 0.37),
        },
    }
    return RunRow(**{**values, **changes})


def synthetic_rows(
    laws: Mapping[str, Law],
    *,
    widths: Sequence[int] = WIDTHS,
    seeds: Sequence[int] = range(1000, 1005),
    noise: float = 0.004,
    shared_noise: float = 0.004,
    random: int = 0,
    sweep: str | None = "sweep",
    tuning_trials: int | None = 24,
    **changes: Any,
) -> list[RunRow]:
    """Confirmed runs of every model at every width, paired by seed.

    Args:
        laws: By model; the truth.
        widths: 4 layers of them; a family's encoder has 12 x 4 x width^2 parameters, whichever it is.
        seeds: Of every configuration.
        noise: Standard deviation of a run's own luck.
        shared_noise: Of what runs of a seed and width have in common, which pairs take out.
        random: Seed of the noise.
        sweep: Of which all are confirmed trials; None for plain runs.
        tuning_trials: Of every arm.
        **changes: Fields of every row.
    """
    generator = np.random.default_rng(random)
    rows = []
    for place, width in enumerate(reversed(widths), start=1):
        params = 48 * width**2
        for seed in seeds:
            shared = generator.normal(scale=shared_noise)
            for model, law in laws.items():
                value = law.at(params / 1e6) + shared + generator.normal(scale=noise)
                stage = {"sweep": sweep, "arm": model, "stage": "confirm", "place": place} if sweep else {}
                budget = {"tuning_trials": tuning_trials}
                rows.append(
                    synthetic_row(model, params, value=float(value), width=width, seed=seed, **{**stage, **budget, **changes})
                )
    return rows


def synthetic_screening(
    model: str, law: Law, *, widths: Sequence[int] = WIDTHS, settings: Sequence[Mapping[str, Any]] = ({},), **changes: Any
) -> list[RunRow]:
    """Screening trials, judged on validation: every width with every one of the settings; `penalty` in one is taken off."""
    rows = []
    for width in widths:
        for item in settings:
            own = {key: value for key, value in item.items() if key != "penalty"}
            value = law.at(48 * width**2 / 1e6) - item.get("penalty", 0)
            stage = {"sweep": "sweep", "arm": model, "stage": "screen", "judged_split": "validation"}
            rows.append(synthetic_row(model, 48 * width**2, value=value, width=width, settings=own, **{**stage, **changes}))
    return rows


def synthetic_layers(row: RunRow) -> LayerMeasures:
    """Layers that compress and become sparse, as trained ones should."""
    depth = row.settings["depth"]
    rates = tuple(300.0 - 40 * layer for layer in range(depth))
    measures = {"coding_rate_post_nats": rates}
    if row.family == "crate":
        measures["nonzero_fraction"] = tuple(0.8 - 0.15 * layer for layer in range(depth))
    initial = {name: tuple(values[0] for _ in values) for name, values in measures.items()}
    return LayerMeasures(trained=measures, initial=initial)


def synthetic_answers(rows: Sequence[RunRow], *, num_sources: int = 300, random: int = 0) -> dict[str, dict[str, Any]]:
    """What probes answered on each source image: the easiest are answered right, and near the border luck decides."""
    generator = np.random.default_rng(random)
    difficulty_S = generator.uniform(size=num_sources)
    sources = [f"image-{index:04d}" for index in range(num_sources)]

    def body(row: RunRow) -> dict[str, Any]:
        is_right_S = difficulty_S + generator.normal(scale=0.02, size=num_sources) < row.values["probe_top1"]
        return {"sources": sources, "rows": [1] * num_sources, "correct": {"probe_top1": is_right_S.astype(int).tolist()}}

    return {row.run_uid: body(row) for row in rows if row.stage == "confirm"}


def synthetic_comparison(
    *, ratio: float = 0.42, baselines: Sequence[str] = ("mae", "mae_all_tokens"), **changes: Any
) -> Comparison:
    """A whole comparison: CRATE-MAE needs `ratio` of the encoder parameters of either MAE; sensitivities, layers, exclusions.

    Args:
        ratio: The truth.
        baselines: Models of MAE.
        **changes: Of `synthetic_rows`.
    """
    law = Law()
    rows = synthetic_rows({"crate_mae": law.needing(ratio), **dict.fromkeys(baselines, law)}, **changes)
    grid = [
        {"mask_ratio": mask, "ista_step_size": step, "penalty": abs(mask - 0.75) / 5 + abs(step - 0.1) / 5}
        for mask in (0.5, 0.65, 0.75, 0.85)
        for step in (0.05, 0.1, 0.2)
    ]
    rows += synthetic_screening("crate_mae", law.needing(ratio), settings=grid, widths=(64, 128))
    without_ista = [{**item, "ista_step_size": None} for item in grid[1::3]]
    rows += synthetic_screening("mae", law, settings=without_ista, widths=(64, 128))
    killed = {"is_complete": False, "state": "KILLED", "incomplete": "killed", "values": {}, "sweep": "sweep"}
    rows.append(synthetic_row("mae", 48 * 64**2, width=64, seed=2000, **killed))
    return compare(
        rows,
        name="synthetic",
        layers=synthetic_layers,
        answers=synthetic_answers(rows),
        commands=("crate-ray compare out/synthetic",),
    )
