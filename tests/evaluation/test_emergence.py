"""Attention, keys and Jaccard indices against plain loops, scikit-learn and hand-made cases."""

import numpy as np
import pytest
import torch

from crate_ray.evaluation.attention import LayerView, default_layers, view_layers
from crate_ray.evaluation.emergence import (
    foreground,
    hold_mass,
    jaccard,
    keep_largest,
    key_colours,
    object_patches,
    principal_components,
    score_layer,
    trivial_scores,
)
from crate_ray.models import create_model

SHAPE = {"image_size": 16, "patch_size": 4, "width": 16, "num_heads": 2, "encoder_depth": 3, "decoder_depth": 1}


def grid(text: str) -> torch.Tensor:
    """`"#.. / .#."` as booleans, row by row."""
    return torch.tensor([character == "#" for character in text if character in "#."])


@pytest.mark.parametrize("preset", ["crate_mae_tiny", "mae_small"])
def test_every_layer_is_seen_as_the_model_computes_it(preset: str) -> None:
    torch.manual_seed(0)
    model = create_model(preset, **SHAPE, decoder_width=16, decoder_num_heads=2)
    inputs: list[torch.Tensor] = []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda _module, _args, output: inputs.append(output))
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        model.encode(images)
    expected = list(inputs)
    views = list(view_layers(model, images))
    assert [view.number for view in views] == [1, 2, 3]
    for view, stacked in zip(views, expected, strict=True):
        queries, keys = (stacked[..., :16], stacked[..., -32:-16] if stacked.shape[-1] == 48 else stacked)
        for image in range(3):
            torch.testing.assert_close(view.keys_BND[image], keys[image, 1:])
            for head in range(2):
                part = slice(8 * head, 8 * head + 8)
                weights = torch.softmax(keys[image][:, part] @ queries[image, 0, part] / 8**0.5, dim=0)
                torch.testing.assert_close(view.cls_attention_BHN[image, head], weights[1:] / weights[1:].sum())


def test_the_classifier_is_seen_too_and_many_images_as_few() -> None:
    torch.manual_seed(0)
    shape = {key: value for key, value in SHAPE.items() if key != "decoder_depth"}
    model = create_model("crate_tiny", **shape, num_classes=3)
    images = torch.randn(130, 3, 16, 16)
    for all_at_once, some in zip(view_layers(model, images), view_layers(model, images[100:]), strict=True):
        torch.testing.assert_close(all_at_once.keys_BND[100:], some.keys_BND)
        assert all_at_once.cls_attention_BHN.shape == (130, 2, 16)


def test_the_last_two_layers_are_pictured() -> None:
    assert [default_layers(depth) for depth in (1, 2, 12)] == [(1,), (1, 2), (11, 12)]


def test_a_patch_is_the_objects_when_half_of_its_pixels_are() -> None:
    masks = torch.zeros(1, 8, 8, dtype=torch.bool)
    masks[0, :4, :2] = True  # half of the first patch
    masks[0, 4:, 4:] = True
    masks[0, 0:4, 4:5] = True  # a quarter of the second
    assert object_patches(masks, 4).tolist() == [[True, False, False, True]]


def test_the_mass_is_held_by_the_fewest_patches() -> None:
    weights = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25], [0.0, 6.0, 0.0, 0.0]])
    assert hold_mass(weights, 0.6).tolist() == [
        [False, True, True, False],
        [True, True, True, False],
        [False, True, False, False],
    ]
    generator = torch.Generator().manual_seed(0)
    for row in torch.rand(20, 30, generator=generator, dtype=torch.float64):
        order = sorted(range(30), key=lambda at: -row[at])
        count = next(k for k in range(1, 31) if row[order[:k]].sum() >= 0.6 * row.sum())
        assert set(hold_mass(row, 0.6).nonzero().flatten().tolist()) == set(order[:count])


