"""One sqlite database for the room (its creation takes seconds), and run folders written by the product's own writers."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crate_ray.config import RunConfig, fingerprint
from crate_ray.runs import RunFolder, open_run
from crate_ray.tracking import initialise
from crate_ray.tracking.client import open_client

MakeRun = Callable[..., RunFolder]


def make_config(**overrides: Any) -> RunConfig:
    """A small pretraining run; `overrides` are whole sections."""
    sections: dict[str, Any] = {
        "recipe": "digits_crate",
        "model": {"preset": "crate_mae_tiny", "image_size": 32, "patch_size": 8},
        "data": {"train": "out/digits/train"},
        "optimizer": {"base_lr": 1e-3},
        "train": {"steps": 100, "global_batch": 64, "seed": 3},
    }
    return RunConfig.parse({**sections, **overrides})


@pytest.fixture(scope="session")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An initialised database with an empty experiment `unused`."""
    address = f"sqlite:///{tmp_path_factory.mktemp('tracking')}/mlflow.db"
    assert initialise(address, "unused") is not None
    return address


@pytest.fixture
def client(uri: str) -> Any:
    """MLflow's own client on the database: what a reader of the store sees."""
    return open_client(uri)


@pytest.fixture
def experiment(request: pytest.FixtureRequest) -> str:
    """An experiment of this test alone."""
    return f"crate-mae/{request.node.name}"


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Creates run folders: `make_run(config=..., kind=..., parent_uid=...)`."""
    numbers = itertools.count()

    def make(*, config: RunConfig | None = None, **how: Any) -> RunFolder:
        config = config or make_config()
        return open_run(config, fingerprint(config, "data", "float32"), uri=str(tmp_path / f"run{next(numbers)}"), **how)

    return make
