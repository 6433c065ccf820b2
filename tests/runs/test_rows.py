"""A run folder as one row, and a thousand of them."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_ray.config import ConfigError, RunConfig, SweepConfig, dump_sweep, fingerprint
from crate_ray.models.cost import count_parameters, training_flops_per_image
from crate_ray.runs import NullSink, RunFolder, Status, TrialRow, list_runs, open_run, write_status, write_trial
from crate_ray.runs.rows import Estimate, RunRow, read_run_row, read_run_rows
from crate_ray.training.final import write_final, write_result

DATA = ["data.train=shards/digits/train", "data.eval=shards/digits/validation"]
HOUSE = {"final/probe_top1": 0.9, "final/control_top1": 0.6, "final/knn_top1": 0.85}


def config_of(*overrides: str, recipe: str = "digits_crate_mae") -> RunConfig:
    return RunConfig.load(recipe, [*DATA, *overrides])


def started(root: Path, *overrides: str, state: str = "FINISHED", reason: str | None = None, **about: Any) -> RunFolder:
    """A run without final values; `about` is of `open_run`."""
    config = config_of(f"storage.path={root}", *overrides)
    folder = open_run(config, fingerprint(config, "d" * 64, "float32"), **about)
    now = time.time()
    write_status(folder, Status(state, 1, now, now, ended=now, reason=reason))  # type: ignore[arg-type]
    return folder


def finished(root: Path, *overrides: str, measured: dict[str, float] | None = None, **about: Any) -> RunFolder:
    folder = started(root, *overrides, **about)
    write_result(
        folder.read_config(),
        folder,
        NullSink(),
        step=10,
        train_seconds=7200.0,
        precision="float32",
        measured={"final/eval_loss": 0.25, "final/images_per_s": 500.0, **(measured or {})},
    )
    return folder


def judged(folder: RunFolder, split: str, top1: float, *, data: str | None = None) -> None:
    """What a probe leaves: its report, and its values among the final ones."""
    prefix = f"{data}_" if data else ""
    values = {key.replace("final/", f"final/{prefix}"): value for key, value in {**HOUSE, "final/probe_top1": top1}.items()}
    stamps = dict.fromkeys(values, "house/1")
    free = {} if data else {"final/rankme": 40.0}
    body = {
        "split": split,
        "protocol": 1,
        "values": {**values, **free},
        "measured_by": {**stamps, **dict.fromkeys(free, "label-free/1")},
        "probe_top1": [top1, top1 - 0.02, top1 + 0.02],
        "chosen_c": 0.1,
        "data_digest": (data or "own") * 10,
        **({"data": data} if data else {}),
    }
    folder.write_json("_".join(["probe", split, *([data] if data else [])]) + ".json", body)
    if split == "test" or folder.read_json("probe_test.json") is None:
        write_final(folder, NullSink(), 10, {**values, **free})


def row_of(folder: RunFolder, **options: Any) -> RunRow:
    row = read_run_row(folder, **options)
    assert row is not None
    return row


def test_a_finished_run_says_what_it_was_what_it_cost_and_what_it_measured(tmp_path: Path) -> None:
    folder = finished(tmp_path, "train.seed=3", "model.encoder_depth=5", study="digits")
    judged(folder, "test", 0.9)
    row, config = row_of(folder), folder.read_config()
    assert (row.family, row.model, row.kind, row.seed, row.state) == ("crate", "crate_mae", "train", 3, "FINISHED")
    assert row.is_complete
    assert row.incomplete is None
    assert row.settings["depth"] == 5
    assert row.settings["ista_step_size"] == config.model.ista_step_size
    assert "model" not in row.settings
    parameters = count_parameters(config.model)
    assert (row.params_total, row.params_encoder, row.params_paper) == (
        parameters.trainable,
        parameters.encoder,
        parameters.paper,
    )
    assert row.images == 10 * config.train.global_batch
    assert row.train_pflops == training_flops_per_image(config.model) * row.images / 1e15
    assert row.train_hours == 2.0
    assert (row.images_per_s, row.timing, row.hardware) == (500.0, "shared", None)
    assert row.exclusive_hours is None
    assert row.values["probe_top1"] == 0.9
    assert row.values["eval_loss"] == 0.25
    assert "rollbacks" not in row.values
    assert row.intervals == {"probe_top1": Estimate(0.9, 0.88, 0.92)}
    assert row.judge_of("probe_top1") == ("test", "house/1")
    assert row.judge_of("eval_loss") == (None, None)
    assert row.compare["data.digest"] == "d" * 64
    assert row.tuning_trials is None


def test_runs_that_differ_in_their_seed_alone_are_one_configuration(tmp_path: Path) -> None:
    one, two = (row_of(finished(tmp_path, f"train.seed={seed}")) for seed in (1, 2))
    other = row_of(finished(tmp_path, "train.seed=1", "optimizer.weight_decay=0.2"))
    assert one.configuration == two.configuration != other.configuration
    assert len({one.run_uid, two.run_uid, other.run_uid}) == 3


def test_a_row_comes_back_from_json_whatever_numbers_it_holds(tmp_path: Path) -> None:
    folder = finished(tmp_path, "model.ista_step_size=[0.1,0.2,0.1,0.1]", measured={"final/eval_loss": math.nan})
    judged(folder, "validation", 0.9)
    row = row_of(folder)
    back = RunRow.of(json.loads(json.dumps(row.as_dict() | {"of_another_release": 1}, allow_nan=False)))
    assert math.isnan(back.values["eval_loss"])
    assert replace(back, values={}) == replace(row, values={})
    assert {**back.values, "eval_loss": 0} == {**row.values, "eval_loss": 0}


numbers = st.floats(allow_nan=True, allow_infinity=True)
names = st.text(min_size=1, max_size=8)


@settings(max_examples=50)
@given(
    st.dictionaries(names, numbers, max_size=3),
    st.dictionaries(names, st.tuples(numbers, numbers, numbers), max_size=2),
    st.dictionaries(names, st.none() | st.booleans() | st.integers() | names | st.lists(st.integers(), max_size=2), max_size=3),
    st.none() | st.integers(0, 99),
)
def test_any_row_survives_json(
    values: dict[str, float], intervals: dict[str, Any], parts: dict[str, Any], trials: int | None
) -> None:
    row = RunRow(
        run_uid="1", name="run", uri="/run", kind="train", family="vit", model="mae", recipe="r", seed=2**62, state="FINISHED",
        is_complete=True, configuration="0" * 8, params_total=1, params_encoder=1, params_paper=1, train_flops_per_image=1.5,
        images=3, train_pflops=4.5, train_hours=0.1, values=values, settings=parts, compare=parts, tuning_trials=trials,
        intervals={key: Estimate(*ends) for key, ends in intervals.items()},
    )  # fmt: skip
    assert repr(RunRow.of(json.loads(json.dumps(row.as_dict(), allow_nan=False)))) == repr(row)


def test_a_row_holds_the_judgement_on_one_split_alone(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    judged(folder, "validation", 0.93)
    assert row_of(folder).values["probe_top1"] == 0.93
    judged(folder, "test", 0.9)
    assert row_of(folder).values["probe_top1"] == 0.9
    assert row_of(folder, split="test").judged_split == "test"
    on_validation = row_of(folder, split="validation")
    assert (on_validation.values["probe_top1"], on_validation.judged_split) == (0.93, "validation")
    assert on_validation.intervals["probe_top1"].value == 0.93


def test_a_run_that_was_not_judged_on_a_split_has_no_judged_value_of_it_but_those_without_labels(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    judged(folder, "validation", 0.93)
    row = row_of(folder, split="test")
    assert "probe_top1" not in row.values
    assert row.judged_split is None
    assert row.intervals == {}
    assert row.values["rankme"] == 40.0
    assert row.values["eval_loss"] == 0.25


def test_judgements_on_other_shards_stand_beside_and_those_of_earlier_checkpoints_do_not(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    judged(folder, "test", 0.9)
    judged(folder, "test", 0.7, data="cifar10")
    folder.write_json("probe_test_step_00000005.json", {"split": "test", "values": {"final/probe_top1": 0.1}})
    row = row_of(folder)
    assert row.values["probe_top1"] == 0.9
    assert row.values["cifar10_probe_top1"] == 0.7
    assert row.intervals["cifar10_probe_top1"].value == 0.7
    assert row.judged_data == {"": "ownownownownowno", "cifar10": "cifar10cifar10ci"}
    assert (row.data_of("cifar10_probe_top1"), row.data_of("probe_top1")) == ("cifar10", "")


def test_an_exclusive_timing_pass_replaces_the_speed_of_training(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    folder.write_json("timing.json", {"images_per_s": 1000.0, "hardware": "1 x NVIDIA H200", "exclusive": True})
    row = row_of(folder)
    assert (row.images_per_s, row.timing, row.hardware) == (1000.0, "exclusive", "1 x NVIDIA H200")
    assert row.exclusive_hours == row.images / 1000 / 3600


def test_a_run_without_an_end_says_why(tmp_path: Path) -> None:
    killed = row_of(started(tmp_path, "train.seed=1", state="KILLED"))
    failed = row_of(started(tmp_path, "train.seed=2", state="FAILED", reason="loss nan\ntrace"))
    going = row_of(started(tmp_path, "train.seed=3", state="RUNNING"))
    assert [row.incomplete for row in (killed, failed, going)] == ["killed", "failed (loss nan)", "still running"]
    assert not any(row.is_complete or row.values for row in (killed, failed, going))
    folder = started(tmp_path, "train.seed=4", state="RUNNING")
    write_status(folder, Status("RUNNING", 1, 0.0, 0.0))
    assert "driver died" in str(row_of(folder).incomplete)


def test_what_is_no_run_has_no_row_and_a_reason(tmp_path: Path) -> None:
    sweep = RunFolder(str(tmp_path / "sweep"))
    sweep.write_json("run_meta.json", {"kind": "sweep", "run_uid": "1"})
    begun = RunFolder(str(tmp_path / "begun"))
    begun.write_json("run_meta.json", {"kind": "train", "run_uid": "2"})
    older = finished(tmp_path, "name=older")
    Path(older.path("config.yaml")).write_text("model: {}\n")
    folders = [sweep, begun, older, RunFolder(str(tmp_path / "missing"))]
    assert [read_run_row(folder) for folder in folders] == [None] * 4
    found = read_run_rows(folders)
    assert found.rows == ()
    assert found.unread[sweep.uri] == "a sweep, and no trained run"
    assert "being created" in found.unread[begun.uri]
    assert "being created" in found.unread[folders[-1].uri]
    assert "configuration cannot be read" in found.unread[older.uri]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run_meta.json", "{}"),
        ("fingerprint.json", '{"compare": {}}'),
        ("status.json", "[1, 2]"),
        ("final.json", '{"values": {}}'),
        ("final.json", "{"),
        ("probe_test.json", '{"split": "test"}'),
        ("timing.json", '{"exclusive": true}'),
    ],
)
def test_a_run_with_a_damaged_file_is_a_reason_beside_the_rows_of_the_others(tmp_path: Path, name: str, text: str) -> None:
    whole, damaged = (finished(tmp_path, f"train.seed={seed}") for seed in (1, 2))
    Path(damaged.path(name)).write_text(text)
    found = read_run_rows([whole, damaged])
    assert [row.uri for row in found.rows] == [whole.uri]
    assert list(found.unread) == [damaged.uri]
    assert "\n" not in found.unread[damaged.uri]
    with pytest.raises(ConfigError, match=r"damaged, or of another release"):
        read_run_row(damaged)


def test_two_folders_of_one_name_are_both_there(tmp_path: Path) -> None:
    folders = [RunFolder(str(tmp_path / above / "begun")) for above in ("a", "b")]
    assert list(read_run_rows(folders).unread) == [folder.uri for folder in folders]


ARMS = {"crate": {"base": "digits_crate_mae"}, "mae": {"base": "digits_mae"}}


def sweep_of(tmp_path: Path) -> tuple[Path, SweepConfig]:
    sweep = SweepConfig.parse(
        {
            "name": "rates",
            "base": "digits_mae",
            "arms": ARMS,
            "tune": {"optimizer.lr": {"grid": [1e-4, 1e-3, 1e-2]}},
            "objective": ["knn_top1"],
            "confirm": {"seeds": 5, "top_k": 2},
        },
        where="a test",
    )
    root = tmp_path / "rates"
    root.mkdir()
    (root / "sweep.yaml").write_text("# schema_version: 1\n" + dump_sweep(sweep))
    return root, sweep


def trial(root: Path, arm: str, lr: float, knn: float, *, seed: int = 0, stage: str = "screen", **row: Any) -> RunFolder:
    about = {"kind": "trial", "parent_uid": "sweep-uid", "stage": stage}
    changes = [f"optimizer.lr={lr}", f"train.seed={seed}"]
    is_finished = row.get("state", "FINISHED") == "FINISHED"
    folder = (finished if is_finished else started)(root / "trials", *changes, **about)
    values = {
        "id": folder.name,
        "arm": arm,
        "stage": stage,
        "seed": seed,
        "state": "FINISHED",
        "values": {"optimizer.lr": lr},
        "quantities": {"params_m": 1.5, "encoder_params_m": 0.5},
        "objectives": {"knn_top1": knn},
        "step": 10,
        "total_steps": 10,
    }
    write_trial(folder, TrialRow(**{**values, **row}))
    return folder


def test_trials_know_their_arm_what_it_was_tuned_and_the_place_of_what_is_confirmed(tmp_path: Path) -> None:
    root, _ = sweep_of(tmp_path)
    trial(root, "crate", 1e-4, 0.7)
    trial(root, "crate", 1e-3, 0.8)
    trial(root, "crate", 1e-2, 0.6, state="STOPPED", step=4)
    trial(root, "crate", 1e-1, 0.6, state="KILLED")
    best = trial(root, "crate", 1e-3, 0.81, seed=1000, stage="confirm")
    next_best = trial(root, "crate", 1e-4, 0.9, seed=1000, stage="confirm")
    rows = {row.uri: row for row in read_run_rows(list_runs(str(tmp_path))).rows}
    assert len(rows) == 6
    assert {row.sweep for row in rows.values()} == {"sweep-uid"}
    assert {row.arm for row in rows.values()} == {"crate"}
    assert {row.tuning_trials for row in rows.values()} == {3}, "the killed one goes on when the sweep does"
    assert (rows[best.uri].place, rows[next_best.uri].place) == (1, 2)
    assert rows[best.uri] == read_run_row(best), "alone as among the others"
    stopped = next(row for row in rows.values() if row.settings["lr"] == 1e-2)
    assert (stopped.is_complete, stopped.incomplete) == (False, "stopped by the scheduler at step 4 of 10")
    assert (stopped.params_total, stopped.params_encoder) == (1_500_000, 500_000)
    assert stopped.place is None
    assert {row.untuned for row in rows.values()} == {None}, "the learning rate was tuned over one grid"


def test_a_screening_trial_is_read_on_validation_whatever_is_asked(tmp_path: Path) -> None:
    root, _ = sweep_of(tmp_path)
    screened = trial(root, "crate", 1e-3, 0.8)
    confirmed = trial(root, "crate", 1e-3, 0.8, seed=1000, stage="confirm")
    for folder in (screened, confirmed):
        judged(folder, "validation", 0.7)
        judged(folder, "test", 0.6)
    assert row_of(screened, split="test").values["probe_top1"] == 0.7
    assert row_of(confirmed, split="test").values["probe_top1"] == 0.6


def test_a_trial_that_never_began_is_named_with_its_end(tmp_path: Path) -> None:
    root, _ = sweep_of(tmp_path)
    folder = RunFolder(str(root / "trials" / "crate-0a1b2c3d"))
    row = TrialRow(id="x", arm="crate", seed=0, state="INFEASIBLE", reason="needs 90 GB of memory\nlong")
    write_trial(folder, row)
    assert read_run_rows([folder]).unread == {folder.uri: "infeasible (needs 90 GB of memory)"}


def test_a_damaged_trial_is_a_reason_and_leaves_the_tuning_of_the_others_unknown(tmp_path: Path) -> None:
    root, _ = sweep_of(tmp_path)
    damaged = trial(root, "crate", 1e-4, 0.7)
    confirmed = trial(root, "crate", 1e-3, 0.8, seed=1000, stage="confirm")
    Path(damaged.path("trial.json")).write_text("{")
    found = read_run_rows([damaged, confirmed])
    assert list(found.unread) == [damaged.uri]
    assert [(row.uri, row.tuning_trials, row.place) for row in found.rows] == [(confirmed.uri, None, None)]


@pytest.mark.slow
def test_a_thousand_folders_are_read_in_a_few_seconds(tmp_path: Path) -> None:
    root, _ = sweep_of(tmp_path)
    template = trial(root, "crate", 1e-3, 0.8)
    judged(template, "validation", 0.7)
    files = {path.name: path.read_bytes() for path in Path(template.uri).iterdir() if path.is_file()}
    for index in range(999):
        copy = root / "trials" / f"crate-{index:08x}"
        copy.mkdir()
        for name, content in files.items():
            (copy / name).write_bytes(content)
    began = time.process_time()
    found = read_run_rows(list_runs(str(root)))
    assert len(found.rows) == 1000
    assert time.process_time() - began < 8
