"""What a run's records say of samples that could not be read, and when it stops because of them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from crate_ray.config import ConfigError, RunConfig
from crate_ray.data import load_index
from crate_ray.runs import RunFolder, read_records
from crate_ray.training.loop import LocalContext, run_training


@pytest.fixture
def damaged(shards: Path, tmp_path: Path) -> str:
    """The 48 training samples, three of them with a flipped bit."""
    folder = tmp_path / "damaged"
    shutil.copytree(shards / "train", folder)
    index = load_index(str(folder))
    for sample_id in (5, 20, 40):
        row = index.samples.slice(sample_id, 1).to_pylist()[0]
        data = bytearray((folder / row["shard"]).read_bytes())
        data[row["offset"] + row["size"] // 2] ^= 1
        (folder / row["shard"]).write_bytes(data)
    return str(folder)


def test_the_records_count_replaced_samples(load_tiny: Callable[..., RunConfig], damaged: str, tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / "run"))
    config = load_tiny(f"data.train={damaged}", "train.steps=6")  # one epoch in batches of 8; kNN looks among all 48 images
    run_training(config, run, LocalContext())
    counts = [record.values["data/replaced_samples"] for record in read_records(run) if "train/loss" in record.values]
    assert counts == sorted(counts)
    assert counts[-1] == 3


def test_more_than_the_allowed_share_stops_the_run(load_tiny: Callable[..., RunConfig], damaged: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.max_replaced_fraction=0\.001 allows"):
        run_training(load_tiny(f"data.train={damaged}", "train.steps=40"), RunFolder(str(tmp_path / "run")), LocalContext())


def test_raise_stops_the_run_at_the_first(load_tiny: Callable[..., RunConfig], damaged: str, tmp_path: Path) -> None:
    config = load_tiny(f"data.train={damaged}", "train.steps=6", "data.on_error=raise")
    with pytest.raises(ConfigError, match=r"sample 'train-000000\d\d' at byte \d+ of shard .*hash in the index"):
        run_training(config, RunFolder(str(tmp_path / "run")), LocalContext())
