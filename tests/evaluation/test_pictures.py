"""Grids, reconstructions and labelled figures, pixel by pixel where pixels can be foretold."""

import io

import numpy as np
import pytest
import torch

from crate_ray.evaluation.figures import Curve, Panel, colour_maps, enlarge_patches, label_grid, plot_layers
from crate_ray.evaluation.intervals import Interval
from crate_ray.evaluation.pictures import GAP, encode_png, reconstruct, reconstruction_grid, tile_grid, to_pixels
from crate_ray.models import MaskedAutoencoder, create_model

MEAN, STD = (0.2, 0.5, 0.7), (0.1, 0.2, 0.3)


def decode_png(data: bytes) -> np.ndarray:
    """By matplotlib, which did not write the plain grids."""
    from matplotlib.image import imread

    return (imread(io.BytesIO(data))[..., :3] * 255).round().astype(np.uint8)


def small_model(**overrides: object) -> MaskedAutoencoder:
    torch.manual_seed(0)
    shape = {"image_size": 16, "patch_size": 4, "width": 16, "num_heads": 2, "encoder_depth": 1, "decoder_depth": 1}
    model = create_model("crate_mae_tiny", **{**shape, "decoder_width": 16, "decoder_num_heads": 2, **overrides})
    assert isinstance(model, MaskedAutoencoder)
    return model


def cut(images: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """One 4 x 4 patch of every image, without `patchify`."""
    return images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]


def test_a_grid_holds_every_image_whole_at_its_place_on_white() -> None:
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randint(0, 255, (2, 3, 100, 100), dtype=torch.uint8, generator=generator) for _ in range(3)]
    picture = reconstruction_grid(columns[0], columns[1], columns[2:])
    pitch = 100 + GAP
    assert picture.shape == (GAP + 2 * pitch, GAP + 3 * pitch, 3)
    assert picture.dtype == np.uint8
    rest = picture.copy()
    for j, column in enumerate(columns):
        for i in range(2):
            place = np.s_[GAP + i * pitch : (i + 1) * pitch, GAP + j * pitch : (j + 1) * pitch]
            assert (picture[place] == column[i].permute(1, 2, 0).numpy()).all()
            rest[place] = 255
    assert (rest == 255).all()


def test_small_images_grow_by_whole_factors_and_large_ones_shrink_where_asked() -> None:
    image = torch.arange(32, dtype=torch.uint8).repeat(1, 3, 32, 1)
    picture = tile_grid([image])
    assert picture.shape[0] == 3 * 32 + 2 * GAP
    assert (picture[GAP, GAP:-GAP, 0] == np.arange(32).repeat(3)).all()
    assert tile_grid([torch.zeros(1, 3, 224, 224, dtype=torch.uint8)], tile_side=96).shape[0] == 96 + 2 * GAP


def test_columns_of_different_shapes_and_an_empty_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="the columns of a grid have one shape"):
        tile_grid([torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)])
    with pytest.raises(ValueError, match="none"):
        tile_grid([])


def test_png_bytes_hold_the_picture_exactly() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    assert (decode_png(encode_png(picture)) == picture).all()


