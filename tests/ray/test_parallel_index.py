"""Indexing and auditing on the cluster: one task a shard, the same tables as in one process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crate_ray.data import build_index, load_index
from crate_ray.data.shards import pack_shard


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Nine shards of six samples that another program wrote."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for shard in range(9):
        rows = [{"__key__": f"k{shard}-{i}", "jpg": bytes([shard, i]) * 200, "cls": str(i).encode()} for i in range(6)]
        (folder / f"in-{shard:04d}.tar").write_bytes(pack_shard(rows))
    return folder


def summary(output: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output[output.index("{") :])
    return found


def test_the_cluster_makes_the_index_of_one_process(drive: Callable[..., Any], shards: Path, tmp_path: Path) -> None:
    alone = load_index(build_index(str(shards), out=str(tmp_path / "alone")).url)
    driver = drive("data", "index", str(shards), "--out", str(tmp_path / "parallel"), "--parallel", "--json")
    assert driver.wait(200) == 0, driver.output()
    found = summary(driver.output())
    assert (found["num_samples"], found["digest"]) == (54, alone.digest)
    together = load_index(str(tmp_path / "parallel"))
    assert together.samples.equals(alone.samples)
    assert together.shards.equals(alone.shards)


def test_the_cluster_reports_the_faults_of_every_shard(drive: Callable[..., Any], shards: Path) -> None:
    for name in ("in-0002.tar", "in-0007.tar"):
        (shards / name).write_bytes((shards / name).read_bytes()[:3000])
    refused = drive("data", "index", str(shards), "--parallel")
    assert refused.wait(200) == 2
    assert "in-0002.tar" in refused.output()
    assert "in-0007.tar" in refused.output()
    audit = drive("data", "verify", str(shards), "--no-decode", "--parallel", "--json")
    assert audit.wait(200) == 1
    found = [finding for finding in summary(audit.output())["findings"] if finding["fault"] == "truncated"]
    assert [finding["shard"] for finding in found] == ["in-0002.tar", "in-0007.tar"]
