"""A run is refused before it costs anything, and its identity does not depend on where its shards lie."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from crate_ray.config import ConfigError, RunConfig
from crate_ray.data import load_index
from crate_ray.training.prepare import data_digest, prepare_run

LoadTiny = Callable[..., RunConfig]


def test_shards_that_were_moved_are_the_same_data(load_tiny: LoadTiny, shards: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(shards, moved)
    there = load_tiny(f"data.train={moved / 'train'}", f"data.eval={moved / 'validation'}")
    assert data_digest(there) == data_digest(load_tiny())
    assert prepare_run(there, device_type="cpu")[1].uri == prepare_run(load_tiny(), device_type="cpu")[1].uri


def test_other_shards_are_other_data(load_tiny: LoadTiny, shards: Path) -> None:
    assert data_digest(load_tiny(f"data.train={shards / 'test'}")) != data_digest(load_tiny())


def test_relative_paths_hold_in_any_working_directory(
    load_tiny: LoadTiny, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shards)
    config, folder = prepare_run(
        load_tiny("data.train=train", "data.eval=validation", "data.test=null", f"storage.path={tmp_path}/a/../b"),
        device_type="cpu",
    )
    assert config.data.train == str(shards / "train")
    assert folder.uri.startswith(str(tmp_path / "b"))
    assert folder.read_config() == config


def test_missing_shards_refuse_the_run_and_leave_no_folder(load_tiny: LoadTiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        prepare_run(load_tiny(f"data.train={tmp_path / 'nowhere'}"), device_type="cpu")
    assert not any((tmp_path / "runs").iterdir())


def test_a_store_that_cannot_be_written_refuses_the_run(load_tiny: LoadTiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        prepare_run(load_tiny(f"storage.path={tmp_path / 'file' / 'runs'}"), device_type="cpu")


def test_a_run_says_which_data_it_reads_with_a_digest_of_each_split(load_tiny: LoadTiny, shards: Path, tmp_path: Path) -> None:
    _, folder = prepare_run(load_tiny(), device_type="cpu")
    body = folder.read_json("datasets.json")
    assert body is not None
    listed = [(entry["split"], entry["url"], entry["digest"], entry["images"]) for entry in body["datasets"]]
    splits = (("train", "train"), ("eval", "validation"), ("test", "test"))
    indices = [(split, load_index(str(shards / name))) for split, name in splits]
    assert listed == [(split, index.url, index.digest, index.num_samples) for split, index in indices]
    moved = tmp_path / "moved"
    shutil.copytree(shards, moved)
    prepare_run(load_tiny(*(f"data.{key}={moved / name}" for key, name in splits)), device_type="cpu")
    there = folder.read_json("datasets.json")
    assert there is not None
    assert [entry["url"] for entry in there["datasets"]] == [str(moved / name) for _, name in splits]
