"""`crate-ray models`: what each preset costs, in closed form; imports no torch.

In: names of presets. Out: parameters and floating point operations, by our count and as published. The counts
are arithmetic on the configuration, so they are exact, and no model is built to print them.
"""

from typing import Annotated, Any

import typer

from crate_ray.cli.arguments import Json
from crate_ray.cli.output import console, print_json, print_table
from crate_ray.config import PRESETS, ModelConfig, preset_values

Names = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME]...", help="Presets; all of them by default.", show_default=False)
]

_COUNTS = ("paper", "total", "trainable", "encoder")
_NOTE = """\
paper      as papers count: frozen position tables included
total      what a weights file of this package holds
encoder    what is kept after pretraining
executed   ISTA in two matrix products, prediction of hidden patches only
published  three products, every patch predicted
encode     the features of one whole image, unmasked"""


def models(names: Names = None, as_json: Json = False) -> None:
    """Print parameters and GFLOPs of the presets."""
    rows = [_row(name) for name in names or PRESETS]
    if as_json:
        print_json(rows)
        return
    print_table(
        ("preset", "family", "tokens", *_COUNTS),
        [
            [row["preset"], row["family"], row["encoder_tokens"] or "-", *(_millions(row, key) for key in _COUNTS)]
            for row in rows
        ],
        title="Parameters (millions)",
    )
    console.print()
    print_table(
        ("preset", "image", "mask", "executed", "published", "encode"),
        [_flops_cells(row) for row in rows],
        title="Forward pass of one image (GFLOPs)",
    )
    console.print()
    console.print(_NOTE, soft_wrap=True)


def _row(name: str) -> dict[str, Any]:
    """One preset's shape and costs, in parameters and operations."""
    from crate_ray.models import cost

    preset_values(name)  # an unknown name is refused here, with the valid ones
    config = ModelConfig.parse({"preset": name}, where=f"preset {name}")
    is_classifier = config.num_classes is not None
    count = cost.count_parameters(config)
    return {
        "preset": name,
        "family": config.family,
        "encoder_tokens": None if is_classifier else config.encoder_tokens,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "mask_ratio": None if is_classifier else config.mask_ratio,
        "parameters": {key: getattr(count, key) for key in _COUNTS},
        "forward_flops": cost.forward_flops(config),
        "published_forward_flops": cost.published_forward_flops(config),
        "encode_flops": cost.encode_flops(config),
    }


def _millions(row: dict[str, Any], key: str) -> str:
    return f"{row['parameters'][key] / 1e6:.2f}"


def _flops_cells(row: dict[str, Any]) -> list[str]:
    mask = "-" if row["mask_ratio"] is None else f"{row['mask_ratio']:g}"
    flops = (f"{row[key] / 1e9:.2f}" for key in ("forward_flops", "published_forward_flops", "encode_flops"))
    return [row["preset"], f"{row['image_size']}/{row['patch_size']}", mask, *flops]
