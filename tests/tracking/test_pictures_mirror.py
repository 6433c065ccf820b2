"""Pictures of a run in MLflow: each content is uploaded once, whenever it was made."""

from pathlib import Path
from typing import Any

import pytest

from crate_ray import storage
from crate_ray.runs import Lease, RecordWriter, RunFolder
from crate_ray.tracking import replay, sync
from crate_ray.tracking.replay import MARKER


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files in the order of their uploads, beside the real uploads."""
    names: list[str] = []
    upload = replay._upload

    def counting(client: Any, run_id: str, name: str, content: bytes, target: str | None) -> None:
        names.append(name)
        upload(client, run_id, name, content, target)

    monkeypatch.setattr(replay, "_upload", counting)
    return names


def stored(client: Any, experiment: str, scratch: Path) -> dict[str, bytes]:
    """The content of every picture that the experiment's only run has in MLflow."""
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    items = [item.path for item in client.list_artifacts(run.info.run_id, "pictures")]
    scratch.mkdir(exist_ok=True)
    return {path: Path(client.download_artifacts(run.info.run_id, path, str(scratch))).read_bytes() for path in items}


def finished(make_run: Any) -> RunFolder:
    folder: RunFolder = make_run()
    Lease.take(folder).end("FINISHED")
    return folder


def test_pictures_made_after_a_run_was_mirrored_go_with_the_next_sync_and_only_they(
    uri: str, client: Any, experiment: str, make_run: Any, uploads: list[str], tmp_path: Path
) -> None:
    folder = finished(make_run)
    sync([folder], uri, experiment)
    assert uploads == ["config.yaml", "fingerprint.json"]
    uploads.clear()

    storage.write_atomic(folder.path("pictures", "layers.png"), b"first")
    folder.write_json("pictures/emergence.json", {"layers": []})
    for _ in range(2):
        sync([folder], uri, experiment)
    assert uploads == ["pictures/emergence.json", "pictures/layers.png"]
    uploads.clear()

    storage.write_atomic(folder.path("pictures", "layers.png"), b"second")
    for _ in range(2):
        sync([folder], uri, experiment)
    assert uploads == ["pictures/layers.png"]
    found = stored(client, experiment, tmp_path / "scratch")
    assert found.keys() == {"pictures/emergence.json", "pictures/layers.png"}
    assert found["pictures/layers.png"] == b"second"


def test_emergence_scored_again_shows_its_newer_value(uri: str, client: Any, experiment: str, make_run: Any) -> None:
    folder = finished(make_run)
    key = "emergence/layer03/attention_jaccard"
    for value in (0.25, 0.5):
        writer = RecordWriter(folder, 1)
        writer.write(100, {key: value})
        writer.close()
        for _ in range(2):
            sync([folder], uri, experiment)
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    assert run.data.metrics[key] == 0.5
    assert len(client.get_metric_history(run.info.run_id, key)) == 2


@pytest.mark.parametrize("marker", [True, None])
def test_a_marker_that_knows_no_contents_costs_one_more_upload(
    marker: bool | None, uri: str, experiment: str, make_run: Any, uploads: list[str]
) -> None:
    folder = finished(make_run)
    storage.write_atomic(folder.path("pictures", "layers.png"), b"picture")
    sync([folder], uri, experiment)
    held = folder.read_json(MARKER)
    assert held is not None
    folder.write_json(MARKER, {**held, "artifacts": marker})
    for _ in range(2):
        sync([folder], uri, experiment)
    assert uploads.count("pictures/layers.png") == 2


def test_a_file_that_cannot_be_stored_is_tried_again_and_holds_up_nothing(
    uri: str, client: Any, experiment: str, make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished(make_run)
    storage.write_atomic(folder.path("pictures", "layers.png"), b"picture")

    def refuse(*_: Any) -> None:
        raise OSError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(replay, "_upload", refuse)
        assert [result.error for result in sync([folder], uri, experiment)] == [None]
    sync([folder], uri, experiment)
    assert stored(client, experiment, tmp_path / "scratch") == {"pictures/layers.png": b"picture"}


def test_a_password_in_a_configuration_stays_in_the_folder(
    uri: str, client: Any, experiment: str, make_run: Any, tmp_path: Path
) -> None:
    folder = finished(make_run)
    mine = storage.read_bytes(folder.path("config.yaml")) + b"# mirrored to postgresql://me:secret@host/db\n"
    storage.write_atomic(folder.path("config.yaml"), mine)
    assert [result.error for result in sync([folder], uri, experiment)] == [None]
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    theirs = Path(client.download_artifacts(run.info.run_id, "config.yaml", str(tmp_path))).read_bytes()
    assert theirs == mine.replace(b"me:secret@", b"")
    assert storage.read_bytes(folder.path("config.yaml")) == mine
