"""`crate-ray models`: what a model costs, in closed form; imports no torch.

In: names of presets or recipes, and keys to change. Out: parameters, operations and memory, as published and as here. All
of it is arithmetic on the configuration, so no model is built to print it.
"""

from collections.abc import Iterable
from typing import Annotated, Any

import typer

from crate_ray.cli.arguments import Json
from crate_ray.cli.output import console, print_json, print_table
from crate_ray.config import PRESETS, load_model

Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NAME]...", help="Presets or recipes; all presets by default.", show_default=False),
]
SetModel = Annotated[
    list[str],
    typer.Option("--set", metavar="model.KEY=VALUE", help="Price another shape: a key of the model; may be repeated."),
]

_COUNTS = ("paper", "total", "trainable", "encoder")
_PARAMETERS_NOTE = """\
published  as papers count: frozen position tables included, and what no forward pass uses
ours       what a weights file of this package holds
encoder    what is kept after pretraining
Of the published class that encodes all tokens, ours lacks decoder_embed, which no gradient reaches,
and the second of two equal position tables. It computes the same without them."""
_FLOPS_NOTE = """\
published     ISTA in three matrix products, every token predicted
two products  the same algebra in two; every token predicted
executed      in training: two products; last decoder layer and prediction of hidden patches only
encode        the features of one whole image, unmasked"""
_MEMORY_NOTE = """\
state          weights, gradients and AdamW's moments in float32, once
an image adds  what autograd keeps of it for the backward pass: fused attention, not compiled;
               bfloat16 by the rules of a GPU, on a CPU attention in bfloat16 keeps more"""


def models(names: Names = None, overrides: SetModel = [], as_json: Json = False) -> None:  # noqa: B006  typer reads the default
    """Print parameters, GFLOPs and training memory of presets, recipes, or a shape of your own."""
    rows = [_row(name, overrides) for name in names or PRESETS]
    if as_json:
        print_json(rows)
        return
    if overrides:
        console.print(f"changed    {', '.join(overrides)}\n", soft_wrap=True, markup=False)
    _print_parameters(rows)
    _print_flops(rows)
    _print_memory(rows)


def _row(name: str, overrides: Iterable[str]) -> dict[str, Any]:
    """One model's shape and costs, in parameters, operations and bytes."""
    from crate_ray.models import cost, memory

    config = load_model(name, overrides)
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
        "published_only_parameters": {"decoder_embed": count.dead_decoder_embed, "second_table": count.second_table},
        "forward_flops": cost.forward_flops(config),
        "two_products_forward_flops": cost.forward_flops(config, predicted="all"),
        "published_forward_flops": cost.published_forward_flops(config),
        "encode_flops": cost.encode_flops(config),
        "training_state_bytes": memory.training_state_bytes(config),
        "activation_bytes_per_image": {
            "float32": memory.activation_bytes(config),
            "bfloat16": memory.activation_bytes(config, precision="bfloat16"),
        },
    }


def _print_parameters(rows: list[dict[str, Any]]) -> None:
    print_table(
        ("preset", "published", "ours", "trainable", "encoder", "decoder\n_embed", "second\ntable"),
        [
            [
                row["preset"],
                *(f"{row['parameters'][key]:,}" for key in _COUNTS),
                *(f"-{count:,}" if count else "" for count in row["published_only_parameters"].values()),
            ]
            for row in rows
        ],
        title="Parameters",
    )
    console.print(f"\n{_PARAMETERS_NOTE}\n", soft_wrap=True)


def _print_flops(rows: list[dict[str, Any]]) -> None:
    keys = ("published_forward_flops", "two_products_forward_flops", "forward_flops", "encode_flops")
    print_table(
        ("preset", "image/patch", "hidden", "published", "two products", "executed", "encode"),
        [
            [
                row["preset"],
                f"{row['image_size']}/{row['patch_size']}",
                "" if row["mask_ratio"] is None else f"{row['mask_ratio']:.0%}",
                *(f"{row[key] / 1e9:.2f}" for key in keys),
            ]
            for row in rows
        ],
        title="Forward pass of one image (GFLOPs)",
    )
    console.print(f"\n{_FLOPS_NOTE}\n", soft_wrap=True)


def _print_memory(rows: list[dict[str, Any]]) -> None:
    print_table(
        ("preset", "state", "an image adds\nin float32", "\nin bfloat16"),
        [
            [
                row["preset"],
                _mebibytes(row["training_state_bytes"]),
                *(_mebibytes(size) for size in row["activation_bytes_per_image"].values()),
            ]
            for row in rows
        ],
        title="Memory of training (MiB)",
    )
    console.print(f"\n{_MEMORY_NOTE}", soft_wrap=True)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f}"
