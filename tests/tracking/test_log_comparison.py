"""Where a comparison stands in MLflow, and what becomes of notes that people wrote."""

from pathlib import Path
from typing import Any

from crate_ray.runs import Lease, RunFolder
from crate_ray.runs.create import run_meta
from crate_ray.tracking import initialise, sync
from crate_ray.tracking.comparison import log_comparison, with_headline
from crate_ray.tracking.server import free_port

FILES = ("report.md", "figures/params.png")


def write_report(folder: Path, text: str = "report") -> Path:
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).write_text(text)
    return folder


def artifacts(client: Any, run_id: str, below: str | None = None) -> set[str]:
    found = client.list_artifacts(run_id, below)
    return {item.path for item in found if not item.is_dir} | {
        path for item in found if item.is_dir for path in artifacts(client, run_id, item.path)
    }


def test_a_comparison_of_a_sweep_hangs_below_it_and_both_open_on_the_verdict(
    uri: str, client: Any, experiment: str, tmp_path: Path
) -> None:
    sweep = RunFolder(str(tmp_path / "sweep"))
    sweep.write_json("run_meta.json", run_meta(family="crate vit", kind="sweep", study="study", parent_uid=None))
    (tmp_path / "sweep" / "sweep.yaml").write_text("name: sweep\n")
    Lease.take(sweep).end("FINISHED")
    (parent,) = sync([sweep], uri, experiment)
    report = write_report(tmp_path / "report")
    uid = (sweep.read_json("run_meta.json") or {})["run_uid"]
    for headline in ("No verdict.\n", "CRATE-MAE wins."):
        logged = log_comparison(
            uri, experiment, name="sweep", folder=report, files=FILES, headline=headline, parent_uid=uid, tags={"metric": "x"}
        )
        assert logged is not None
    run, above = client.get_run(logged.run_id), client.get_run(parent.run_id)
    expected = {"kind": "compare", "metric": "x", "mlflow.parentRunId": parent.run_id, "mlflow.note.content": "CRATE-MAE wins."}
    assert expected.items() <= run.data.tags.items()
    assert run.info.status == "FINISHED"
    assert artifacts(client, logged.run_id) == set(FILES)
    assert artifacts(client, str(parent.run_id)) >= {f"comparison/{name}" for name in FILES}
    assert above.data.tags["mlflow.note.content"] == "CRATE-MAE wins."
    found = client.get_experiment_by_name(experiment)
    assert found.tags["mlflow.note.content"] == "CRATE-MAE wins."
    assert len(client.search_runs([found.experiment_id], filter_string="tags.kind = 'compare'")) == 1
    assert logged.url.endswith(f"/runs/{logged.run_id}?workflowType=machine_learning")
    assert "viewStateShareKey=parameter-efficiency" in logged.views["Parameter efficiency"]


def test_what_a_person_wrote_into_the_note_stays_below_the_verdict(
    uri: str, client: Any, experiment: str, tmp_path: Path
) -> None:
    report = write_report(tmp_path)
    client.set_experiment_tag(initialise(uri, experiment), "mlflow.note.content", "Ask Ada before deleting.")
    for headline in ("First.", "Second."):
        assert log_comparison(uri, experiment, name="a", folder=report, files=FILES, headline=headline) is not None
    note = client.get_experiment_by_name(experiment).tags["mlflow.note.content"]
    assert note == "Second.\n\nAsk Ada before deleting."


def test_a_note_keeps_every_line_but_the_earlier_verdict() -> None:
    assert with_headline("", "New.", None) == "New."
    assert with_headline("Old.", "New.", "Old.") == "New."
    assert with_headline("Old.\n\nMine.", "New.", "Old.") == "New.\n\nMine."
    assert with_headline("Mine.\nOld.", "New.", "Old.") == "New.\n\nMine.\nOld."


def test_a_server_that_is_down_is_a_warning_and_no_error(tmp_path: Path, experiment: str, caplog: Any) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    assert log_comparison(uri, experiment, name="a", folder=write_report(tmp_path), files=FILES, headline="x") is None
    assert f"the comparison is not in MLflow at {uri}" in caplog.text
