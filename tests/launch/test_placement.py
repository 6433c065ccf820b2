"""Groups that trials left behind, when there is no cluster any more."""

import pytest

from crate_ray.launch.placement import free_orphaned_groups


def test_looking_for_groups_starts_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.init", lambda: pytest.fail("a cluster was started"))
    assert free_orphaned_groups() == []
