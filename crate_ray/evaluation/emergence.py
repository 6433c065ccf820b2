r"""Whether objects emerge: attention and keys against the true object masks, as numbers.

In: the attention of the class token, the keys of the patches, and which patches lie on the object. Out: a Jaccard index
(intersection over union) an image, for each measure below. Nothing is trained and no label is read. A patch belongs to the
object when at least half of its pixels do.

Every number stands beside the same encoder untrained and beside `trivial_scores`, because a Jaccard index alone says
little: marking every patch already scores the object's share of the image, and picking the best of many random heads scores
more than one of them.

  attention_jaccard             the fewest patches that hold 60% of the mass, best head of each image: the protocol of
                                Caron et al. 2021 (DINO). The choice of the head sees the mask.
  attention_mean_jaccard        the same, averaged over heads: no choice
  attention_area_jaccard        as many patches as the object has, best head of each image: no threshold decides
  foreground_jaccard            first principal component of the keys, sign by the border (`foreground`): no choice
  foreground_best_sign_jaccard  the better of both signs for each image; the choice sees the mask

Change `EMERGENCE_PROTOCOL` whenever a number could change.

Shapes: B images, N patches, D width, H heads, K components, M rows.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crate_ray.evaluation.attention import LayerView

EMERGENCE_PROTOCOL = 1
MASS = 0.6
OBJECT_SHARE = 0.5

Scores = dict[str, NDArray[np.float64]]
"""Measure: a Jaccard index for each image, (B,)."""


def object_patches(masks_BHW: Tensor, patch_size: int) -> Tensor:
    """The patches that lie on the object, (B, N) bool."""
    cut = masks_BHW.float().unfold(1, patch_size, patch_size).unfold(2, patch_size, patch_size)
    return cut.mean(dim=(-2, -1)).flatten(1) >= OBJECT_SHARE


def score_layer(view: LayerView, object_BN: Tensor) -> Scores:
    """All measures of one layer; every image must have an object patch."""
    heads = _score_attention(view.cls_attention_BHN, object_BN)
    return {**heads, **_score_foreground(view.keys_BND, object_BN)}


def trivial_scores(patches_BNQ: Tensor, object_BN: Tensor, *, num_heads: int, seed: int = 0) -> dict[str, Scores]:
    """The same measures of what knows nothing of the object.

    Args:
        patches_BNQ: The images' pixels, a row a patch.
        object_BN: Patches on the object.
        num_heads: As many random maps an image as the model has heads: the best of them is a fair rival of the best head.
        seed: Of the random maps.

    Returns:
        `all_patches`: every patch marked; `centre`: the patches nearest to the centre, as many as objects have on average;
        `random_attention`: independent uniform weights; `pixels`: the foreground of the raw pixels, no model.
    """
    num_images, num_patches = object_BN.shape
    random = torch.rand(num_images, num_heads, num_patches, generator=torch.Generator().manual_seed(seed))
    central_N = torch.zeros(num_patches, dtype=torch.bool)
    central_N[_distance_to_centre(num_patches).argsort(stable=True)[: round(float(object_BN.sum(1).float().mean()))]] = True
    everything = {"jaccard": _array(jaccard(torch.ones_like(object_BN), object_BN))}
    return {
        "all_patches": everything,
        "centre": {"jaccard": _array(jaccard(central_N.expand_as(object_BN), object_BN))},
        "random_attention": _score_attention(random, object_BN),
        "pixels": _score_foreground(patches_BNQ, object_BN),
    }


def _score_attention(attention_BHN: Tensor, object_BN: Tensor) -> Scores:
    by_mass_BH = jaccard(hold_mass(attention_BHN, MASS), object_BN[:, None])
    by_area_BH = jaccard(keep_largest(attention_BHN, object_BN.sum(dim=1)[:, None]), object_BN[:, None])
    return {
        "attention_jaccard": _array(by_mass_BH.amax(dim=1)),
        "attention_mean_jaccard": _array(by_mass_BH.mean(dim=1)),
        "attention_area_jaccard": _array(by_area_BH.amax(dim=1)),
    }


def _score_foreground(features_BND: Tensor, object_BN: Tensor) -> Scores:
    found_BN = foreground(features_BND)
    both_2B = torch.stack([jaccard(found_BN, object_BN), jaccard(~found_BN, object_BN)])
    return {"foreground_jaccard": _array(both_2B[0]), "foreground_best_sign_jaccard": _array(both_2B.amax(dim=0))}


def _array(values: Tensor) -> NDArray[np.float64]:
    return values.double().numpy()


def jaccard(marked: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union along the last axis, float64; both are bool and broadcast. 0 where both are empty."""
    shared, either = (marked & truth).sum(-1), (marked | truth).sum(-1)
    return shared.double() / either.clamp(min=1)


