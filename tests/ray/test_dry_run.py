"""`crate-ray train --dry-run` beside a real cluster: what it is asked, and that nothing is started or written there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("workers", "code", "row"),
    [
        ("4", 0, "ok: 4 workers of 1 CPU each; the cluster has room for 4"),
        ("5", 2, "fail: 5 workers of 1 CPU each; the cluster has room for 4; lower scale.num_workers"),
        ("{min: 2, max: 8}", 0, "ok: 2 to 8 workers of 1 CPU each; the cluster has room for 4"),
    ],
)
def test_a_dry_run_asks_the_cluster_whether_the_workers_fit(
    drive: Callable[..., Any], overrides: list[str], tmp_path: Path, workers: str, code: int, row: str
) -> None:
    words = [word for override in (*overrides, f"scale.num_workers={workers}") for word in ("--set", override)]
    driver = drive("train", "digits_crate_mae", *words, "--dry-run")
    assert driver.wait(120) == code, driver.output()
    assert row in driver.output()
    assert not (tmp_path / "out").exists()
