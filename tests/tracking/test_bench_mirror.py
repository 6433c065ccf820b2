"""The benchmark of the mirror, short: runs that write while their server is killed and started again lose no point."""

from pathlib import Path

import pytest

from benchmarks.bench_mirror import KEYS, STEPS_A_SECOND, outage_round

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_after_an_outage_every_point_is_there_once(tmp_path: Path) -> None:
    found = outage_round(tmp_path, runs=4, before_s=3, outage_s=6, after_s=3)
    written = 4 * 12 * STEPS_A_SECOND * len(KEYS)
    assert (found.count.written, found.count.equal, found.count.missing, found.count.foreign) == (written, written, 0, 0)
    assert found.down_s > 6
