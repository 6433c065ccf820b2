"""What tests of several rooms read."""

from pathlib import Path

import pytest

from crate_ray.data import build_source


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded handwritten digits as shards: train, validation and test below this folder."""
    folder = tmp_path_factory.mktemp("digits")
    build_source("digits", str(folder))
    return folder