def hold_mass(weights: Tensor, mass: float) -> Tensor:
    """Marks the fewest entries of the last axis that together hold at least `mass` of its sum; of equal ones the first."""
    ordered = weights.double().sort(dim=-1, descending=True, stable=True)
    before = ordered.values.cumsum(-1) - ordered.values
    kept = before < mass * ordered.values.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter(-1, ordered.indices, kept)


def keep_largest(weights: Tensor, counts: Tensor) -> Tensor:
    """Marks the `counts` largest entries of the last axis; of equal ones the first. `counts` lacks that axis."""
    ranks = weights.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return ranks < counts.unsqueeze(-1)


def foreground(features_BND: Tensor) -> Tensor:
    """Splits the patches of each image in two by one principal component of all images' patches together: (B, N) bool.

    Each image's mean is taken off first, so that the component is what varies within images, and the cut is at that mean.
    A component has no sign, and between images of unlike objects not even one that holds for all: in each image the side
    with fewer of the border's patches is the foreground (a tie goes to the positive side). No mask is looked at.

    Differs from the published pictures, made of a few images of one kind: they take off one mean over all patches, cut at
    a threshold set by hand, fill holes, and leave the sign to the reader. With unlike backgrounds the common mean leaves
    whole images on one side.
    """
    features_BND = features_BND.double()
    centred_BND = features_BND - features_BND.mean(dim=1, keepdim=True)
    _, components_DK = principal_components(centred_BND.flatten(0, 1), 1)
    positive_BN = (centred_BND @ components_DK).squeeze(-1) > 0
    border_N = _border(features_BND.shape[1])
    num_border = int(border_N.sum())
    flipped_B: Tensor = positive_BN[:, border_N].sum(dim=1) * 2 > num_border
    return positive_BN ^ flipped_B[:, None]


def key_colours(keys_BND: Tensor, foreground_BN: Tensor) -> Tensor:
    """Three principal components of the foreground's keys as colours, (B, N, 3) in [0, 1]; black elsewhere.

    One PCA over the foreground of all images, so that equal colours mean like keys; each image is then stretched to the
    full range by itself, as in the published pictures.
    """
    colours_BN3 = torch.zeros(*foreground_BN.shape, 3, dtype=torch.float64)
    chosen_MD = keys_BND[foreground_BN]
    if len(chosen_MD) == 0:
        return colours_BN3
    mean_D, components_DK = principal_components(chosen_MD, min(3, keys_BND.shape[-1]))
    for image, (keys_ND, marked_N) in enumerate(zip(keys_BND, foreground_BN, strict=True)):
        if marked_N.any():
            values_MK = (keys_ND[marked_N].double() - mean_D) @ components_DK
            low_K, high_K = values_MK.amin(dim=0), values_MK.amax(dim=0)
            stretched = (values_MK - low_K) / (high_K - low_K).clamp(min=1e-12)
            colours_BN3[image, marked_N, : values_MK.shape[1]] = stretched
    return colours_BN3


def principal_components(rows_MD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The mean and the leading eigenvectors of the covariance, in float64.

    Returns:
        mean_D and components_DK, K = `count`, orthonormal, by falling variance. The sign of each is fixed by its entry of
        largest magnitude, which is positive.
    """
    rows_MD = rows_MD.double()
    mean_D = rows_MD.mean(dim=0)
    centred_MD = rows_MD - mean_D
    _, vectors_DD = torch.linalg.eigh(centred_MD.T @ centred_MD)
    components_DK = vectors_DD.flip(1)[:, :count]
    largest_1K = components_DK.abs().argmax(dim=0, keepdim=True)
    return mean_D, components_DK * components_DK.gather(0, largest_1K).sign()


def _border(num_patches: int) -> Tensor:
    side = round(num_patches**0.5)
    grid = torch.ones(side, side, dtype=torch.bool)
    grid[1:-1, 1:-1] = False
    return grid.flatten()


def _distance_to_centre(num_patches: int) -> Tensor:
    side = round(num_patches**0.5)
    squared: Tensor = (torch.arange(side) - (side - 1) / 2).square()
    return (squared[:, None] + squared).flatten()
