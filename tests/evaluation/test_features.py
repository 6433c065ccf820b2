from types import SimpleNamespace

import numpy as np
import pytest
import torch

from crate_ray.config import ConfigError, ModelConfig
from crate_ray.evaluation import extract_features, raw_pixels
from crate_ray.evaluation.features import joined
from crate_ray.models import create_model

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)


def batch(images, labels, weights):
    return SimpleNamespace(images_BCHW=images, labels_B=torch.tensor(labels), weights_B=torch.tensor(weights))


@pytest.fixture
def batches():
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return [batch(images[:3], [0, 1, 2], [1.0, 1.0, 1.0]), batch(images[3:], [3, 9, 9], [1.0, 0.0, 0.0])]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model(ModelConfig(family="crate", image_size=8, patch_size=4, width=16, num_heads=2, encoder_depth=2))


def test_features_are_the_class_token_and_the_mean_of_the_others(model, batches):
    features = extract_features(model, batches, mean=MEAN, std=STD)
    pixels = torch.cat([batches[0].images_BCHW, batches[1].images_BCHW[:1]]).double() / 255
    normalised = ((pixels.permute(0, 2, 3, 1) - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        latent = model.encode(normalised)
    np.testing.assert_allclose(features.cls_ND, latent[:, 0], atol=1e-5)
    np.testing.assert_allclose(features.mean_ND, latent[:, 1:].mean(1), atol=1e-5)
    assert features.labels_N.tolist() == [0, 1, 2, 3]


def test_both_tokens_stand_side_by_side_and_parts_join_in_their_order(model, batches):
    whole = extract_features(model, batches, mean=MEAN, std=STD)
    np.testing.assert_array_equal(whole.of("both"), np.hstack([whole.of("cls"), whole.of("mean")]))
    parts = [extract_features(model, [part], mean=MEAN, std=STD) for part in batches]
    np.testing.assert_array_equal(joined(parts).mean_ND, whole.mean_ND)
    np.testing.assert_array_equal(joined(parts[::-1]).rows(np.array([1, 2, 3, 0])).labels_N, whole.labels_N)


def test_raw_pixels_of_large_images_are_means_over_squares():
    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    pixels, _ = raw_pixels([batch(images, [0, 1], [1.0, 1.0])])
    expected = images.double().reshape(2, 3, 32, 3, 32, 3).mean(dim=(3, 5)).flatten(1) / 255
    np.testing.assert_allclose(pixels, expected, rtol=1e-5)


def test_padding_rows_are_dropped(model, batches):
    assert len(extract_features(model, batches, mean=MEAN, std=STD).mean_ND) == 4
    pixels, labels = raw_pixels(batches)
    assert pixels.shape == (4, 192)
    assert labels.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(pixels[0], batches[0].images_BCHW[0].numpy().ravel().astype(np.float32) / 255)


def test_the_model_keeps_its_mode_and_gets_no_gradient(model, batches):
    model.train()
    extract_features(model, batches, mean=MEAN, std=STD)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_empty_split_is_an_input_error(model):
    with pytest.raises(ConfigError, match="no image"):
        extract_features(model, [], mean=MEAN, std=STD)
    with pytest.raises(ConfigError, match="no image"):
        raw_pixels([])
