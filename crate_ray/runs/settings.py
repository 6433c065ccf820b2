"""What tells runs apart in a table: the model's name, its shape and the tuning, from the configuration.

In: a RunConfig. Out: plain values by short names, the same in MLflow's parameters and in the rows of comparisons. A few of the
keys, not the whole configuration.
"""

from typing import Any

from crate_ray.config import ModelConfig, RunConfig


def settings_of(config: RunConfig, precision: str | None = None) -> dict[str, Any]:
    """Shape and tuning of a run; None where the model has no such thing.

    Args:
        config: Of the run.
        precision: The resolved one.
    """
    model = config.model
    name = model_name(model)
    return {
        "model": name,
        "arch": " ".join([name, *model.ablation, f"{model.encoder_depth}x{model.width}"]),
        "depth": model.encoder_depth,
        "width": model.width,
        "heads": model.num_heads,
        "patch": model.patch_size,
        "mask_ratio": model.mask_ratio if model.num_classes is None else None,
        "ista_step_size": model.ista_step_size if model.has_ista else None,
        "ista_lambda": model.ista_lambda if model.has_ista else None,
        "dataset": "+".join(dataset_name(url) for url in config.data.train_urls),
        "global_batch": config.train.global_batch,
        "lr": config.optimizer.peak_lr(config.train.global_batch),
        "wd": config.optimizer.weight_decay,
        "seed": config.train.seed,
        "precision": precision or config.train.precision,
    }


def model_name(model: ModelConfig) -> str:
    """The model as the presets call it, without a size; a classifier with an autoencoder's encoder after its family."""
    if model.num_classes is not None:
        return "crate" if model.embedding == "normed" else f"{model.family}_linear"
    if model.family == "crate":
        return "crate_mae" if model.encoder_tokens == "all" else "crate_mae_visible"
    return "mae" if model.encoder_tokens == "visible" else "mae_all_tokens"


def dataset_name(uri: str) -> str:
    """The data set's folder: the last component that is not the name of a split."""
    parts = [part for part in uri.split("/") if part]
    while len(parts) > 1 and parts[-1] in ("train", "validation", "test"):
        parts.pop()
    return parts[-1] if parts else uri
