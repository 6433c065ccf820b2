"""State dicts of other code, read by their keys, and put under our names or theirs.

In: a state dict. Out: which of the known layouts it has, the same tensors under our names, what their shapes tell of the
model; and back: our tensors under published names. Only names and the form of the patch embedding change here; which
tensors a model wants is decided in `weights`.

  crate-ray         ours
  crate             the CRATE repository's masked autoencoder with CRATE layers
  crate-classifier  its supervised classifier
  mae               facebookresearch/mae before fine-tuning, and the CRATE repository's ViT baseline, which has the same keys
  mae-finetune      facebookresearch/mae after fine-tuning: a head, and `fc_norm` where tokens are averaged

What shapes cannot tell: the number of heads (but for one), lambda, eta, and whether an autoencoder's encoder saw mask tokens.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

Layout = Literal["crate-ray", "crate", "crate-classifier", "mae", "mae-finetune"]
Names = tuple[tuple[str, str], ...]

# Published prefixes and ours; "#" is the number of a layer. A published CRATE layer is a pair of pre-norm halves: attention
# and ISTA in an encoder, synthesis and attention in a decoder.
_ENCODER_HALVES: Names = (
    ("0.norm.", "norm1."),
    ("0.fn.qkv.", "attn.qkv."),
    ("0.fn.to_out.0.", "attn.proj."),
    ("1.norm.", "norm2."),
    ("1.fn.weight", "ista.dictionary"),
)
_DECODER_HALVES: Names = (
    ("0.norm.", "norm1."),
    ("0.fn.weight", "dictionary"),
    ("1.norm.", "norm2."),
    ("1.fn.qkv.", "attn.qkv."),
    ("1.fn.to_out.0.", "attn.proj."),
)
_MAE: Names = (("patch_embed.proj.", "patch_embed."),)
_CRATE: Names = (
    *_MAE,
    *((f"blocks.#.layers.0.{theirs}", f"blocks.#.{ours}") for theirs, ours in _ENCODER_HALVES),
    *((f"decoder_blocks.#.layers.0.{theirs}", f"decoder_blocks.#.{ours}") for theirs, ours in _DECODER_HALVES),
)
_CRATE_CLASSIFIER: Names = (
    ("to_patch_embedding.1.", "patch_norm."),
    ("to_patch_embedding.2.", "patch_embed."),
    ("to_patch_embedding.3.", "embed_norm."),
    ("pos_embedding", "pos_embed"),
    ("mlp_head.0.", "norm."),
    ("mlp_head.1.", "head."),
    *((f"transformer.layers.#.{theirs}", f"blocks.#.{ours}") for theirs, ours in _ENCODER_HALVES),
)
_NAMES: dict[Layout, Names] = {
    "crate-ray": (),
    "crate": _CRATE,
    "crate-classifier": _CRATE_CLASSIFIER,
    "mae": _MAE,
    "mae-finetune": _MAE,
}
_LAYER = re.compile(r"^(?:blocks|decoder_blocks|transformer\.layers)\.(\d+)\.")


def recognise(state: Mapping[str, Any]) -> Layout | None:
    """The layout whose keys these are, or None."""
    if "patch_embed.weight" in state:
        return "crate-ray"
    if "to_patch_embedding.2.weight" in state:
        return "crate-classifier"
    if "patch_embed.proj.weight" not in state:
        return None
    if any(".layers.0." in key for key in state):
        return "crate"
    return "mae-finetune" if state.keys() & {"head.weight", "fc_norm.weight"} else "mae"


def to_ours(state: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The tensors under our names; a convolutional patch embedding becomes one on rows (row, column, channel)."""
    renamed = {_rename(key, _NAMES[layout]): value for key, value in state.items()}
    weight = renamed.get("patch_embed.weight")
    if isinstance(weight, Tensor) and weight.ndim == 4:  # (D, C, p, p)
        renamed["patch_embed.weight"] = weight.permute(0, 2, 3, 1).flatten(1)
    return renamed


