"""Shards and run folder in object storage, as on a cluster without a shared disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from crate_ray import storage
from crate_ray.runs import RunFolder, read_records

pytestmark = pytest.mark.slow


@pytest.mark.timeout(400)
def test_a_run_reads_shards_from_a_bucket_and_leaves_its_folder_in_one(
    drive: Callable[..., Any], digits: Path, bucket: str, overrides: list[str], tmp_path: Path
) -> None:
    store, root = fs.FileSystem.from_uri(bucket)
    fs.copy_files(str(digits), f"{root}/digits", source_filesystem=fs.LocalFileSystem(), destination_filesystem=store)
    data = storage.join(bucket, "digits")
    more = [
        f"data.train={storage.join(data, 'train')}",
        f"data.eval={storage.join(data, 'validation')}",
        "data.test=null",
        f"storage.path={storage.join(bucket, 'out')}",
        f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
        "train.steps=12",
        "scale.num_workers=2",
        "checkpoint.every_steps=5",
    ]
    words = [word for item in (*overrides, *more) for word in ("--set", item)]
    driver = drive("train", "digits_crate_mae", *words, "--json")
    assert driver.wait(300) == 0, driver.output()
    printed = driver.output()
    summary = json.loads(printed[printed.index("{") :])
    assert summary["state"] == "FINISHED"
    folder = RunFolder(summary["folder"])
    assert [record.step for record in read_records(folder) if "train/loss" in record.values] == list(range(1, 13))
    assert storage.list_dir(folder.path("checkpoints")) == ["step_00000010", "step_00000012"]
