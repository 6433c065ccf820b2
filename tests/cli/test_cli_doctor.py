import json
import time

import pytest

from crate_ray.cli import checks
from crate_ray.cli.doctor import _run_all
from crate_ray.tracking.server import free_port


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_a_machine_that_runs_these_tests_is_ready(invoke, tmp_path):
    result = invoke("doctor", "--storage", tmp_path / "out", "--json")
    body = json.loads(result.out)
    failed = [check for check in body["checks"] if check["state"] == "fail"]
    assert (result.code, body["ok"], failed) == (0, True, [])
    names = {check["name"] for check in body["checks"]}
    assert {"Python", "packages", "torch", "bfloat16", "CPUs", "storage", "disk", "tracking", "Ray"} <= names
    assert not (tmp_path / "out").exists()


def test_each_thing_that_would_fail_is_one_sentence_with_its_fix(invoke, monkeypatch, tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = invoke("doctor", "--storage", "ftp://bucket/out")
    assert result.code == 1
    assert "they do not fit together (RuntimeError: operator torchvision::nms does not exist)" in result.out
    assert "fix: install both from one index" in result.out
    assert "scheme 'ftp' of 'ftp://...' is not supported" in result.out
    assert "not ready" in result.out


def test_storage_that_cannot_be_written_fails(tmp_path):
    (tmp_path / "file").write_text("")
    (check,) = checks.check_storage(str(tmp_path / "file" / "out"))
    assert check.state == "fail"
    assert "cannot be written" in check.found


def test_a_tracking_server_that_is_down_is_a_warning_within_seconds(tmp_path):
    start = time.monotonic()
    (check,) = checks.check_tracking(str(tmp_path), f"http://127.0.0.1:{free_port()}")
    assert check.state == "warn"
    assert "does not answer" in check.found
    assert "tracking sync" in check.fix
    assert time.monotonic() - start < 30


def test_a_database_that_does_not_exist_yet_is_well_and_not_created(tmp_path):
    (check,) = checks.check_tracking(str(tmp_path / "out"), None)
    assert check.state == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_ray_address_where_nobody_listens_fails(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    (check,) = checks.check_ray()
    assert check.state == "fail"
    assert "unset RAY_ADDRESS" in check.fix


def test_a_cluster_of_another_ray_fails_and_names_both_versions():
    check = checks._same_versions("head:6379", {"ray_version": "2.1.0", "python_version": "3.8.1"})
    assert check.state == "fail"
    assert "ray 2.1.0 there" in check.found
    assert "python 3.8.1 there" in check.found


def test_a_cluster_that_wants_a_token_says_where_to_put_it():
    check = checks._same_versions("head:6379", "ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken")
    assert check.state == "fail"
    assert "RAY_AUTH_MODE=token" in check.fix


def test_packages_outside_of_their_range_are_named(monkeypatch):
    monkeypatch.setattr(
        checks.metadata, "requires", lambda name: ["numpy<1", "no-such-package>=1", 'onnx>=99; extra == "export"']
    )
    rows = {check.name: check for check in checks.check_packages()}
    assert set(rows) == {"numpy", "no-such-package"}
    assert "outside of <1" in rows["numpy"].found
    assert rows["no-such-package"].found == "not installed"


def test_a_check_that_crashes_is_a_finding_and_the_others_still_count():
    def crash() -> list[checks.Check]:
        raise RuntimeError("boom")

    found = _run_all([("broken", crash), ("Python", checks.check_python)])
    assert [check.name for check in found] == ["broken", "Python"]
    assert "RuntimeError: boom" in found[0].found