def to_published(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Our tensors under the names and in the form of a published layout."""
    back = tuple((ours, theirs) for theirs, ours in _NAMES[layout])
    renamed = {_rename(key, back): value for key, value in state.items()}
    weight = renamed.get("patch_embed.proj.weight")
    if weight is not None:
        side = math.isqrt(weight.shape[1] // 3)
        renamed["patch_embed.proj.weight"] = weight.reshape(-1, side, side, 3).permute(0, 3, 1, 2)
    return {key: value.contiguous() for key, value in renamed.items()}


def _rename(key: str, names: Names) -> str:
    match = _LAYER.match(key)
    number = match[1] if match else "#"
    for old, new in names:
        prefix = old.replace("#", number)
        if key.startswith(prefix):
            return new.replace("#", number) + key.removeprefix(prefix)
    return key


@dataclass(frozen=True)
class Architecture:
    """What names and shapes tell of a model; None where they do not."""

    family: Literal["crate", "vit"] | None
    encoder_depth: int
    decoder_depth: int
    width: int | None
    decoder_width: int | None
    patch_size: int | None
    image_size: int | None
    num_classes: int | None
    qkv_bias: bool
    is_normed: bool
    """Whether the patch embedding has LayerNorms before and after it, as in the CRATE classifier."""
    has_decoder: bool

    def __str__(self) -> str:
        layers = {"crate": "CRATE", "vit": "transformer", None: "unknown"}[self.family]
        text = f"{layers} layers: {self.encoder_depth} encoder layers of width {self.width}"
        if self.has_decoder:
            text += f", {self.decoder_depth} decoder layers of width {self.decoder_width}"
        elif self.num_classes is None:
            text += ", no decoder"
        else:
            text += f", a head of {self.num_classes} classes"
        return f"{text}, patches of {self.patch_size} pixels, images of {self.image_size}"


def infer_architecture(state: Mapping[str, Any]) -> Architecture:
    """Reads the architecture from a state dict under our names, complete or not."""
    shapes = {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}

    def size(key: str, axis: int, ndim: int) -> int | None:
        shape = shapes.get(key, ())
        return shape[axis] if len(shape) == ndim else None

    patch_size = _whole_root(size("patch_embed.weight", 1, 2), 3)
    grid_side = _whole_root((size("pos_embed", 1, 3) or 0) - 1, 1)
    return Architecture(
        family=_family(shapes),
        encoder_depth=_depth(shapes, "blocks"),
        decoder_depth=_depth(shapes, "decoder_blocks"),
        width=size("patch_embed.weight", 0, 2),
        decoder_width=size("mask_token", 2, 3),
        patch_size=patch_size,
        image_size=patch_size * grid_side if patch_size and grid_side else None,
        num_classes=size("head.weight", 0, 2),
        qkv_bias="blocks.0.attn.qkv.bias" in shapes,
        is_normed="patch_norm.weight" in shapes,
        has_decoder=any(is_of_decoder(key) for key in state),
    )


def _family(shapes: Mapping[str, tuple[int, ...]]) -> Literal["crate", "vit"] | None:
    """The decoder's, which ablations leave alone; without one the encoder's, if both halves of its layers are of one family."""
    if "decoder_blocks.0.dictionary" in shapes:
        return "crate"
    if "decoder_blocks.0.mlp.fc1.weight" in shapes:
        return "vit"
    rows, columns = shapes.get("blocks.0.attn.qkv.weight", (0, 0))
    if "blocks.0.ista.dictionary" in shapes and rows == columns:
        return "crate"
    return "vit" if "blocks.0.mlp.fc1.weight" in shapes and rows == 3 * columns else None


def is_of_decoder(key: str) -> bool:
    """Whether a tensor of that name, one of ours, belongs to a decoder."""
    return key == "mask_token" or key.startswith("decoder_")


def _depth(shapes: Mapping[str, Any], stack: str) -> int:
    return len({key.split(".")[1] for key in shapes if key.startswith(f"{stack}.")})


def _whole_root(value: int | None, factor: int) -> int | None:
    """N where value = factor n^2."""
    root = math.isqrt(value // factor) if value and value > 0 else 0
    return root if root and factor * root**2 == value else None