def test_as_many_patches_are_kept_as_asked_for() -> None:
    weights = torch.tensor([[3.0, 1.0, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    assert keep_largest(weights, torch.tensor([2, 3])).tolist() == [[True, False, True, False], [True, True, True, False]]


def test_the_jaccard_index_is_intersection_over_union() -> None:
    marked, truth = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]).bool(), torch.tensor([[0, 1, 1, 0]]).bool()
    assert jaccard(marked, truth).tolist() == [pytest.approx(1 / 3), 0, 0]
    assert jaccard(torch.zeros(1, 4).bool(), torch.zeros(1, 4).bool()).tolist() == [0]


def test_components_are_those_of_scikit_learn_with_a_fixed_sign() -> None:
    from sklearn.decomposition import PCA

    rows = np.random.default_rng(0).normal(size=(200, 6)) * [5, 4, 3, 2, 1, 0.5] + 7
    reference = PCA(n_components=3, svd_solver="full").fit(rows)
    mean, components = principal_components(torch.from_numpy(rows), 3)
    np.testing.assert_allclose(mean.numpy(), reference.mean_)
    np.testing.assert_allclose(components.T.abs().numpy(), np.abs(reference.components_), atol=1e-9)
    assert (components.gather(0, components.abs().argmax(dim=0, keepdim=True)) > 0).all()
    torch.testing.assert_close(components.T @ components, torch.eye(3, dtype=torch.float64))


OBJECT = grid(".... .##. .##. ....")
CORNER = grid("##.. ##.. .... ....")


def keys_of(*objects: torch.Tensor, swap: bool = False) -> torch.Tensor:
    """Keys that differ between an image's object and its background along one direction, and by noise along the others."""
    generator = torch.Generator().manual_seed(0)
    keys = 0.1 * torch.randn(len(objects), 16, 5, generator=generator)
    for image, inside in enumerate(objects):
        high = inside if not (swap and image % 2) else ~inside
        keys[image, :, 0] += torch.where(high, 3.0, -3.0)
        keys[image] += 50 * torch.randn(5, generator=generator)  # every image lies elsewhere
    return keys


@pytest.mark.parametrize("swap", [False, True])
def test_the_foreground_is_the_side_away_from_the_border_whatever_the_sign(swap: bool) -> None:
    found = foreground(keys_of(OBJECT, OBJECT, CORNER, OBJECT, swap=swap))
    assert torch.equal(found, torch.stack([OBJECT, OBJECT, CORNER, OBJECT]))
    assert torch.equal(foreground(-keys_of(OBJECT, OBJECT, swap=swap)), torch.stack([OBJECT, OBJECT]))


def test_colours_span_each_images_foreground_and_nothing_else() -> None:
    keys = keys_of(OBJECT, CORNER, OBJECT)
    marked = torch.stack([OBJECT, CORNER, torch.zeros(16, dtype=torch.bool)])
    colours = key_colours(keys, marked)
    assert (colours[~marked] == 0).all()
    for image in (0, 1):
        inside = colours[image, marked[image]]
        assert inside.amin(dim=0).tolist() == [0, 0, 0]
        assert inside.amax(dim=0).tolist() == pytest.approx([1, 1, 1])
    assert (key_colours(keys, torch.zeros_like(marked)) == 0).all()


def test_scores_of_a_layer_choose_the_best_head_of_each_image() -> None:
    on_object, elsewhere = OBJECT.float() + 1e-3, (~OBJECT).float()
    attention = torch.stack([torch.stack([on_object, elsewhere]), torch.stack([elsewhere, elsewhere])])
    truth = OBJECT.expand(2, -1)
    scores = score_layer(LayerView(1, attention, keys_of(OBJECT, OBJECT)), truth)
    # 60% of four equal weights are three of them; 60% of twelve are eight.
    assert scores["attention_jaccard"].tolist() == [3 / 4, 0]
    assert scores["attention_mean_jaccard"].tolist() == [3 / 8, 0]
    assert scores["attention_area_jaccard"].tolist() == [1, 0]
    assert scores["foreground_jaccard"].tolist() == [1, 1]
    assert scores["foreground_best_sign_jaccard"].tolist() == [1, 1]


def test_an_object_at_the_border_is_lost_to_the_border_rule_and_found_by_the_better_sign() -> None:
    frame = grid("#### #..# #..# ####")
    view = LayerView(1, torch.ones(1, 1, 16), keys_of(frame))
    scores = score_layer(view, frame[None])
    assert (scores["foreground_jaccard"].tolist(), scores["foreground_best_sign_jaccard"].tolist()) == ([0], [1])


def test_trivial_scores_are_what_they_say() -> None:
    truth = torch.stack([OBJECT, CORNER])
    pixels = keys_of(OBJECT, CORNER)
    scores = trivial_scores(pixels, truth, num_heads=3)
    assert scores["all_patches"]["jaccard"].tolist() == [4 / 16, 4 / 16]
    assert scores["centre"]["jaccard"].tolist() == [1, pytest.approx(1 / 7)]
    assert scores["pixels"]["foreground_jaccard"].tolist() == [1, 1]
    random = scores["random_attention"]
    assert (random["attention_jaccard"] >= random["attention_mean_jaccard"]).all()
    again = trivial_scores(pixels, truth, num_heads=3)["random_attention"]
    assert all((again[name] == random[name]).all() for name in random)


def test_the_best_of_many_random_heads_scores_more_than_one() -> None:
    truth = OBJECT.expand(200, -1)
    scores = trivial_scores(torch.randn(200, 16, 3), truth, num_heads=12)["random_attention"]
    assert scores["attention_area_jaccard"].mean() > 2 * scores["attention_mean_jaccard"].mean()