def test_pixels_survive_normalisation_and_back_and_nan_is_grey() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)
    normalised = (pixels / 255 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    assert (to_pixels(normalised, mean=MEAN, std=STD) == pixels).all()
    far = torch.tensor([torch.nan, 1e6, -1e6, 0.0]).view(1, 1, 2, 2).repeat(1, 3, 1, 1)
    assert to_pixels(far, mean=(0, 0, 0), std=(1, 1, 1))[0, 0].flatten().tolist() == [128, 255, 0, 0]


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_a_reconstruction_shows_the_image_where_visible_and_the_prediction_where_hidden(norm_pix_loss: bool) -> None:
    model = small_model(norm_pix_loss=norm_pix_loss)
    images, noise = torch.randn(3, 3, 16, 16), torch.rand(3, 16)
    found = reconstruct(model, images, noise)
    output = model(images, noise)
    for number in range(16):
        row, column = divmod(number, 4)
        patch, pasted, predicted, visible = (
            cut(part, row, column) for part in (images, found.pasted, found.predicted, found.visible)
        )
        # A patch's values are stored row by row, the three channels of a pixel together.
        expected = output.pred[:, number].reshape(3, 4, 4, 3).permute(0, 3, 1, 2)
        if norm_pix_loss:
            flat = patch.flatten(1)
            spread = (flat.var(dim=1, unbiased=True) + 1e-6).sqrt()
            expected = expected * spread.view(3, 1, 1, 1) + flat.mean(dim=1).view(3, 1, 1, 1)
        torch.testing.assert_close(predicted, expected)
        for image in range(3):
            if output.mask[image, number]:
                assert torch.equal(pasted[image], predicted[image])
                assert visible[image].isnan().all()
            else:
                assert torch.equal(pasted[image], patch[image])
                assert torch.equal(visible[image], patch[image])


def test_the_loss_of_what_is_shown_is_the_loss_that_was_trained() -> None:
    model = small_model()
    images, noise = torch.randn(3, 3, 16, 16), torch.rand(3, 16)
    found = reconstruct(model, images, noise)
    hidden = found.visible.isnan()
    shown = (found.pasted - images)[hidden].square().mean()
    torch.testing.assert_close(shown, model.losses(images, noise).mean())


def test_a_map_runs_from_dark_to_bright_a_patch_at_a_time() -> None:
    from matplotlib import colormaps

    maps = colour_maps(torch.tensor([[0.1, 0.2, 0.3, 0.5], [7.0, 7.0, 7.0, 7.0]]), 8)
    assert maps.shape == (2, 3, 8, 8)
    viridis = (np.array(colormaps["viridis"].colors) * 255).round()
    assert (maps[0, :, :4, :4].flatten(1).T.numpy() == viridis[0]).all()
    assert (maps[0, :, 4:, 4:].flatten(1).T.numpy() == viridis[-1]).all()
    assert (maps[0, :, :4, 4:].flatten(1).T.numpy() == viridis[round(255 / 4)]).all()
    assert (maps[1].flatten(1).T.numpy() == viridis[0]).all(), "a flat map has no bright spot"


def test_patches_lie_row_by_row_when_they_are_enlarged() -> None:
    colours = torch.zeros(1, 4, 3)
    colours[0, 1] = torch.tensor([1.0, 0.5, 0.0])
    picture = enlarge_patches(colours, 6)
    assert picture[0, :, :3, 3:].flatten(1).T.unique(dim=0).tolist() == [[255, 128, 0]]
    assert picture.sum() == 9 * (255 + 128)


def test_a_labelled_grid_shows_its_tiles_pixel_for_pixel() -> None:
    tiles = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    drawn = decode_png(label_grid({"one": tiles, "two\nlines": tiles}, ["a", "b"], title="title", note=["a note"]))
    grid = tile_grid([tiles, tiles])
    height, width = grid.shape[:2]
    found = [
        (top, left)
        for top in range(20, drawn.shape[0] - height + 1)
        for left in (96, 97)
        if (drawn[top : top + height, left : left + width] == grid).all()
    ]
    assert len(found) == 1


def test_curves_by_layer_are_drawn_with_gaps_bands_and_levels() -> None:
    curves = [
        Curve("rate", [None, 2.0, 3.0], "#D55E00"),
        Curve("rate", [Interval(1.0, 0.5, 1.5), Interval(2.0, 1.5, 2.5), None], "#0072B2", is_trained=False),
    ]
    picture = decode_png(plot_layers([Panel("panel", "nats", curves, {"floor": 0.5})] * 2, title="title", note="note"))
    present = {tuple(colour) for colour in picture.reshape(-1, 3).tolist()}
    assert {(0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)} <= present
    with pytest.raises(ValueError, match="no panels"):
        plot_layers([], title="nothing")
