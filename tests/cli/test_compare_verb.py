"""`crate-ray compare` from folders and from MLflow: what it says, where it writes, and what it refuses."""

import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from synthetic_rows import Law, synthetic_row, synthetic_rows, synthetic_screening

from crate_ray.analysis.comparison.noise import image_noise
from crate_ray.cli import quickstart
from crate_ray.cli.compare import short_name
from crate_ray.cli.compare_sources import FolderAnswers, Store, gather
from crate_ray.config import RunConfig, fingerprint
from crate_ray.runs import Lease, NullSink, RunFolder, open_run
from crate_ray.runs.rows import RunRow, read_run_rows
from crate_ray.tracking import initialise, sync
from crate_ray.tracking.client import open_client
from crate_ray.tracking.row_tag import ROW_TAG, pack_rows
from crate_ray.tracking.server import free_port
from crate_ray.training.final import write_final, write_result

EXPERIMENT = "crate-mae/study"
REPORT = {"report.md", "report.html", "comparison.json", "comparison.parquet"}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database with an experiment of its own for each test; made once, which takes seconds."""
    address = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    assert initialise(address, "unused") is not None
    return address


@pytest.fixture
def finished(tmp_path: Path) -> Callable[..., RunFolder]:
    """Makes run folders as training, and a probe unless `top1` is None, leave them."""

    def make(recipe: str, seed: int, *, top1: float | None = 0.9, split: str = "test", state: Any = "FINISHED") -> RunFolder:
        config = RunConfig.load(recipe, [f"storage.path={tmp_path / 'out'}", f"train.seed={seed}"])
        folder = open_run(config, fingerprint(config, "0" * 64, "float32"))
        lease = Lease.take(folder)
        if state == "FINISHED":
            measured = {"final/eval_loss": 0.2, "final/images_per_s": 500.0}
            write_result(config, folder, NullSink(), step=600, train_seconds=60, precision="float32", measured=measured)
            if top1 is not None:
                values = {"final/probe_top1": top1, "final/control_top1": 0.7}
                write_final(folder, NullSink(), 600, values)
                intervals = {"probe_top1": [top1, top1 - 0.02, top1 + 0.02], "gain": [top1 - 0.7, top1 - 0.73, top1 - 0.67]}
                folder.write_json(f"probe_{split}.json", {"split": split, "protocol": 1, "values": values, **intervals})
                answers = {"sources": ["a", "b", "c"], "rows": [9, 9, 9], "correct": {"probe_top1": [9 * top1, 8, 7]}}
                folder.write_json(f"answers_{split}.json", answers)
        lease.end(state)
        return folder

    return make


def put(uri: str, experiment: str, rows: Sequence[RunRow]) -> None:
    """An experiment as the mirror leaves it."""
    from mlflow.entities import Metric, RunTag

    experiment_id, client = initialise(uri, experiment), open_client(uri)
    for row in rows:
        run = client.create_run(str(experiment_id), run_name=row.name[:18])
        tags = {"kind": row.kind, "crate_ray.run_uid": row.run_uid, ROW_TAG: pack_rows({"test": row, "validation": row})}
        metrics = [Metric(f"final/{key}", value, 0, 0) for key, value in row.values.items()]
        client.log_batch(run.info.run_id, metrics=metrics, tags=[RunTag(key, value) for key, value in tags.items()])


def test_runs_in_a_folder_get_verdicts_and_a_report_beside_them_though_mlflow_is_down(
    invoke, finished, tmp_path, caplog
) -> None:
    for seed in range(2):
        finished("digits_crate_mae", seed, top1=0.84 + seed / 100)
        finished("digits_mae", seed, top1=0.9 + seed / 100)
    unjudged = finished("digits_mae", 2, top1=None)
    result = invoke("compare", tmp_path / "out", "--uri", f"http://127.0.0.1:{free_port()}")
    assert result.code == 0, result.err
    headline = result.out.splitlines()[0]
    assert headline.startswith("No verdict")
    for axis in ("params", "flops", "time"):
        assert f"\n{axis} " in result.out
    assert f"1 run without a probe on test: crate-ray probe --test {unjudged.uri}\n" in result.out
    folder = tmp_path / "out" / "comparison"
    assert {path.name for path in folder.iterdir()} == REPORT | {"figures"}
    assert f"report    {folder}/report.md\n" in result.out
    document = json.loads((folder / "comparison.json").read_text())
    assert document["headline"] == headline
    (difference,) = document["differences"]  # with one configuration of each
    assert difference["test_noise"]["value"] == pytest.approx((0.845 - 0.905) * 9 / 27)
    assert "the same command sends it" in caplog.text


def test_a_split_that_no_run_was_judged_on_is_an_error_with_the_command(invoke, finished, tmp_path) -> None:
    folders = [finished(recipe, 0, split="validation") for recipe in ("digits_crate_mae", "digits_mae")]
    result = invoke("compare", tmp_path / "out")
    assert result.code == 2
    names = ",".join(folder.name for folder in sorted(folders, key=lambda folder: folder.name))
    assert f"`crate-ray probe --test {tmp_path}/out/{{{names}}}`" in result.err
    assert "--validation compares by the other split" in result.err
    assert not (tmp_path / "out" / "comparison").exists()


def test_an_experiment_gives_what_its_rows_say_and_its_note_opens_with_the_headline(invoke, uri, tmp_path) -> None:
    law = Law()
    put(uri, EXPERIMENT, synthetic_rows({"crate_mae": law.needing(0.42), "mae": law}, widths=(64, 128), sweep=None))
    result = invoke("compare", EXPERIMENT, "--uri", uri, "--out", tmp_path / "report", "--by", "flops", "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert next(iter(document["verdicts"])) == "flops"
    assert document["runs"] == 20
    client = open_client(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment.tags["mlflow.note.content"] == document["headline"]
    run = client.get_run(document["mlflow"]["run_id"])
    assert (run.data.tags["kind"], run.info.status) == ("compare", "FINISHED")
    assert {item.path for item in client.list_artifacts(run.info.run_id)} >= REPORT
    assert document["mlflow"]["url"].startswith("http://127.0.0.1:5000/#/experiments/")


def test_folders_and_experiments_compare_together_and_a_run_in_both_counts_once(uri, finished, tmp_path) -> None:
    folders = [finished(recipe, 0) for recipe in ("digits_crate_mae", "digits_mae")]
    sync(folders, uri, "crate-mae/both")
    put(uri, "crate-mae/both", [synthetic_row()])
    found = gather([str(tmp_path / "out"), "crate-mae/both"], split="test", uri=uri, experiment=None)
    assert sorted(row.name for row in found.rows) == sorted([synthetic_row().name, *(folder.name for folder in folders)])
    assert found.name == "out + crate-mae/both"
    assert found.out == tmp_path / "out" / "comparison"
    assert found.store == Store(uri, folders[0].read_config().tracking.experiment)


def test_what_is_called_alike_and_has_no_row_is_named_by_where_it_lies(uri, finished, tmp_path) -> None:
    finished("digits_mae", 0)
    for above, name in (("out", "begun"), ("other", "begun"), ("other", "single")):
        folder = RunFolder(str(tmp_path / above / name))
        folder.write_config(RunConfig.load("digits_mae", []))
    roots = [str(tmp_path / above) for above in ("out", "other", "other/begun")]
    found = gather(roots, split="test", uri=None, experiment=None)
    begun = [str(tmp_path / above / "begun") for above in ("out", "other")]
    assert sorted(found.unread) == sorted([*begun, "single"]), "and a folder that is named twice is there once"


def test_damaged_answers_are_as_those_that_are_not_at_hand(finished) -> None:
    whole, damaged = (finished("digits_mae", seed) for seed in (0, 1))
    Path(damaged.path("answers_test.json")).write_text("{")
    answers = FolderAnswers(read_run_rows([whole, damaged], split="test").rows, "test")
    uids = [row.run_uid for row in read_run_rows([whole, damaged], split="test").rows]
    assert [answers.get(uid) is None for uid in uids] == [False, True]
    torn = {uids[0]: answers[uids[0]], uids[1]: {"sources": ["a", "b", "c"]}}
    assert image_noise(((uids[0], uids[1]),), torn, "probe_top1") is None
    unlike = {uids[0]: answers[uids[0]], uids[1]: {**answers[uids[0]], "correct": {"probe_top1": [1.0]}}}
    assert image_noise(((uids[0], uids[1]),), unlike, "probe_top1") is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("no/such/experiment",), "no experiment 'no/such/experiment' .*; there are: "),
        (("/no/such/folder",), "'/no/such/folder' does not exist"),
        (("crate-mae/empty",), "'crate-mae/empty' holds no runs"),
        (("crate-mae/running",), "none that has come to its end"),
        (("crate-mae/one-family",), "one family alone"),
        (("crate-mae/nan",), "NaN|finite"),
        (("crate-mae/old",), "mirrored by an earlier release; `crate-ray tracking sync"),
        (("crate-mae/one-family", "--metric", "top5"), "no finished run .* has top5; measured were: .*probe_top1"),
    ],
)
def test_what_cannot_be_compared_is_one_message_and_nothing_is_written(invoke, uri, tmp_path, arguments, said) -> None:
    rows = {
        "crate-mae/empty": [],
        "crate-mae/running": [synthetic_row(state="RUNNING", is_complete=False, incomplete="still running")],
        "crate-mae/one-family": [synthetic_row(seed=seed) for seed in range(2)],
        "crate-mae/nan": [synthetic_row(model, value=float("nan")) for model in ("crate_mae", "mae")],
        "crate-mae/old": [],
    }
    client = open_client(uri)
    for name in arguments:
        if name in rows and client.get_experiment_by_name(name) is None:
            put(uri, name, rows[name])
            if name == "crate-mae/old":
                client.set_terminated(client.create_run(client.get_experiment_by_name(name).experiment_id).info.run_id)
    result = invoke("compare", *arguments, "--uri", uri, "--out", tmp_path / "report")
    assert result.code == 2
    assert result.out == ""
    assert re.search(said, result.err), result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "report").exists()


def test_a_server_that_is_down_is_an_error_for_an_experiment(invoke) -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    result = invoke("compare", EXPERIMENT, "--uri", dead)
    assert result.code == 2
    assert f"MLflow at {dead} does not answer within 10 s" in result.err


def test_the_report_of_several_names_is_logged_under_the_last_part_of_each() -> None:
    assert short_name("a/one + b/two") == "one + two"
    assert short_name("crate-mae/study") == "study"


def test_the_quickstart_names_what_it_could_not_read_and_its_command_can_be_typed(finished, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/crate-ray", "quickstart", "--out", "my out", "--set", "name=a b"])
    folders = [finished("digits_crate_mae", 0), finished("digits_mae", 0), RunFolder(str(tmp_path / "out" / "empty"))]
    Path(folders[2].uri).mkdir()
    comparison = quickstart._compare(folders)
    assert comparison.commands == ("crate-ray quickstart --out 'my out' --set 'name=a b'",)
    assert list(comparison.excluded.values()) == ["no run was started here, or it is being created"]


def test_the_table_of_the_quickstart_has_a_dash_for_the_mask_ratio_of_a_classifier() -> None:
    ratio = quickstart._LINES["mask ratio"]
    assert ratio(synthetic_row(settings={"mask_ratio": None})) == "-"
    assert ratio(synthetic_row()) == "0.75"


def test_a_report_that_cannot_be_written_is_an_error_that_names_the_folder(invoke, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    result = invoke("compare", tmp_path, "--out", tmp_path / "file" / "report")
    assert result.code == 2
    assert f"--out {tmp_path}/file/report cannot be written" in result.err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_thousand_runs_of_an_experiment_are_compared_in_20_seconds(invoke, uri, tmp_path) -> None:
    law = Law()
    rows = synthetic_rows({"crate_mae": law.needing(0.42), "mae": law, "mae_all_tokens": law}, seeds=range(1000, 1010))
    grid = [{"mask_ratio": mask, "lr": lr} for mask in (0.5, 0.6, 0.75, 0.8, 0.9) for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)]
    for model in ("crate_mae", "mae", "mae_all_tokens"):
        rows += synthetic_screening(model, law, settings=grid)
    rows += synthetic_screening("crate_mae", law, settings=[{"ista_step_size": step / 100} for step in range(11, 31)])
    put(uri, "crate-mae/thousand", rows)
    started = time.process_time()  # wall time is that of the neighbours as well
    result = invoke("compare", "crate-mae/thousand", "--uri", uri, "--out", tmp_path / "report", "--json")
    seconds = time.process_time() - started
    document = json.loads(result.out)
    assert document["runs"] == 1000
    assert document["headline"].startswith("CRATE-MAE needs 0.")
    for ratio in (item for item in document["ratios"] if item["axis"] == "params"):
        assert ratio["ratio"][1] < 0.42 < ratio["ratio"][2]
    assert seconds < 20
