"""What every encoder layer looks at: the attention of the class token, and the keys of the patches.

In: a model and normalised, unmasked images. Out: one `LayerView` a layer, in order. All images go through one layer before
the next is looked at, so memory holds one layer's tokens and keys whatever the depth, and every layer runs once. Computed in
float32: attention from queries and keys, since the fused kernels never give it out.

The published helper shows the penultimate layer of the encoder, the authors' book the last (`default_layers`: both).

Shapes: B images, N patches, D width, H heads, P head width; 1+N with the class token.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crate_ray.models import Classifier, MaskedAutoencoder
from crate_ray.models.blocks import CrateEncoderLayer, SelfAttention, SubspaceAttention, TransformerLayer

BATCH = 64


@dataclass(frozen=True)
class LayerView:
    """One encoder layer, seen from outside; tensors on the CPU.

    Attributes:
        number: From 1.
        cls_attention_BHN: Attention of the class token to each patch, per head. Its attention to itself is left out and
            the rest rescaled to sum 1, as in the published pictures.
        keys_BND: Keys of the patches, heads side by side, class token dropped: U^T LN1(Z) of tied attention, whose keys,
            queries and values are one, and the k part of `qkv` of any other.
    """

    number: int
    cls_attention_BHN: Tensor
    keys_BND: Tensor


def default_layers(depth: int) -> tuple[int, ...]:
    """The layers worth a picture: penultimate and last, from 1."""
    return tuple(range(max(1, depth - 1), depth + 1))


@torch.inference_mode()
def view_layers(model: MaskedAutoencoder | Classifier, images_BCHW: Tensor) -> Iterator[LayerView]:
    """Walks the encoder layer by layer.

    Args:
        model: Its encoder sees every patch, as in every probe.
        images_BCHW: Normalised images, on any device; they go to the model's in parts of `BATCH`.
    """
    device = next(model.parameters()).device
    parts = [model.embed(part.to(device)) for part in torch.split(images_BCHW, BATCH)]
    for number, block in enumerate(model.encoder_layers, start=1):
        seen = [_look(block, part) for part in parts]
        attention, keys = (torch.cat(tensors) for tensors in zip(*seen, strict=True))
        yield LayerView(number, attention, keys)
        parts = [block(part) for part in parts]


def _look(block: nn.Module, z_BND: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of the class token over patches, and the patches' keys, on the CPU."""
    assert isinstance(block, CrateEncoderLayer | TransformerLayer)
    queries_BHNP, keys_BHNP = _queries_and_keys(block.attn, block.norm1(z_BND))
    scale = queries_BHNP.shape[-1] ** -0.5
    logits_BHN = (queries_BHNP[:, :, :1] @ keys_BHNP.transpose(-2, -1)).squeeze(2) * scale
    # The softmax over patches alone is the softmax over all tokens, rescaled to sum 1 without the class token.
    attention_BHN = logits_BHN[..., 1:].float().softmax(dim=-1)
    return attention_BHN.cpu(), keys_BHNP[:, :, 1:].transpose(1, 2).flatten(2).float().cpu()


def _queries_and_keys(attention: SubspaceAttention | SelfAttention, normed_BND: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(attention, SubspaceAttention):
        subspaces_BHNP = attention.project(normed_BND)
        return subspaces_BHNP, subspaces_BHNP
    qkv = attention.qkv(normed_BND).unflatten(-1, (3, attention.num_heads, -1))
    queries_BHNP, keys_BHNP, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return queries_BHNP, keys_BHNP
