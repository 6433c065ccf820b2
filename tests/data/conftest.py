"""Small data sets that several tests read."""

from pathlib import Path

import pytest

from crate_ray.data import build_source


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shapes:120 at 24 pixels: 96 training images in two shards, 12 each for validation and test."""
    folder = tmp_path_factory.mktemp("shapes")
    build_source("shapes:120", str(folder), image_size=24)
    return folder
