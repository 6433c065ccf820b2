"""A data set and a run small enough to train in a second."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from crate_ray.config import RunConfig
from crate_ray.data import build_source

LoadTiny = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order: what is compared bit by bit below is computed on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 drawn shapes of 16 pixels: 48 to train on, 6 each to validate and test."""
    folder = tmp_path_factory.mktemp("shapes16")
    build_source("shapes:60", str(folder), image_size=16)
    return folder


@pytest.fixture
def load_tiny(shards: Path, tmp_path: Path) -> LoadTiny:
    """`load_tiny("train.steps=3", ..., recipe=...)`: a recipe shrunk to width 16 and two layers, in float32."""

    def load(*overrides: str, recipe: str = "digits_crate_mae") -> RunConfig:
        shrunk = [
            "model.image_size=16",
            "model.width=16",
            "model.num_heads=2",
            "model.encoder_depth=1",
            "model.decoder_width=16",
            "model.decoder_depth=1",
            f"data.train={shards / 'train'}",
            f"data.eval={shards / 'validation'}",
            f"data.test={shards / 'test'}",
            "schedule.warmup_steps=2",
            "train.steps=12",
            "train.global_batch=8",
            "train.precision=float32",
            "eval.every_steps=null",
            "eval.probe_every_steps=null",
            "eval.whitebox_every_steps=null",
            "eval.log_every_steps=1",
            "scale.use_gpu=false",
            f"storage.path={tmp_path / 'runs'}",
        ]
        return RunConfig.load(recipe, [*shrunk, *overrides])

    return load
