"""What `crate-ray train` shows before, while and after it trains, from folders and records as runs leave them."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from crate_ray.cli import progress, run_summary
from crate_ray.cli.progress import LINE_EVERY_S, SILENT_S, RunProgress, ShownRun
from crate_ray.cli.run_summary import print_summary, summarise
from crate_ray.config import RunConfig
from crate_ray.launch.train import RunOutcome
from crate_ray.models.cost import count_parameters
from crate_ray.runs import Intervention, Record, RecordWriter, RunFolder, write_interventions
from crate_ray.training.prepare import prepare_run

NO_LINKS: dict[str, dict[str, str]] = {"views": {}, "runs": {}}
FULL = {
    "train/loss": 0.123456,
    "train/lr": 1e-3,
    "perf/images_per_s": 1234.5,
    "perf/data_wait_fraction": 0.018,
    "perf/mfu": 0.413,
    "perf/num_workers": 8,
    "eval/loss": 0.1203,
    "eval/knn_top1": 0.671,
    "train/skipped_steps": 3,
}


def record(step: int, at: float, *, attempt: int = 1, **values: float) -> Record:
    return Record(step, at, attempt, {"train/lr": 1e-3, "train/loss": 0.5, **values})


def shown(run: ShownRun, now: float, width: int) -> list[str]:
    terminal = Console(force_terminal=True, color_system=None, width=width, highlight=False)
    with terminal.capture() as capture:
        terminal.print(run.render(now, width))
    return [line.rstrip() for line in capture.get().splitlines()]


def started(**options: int) -> ShownRun:
    return ShownRun("digits_crate_mae-011c5553", **{"total": 60_000, "attempt": 1, "done": 0, **options}, workers="8 workers")


@pytest.mark.parametrize(("width", "lines"), [(80, 3), (120, 2), (200, 1)])
def test_every_fact_is_whole_on_a_terminal_of_any_width(width: int, lines: int) -> None:
    run = started()
    run.take(Record(100, 1000.0, 1, FULL))
    run.take(Record(1000, 1090.0, 1, {"checkpoint/step": 1000}))
    run.take(Record(1100, 1100.0, 1, FULL))
    found = shown(run, 1102.0, width)
    assert max(map(len, found)) <= width
    text = " ".join(" ".join(found).split())
    for fact in ("step 1,100/60,000", "loss 0.1235", "1,234 images/s", "data wait 2%", "MFU 41%", "eval 0.1203", "kNN 67.1%"):
        assert fact in text
    for fact in ("checkpoint 1,000 (0:12 ago)", "8 workers", "3 steps skipped"):
        assert fact in text
    assert "1:38:08 left" in text  # 58,900 steps at 0.1 s, less the two seconds since the last record
    if width >= 120:
        assert "digits_crate_mae-011c5553" in text
    assert len(found) <= lines + 1


def test_a_resumed_run_starts_at_its_step_and_shows_no_older_record() -> None:
    run = started(attempt=2, done=700)
    run.take(record(900, 10.0, attempt=1))
    run.take(Record(700, 15.0, 2, {"whitebox/layer01/nonzero_fraction": 0.5}))  # comes before the first window of steps
    assert "step 700/60,000" in shown(run, 20.0, 120)[0]
    assert "starting 8 workers  checkpoint 700" in " ".join(shown(run, 20.0, 120))
    run.take(record(720, 30.0, attempt=2))
    assert "step 720/60,000" in shown(run, 31.0, 120)[0]


def test_after_a_step_back_the_time_left_is_measured_anew() -> None:
    run = started(total=100)
    for step, at in ((10, 0.0), (20, 100.0), (12, 400.0), (14, 402.0)):  # 10 s a step, then a restart, then 1 s a step
        run.take(record(step, at))
    (line,) = [text for text in run.parts(402.0) if text.endswith("left")]
    assert line == "1:26 left"


def test_a_finished_run_shows_its_time_and_a_silent_one_its_silence() -> None:
    run = started(total=20)
    run.take(record(10, 0.0))
    assert f"nothing new for {progress.duration(SILENT_S + 5)}" in run.parts(SILENT_S + 5)
    run.take(record(20, 65.0))
    assert "in 1:05" in run.parts(9999.0)
    assert not any("nothing new" in part or "ago" in part for part in run.parts(9999.0))


def test_piped_progress_is_plain_lines_each_ten_seconds_and_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "errors", Console(stderr=True, highlight=False))
    folder = RunFolder(str(tmp_path / "piped"))
    writer = RecordWriter(folder, 1)
    with RunProgress() as shows:
        shows.follow(folder, total=30, attempt=1, workers="1 worker")
        writer.write(10, {"train/loss": 0.5, "train/lr": 1.0})
        shows.poll()
        writer.write(20, {"train/loss": 0.4, "train/lr": 1.0})
        shows.poll()  # within the ten seconds
        writer.write(30, {"train/loss": 0.3, "train/lr": 1.0, "perf/num_workers": 1})
        shows.poll()
    writer.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[1] for line in lines] == ["step 10/30", "step 30/30"]
    assert lines[-1].endswith("loss 0.3000  1 worker")
    assert LINE_EVERY_S == 10


def test_records_that_cannot_be_read_for_a_moment_end_nothing(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)  # reading it raises, as a store that refuses does
    with RunProgress() as shows:
        shows.follow(folder, total=30, attempt=1)
        shows.poll()
        (tmp_path / "run" / "metrics.jsonl").rmdir()
        writer = RecordWriter(folder, 1)
        writer.write(10, {"train/loss": 0.5, "train/lr": 1.0})
        writer.close()
        shows.poll()
        assert shows._runs[-1].has_begun


def options(digits: Path, out: Path, *more: str) -> list[str]:
    paths = [f"data.{key}={digits}/{split}" for key, split in (("train", "train"), ("eval", "validation"), ("test", "test"))]
    return [word for item in (*paths, f"storage.path={out}", *more) for word in ("--set", item)]


def planned(
    invoke: Callable[..., object], digits: Path, out: Path, *more: str, flags: tuple[str, ...] = ()
) -> dict[str, object]:
    outcome = invoke("train", "digits_crate_mae", *options(digits, out, *more), "--dry-run", "--json", *flags)
    assert outcome.code == 0, outcome.err  # type: ignore[attr-defined]
    return dict(json.loads(outcome.out))  # type: ignore[attr-defined]


def test_a_plan_counts_batches_memory_hours_and_bytes_by_hand(invoke, digits: Path, tmp_path: Path) -> None:
    more = ["scale.num_workers=2", "train.micro_batch=20", "train.precision=float32", "scale.peak_tflops=2", "train.ema=0.99"]
    found = planned(invoke, digits, tmp_path / "a" / "out", *more, flags=("--mfu", "0.25"))
    parameters = count_parameters(RunConfig.load("digits_crate_mae").model)
    assert (found["batch_per_worker"], found["micro_batches"]) == (64, 4)
    assert found["memory_bytes"]["state"] == 20 * parameters.trainable  # weight, gradient, two moments and the average
    assert found["memory_bytes"]["batches_read_ahead"] == 4 * 64 * 4 * (3 * 32 * 32 + 64)
    # Weights and their average with position tables, and two moments.
    assert found["checkpoint_bytes"] == 8 * parameters.total + 8 * parameters.trainable
    assert (found["checkpoints_kept"], found["checkpoint_bytes_in_all"]) == (2, 3 * found["checkpoint_bytes"])
    flops = found["training_gflops_per_image"] * 1e9 * 600 * 128
    assert found["hours"] == pytest.approx(flops / (2 * 2e12 * 0.25) / 3600, rel=1e-3)
    assert found["device"] == "CPU"
    assert not (tmp_path / "a").exists()


def test_fewer_images_at_once_need_less_and_sharding_divides_the_state(invoke, digits: Path, tmp_path: Path) -> None:
    whole = planned(invoke, digits, tmp_path, "scale.num_workers=2")["memory_bytes"]
    parts = planned(invoke, digits, tmp_path, "scale.num_workers=2", "scale.parallel=fsdp", "train.micro_batch=16")[
        "memory_bytes"
    ]
    assert parts["activations"] * 4 == whole["activations"]
    assert parts["state"] * 2 == whole["state"]


def test_the_screen_has_its_sections_and_says_what_is_not_known(invoke, digits: Path, tmp_path: Path) -> None:
    outcome = invoke(
        "train", "digits_crate_mae", *options(digits, tmp_path / "out", "scale.num_workers={min: 1, max: 4}"), "--dry-run"
    )
    assert outcome.code == 0, outcome.err
    for name in ("data", "schedule", "model", "workers", "memory", "compute", "checkpoints", "writes", "storage"):
        assert any(line.startswith(f"{name} ") for line in outcome.out.splitlines()), name
    assert "would start" in outcome.out
    assert "1 to 4 workers (CPU, ddp), each 128 images a step, at once, no accumulation" in outcome.out
    assert "no peak of a CPU is; give one worker's TFLOP/s: --set scale.peak_tflops=NUMBER" in outcome.out
    assert not (tmp_path / "out").exists()


def test_more_workers_than_this_machine_has_room_for_are_a_warning_for_a_cluster_may(
    invoke, digits: Path, tmp_path: Path
) -> None:
    found = planned(invoke, digits, tmp_path, "scale.num_workers=100", "scale.cpus_per_worker=64")
    (row,) = [check for check in found["checks"] if check["name"] == "workers"]
    assert row["state"] == "warn"
    assert "100 workers of 64 CPU each; this machine has room for" in row["found"]


def test_storage_that_cannot_be_written_ends_a_dry_run_with_code_2(invoke, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = invoke("train", "digits_crate_mae", *options(digits, tmp_path / "file" / "out"), "--dry-run")
    assert outcome.code == 2
    assert "cannot be written" in " ".join((outcome.out + outcome.err).split())


def test_a_cluster_that_does_not_answer_is_found_without_starting_one(
    invoke, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    outcome = invoke("train", "digits_crate_mae", *options(digits, tmp_path / "out"), "--dry-run")
    assert outcome.code == 2
    assert "RAY_ADDRESS = 127.0.0.1:1 does not answer" in " ".join(outcome.out.split())


def test_a_share_of_the_peak_without_a_dry_run_is_refused_not_ignored(invoke, digits: Path, tmp_path: Path) -> None:
    outcome = invoke("train", "digits_crate_mae", *options(digits, tmp_path / "out"), "--mfu", "0.5")
    assert outcome.code == 2
    assert "add --dry-run" in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("5", "--profile 5 is no range of steps; give the first and the last step to trace, counted from 1, as in 20:24"),
        ("590:601", "is not within the steps that this run has before it; give a range within 1:600"),
    ],
)
def test_a_profile_of_steps_that_are_not_is_one_message_and_nothing_written(
    invoke, digits: Path, tmp_path: Path, steps: str, expected: str
) -> None:
    outcome = invoke("train", "digits_crate_mae", *options(digits, tmp_path / "out"), "--profile", steps)
    assert outcome.code == 2
    assert expected in " ".join(outcome.err.split())
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def ended(digits: Path, tmp_path: Path) -> RunFolder:
    """A folder with records of 20 steps, as a run leaves it."""
    words = options(digits, tmp_path / "out", "name=ended", "train.global_batch=64")
    _, folder = prepare_run(RunConfig.load("digits_crate_mae", words[1::2]), device_type="cpu")
    writer = RecordWriter(folder, 1)
    for step, peak in ((10, 0.75), (20, 0.5)):
        writer.write(step, {**FULL, "train/loss": 1 / step, "memory/peak_gib": peak})
    writer.close()
    return folder


def summary_text(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, **outcome: object) -> str:
    terminal = Console(color_system=None, width=200, highlight=False)
    monkeypatch.setattr(run_summary, "console", terminal)
    with terminal.capture() as capture:
        print_summary(summarise(RunOutcome(folder, folder.read_config(), **outcome), NO_LINKS))  # type: ignore[arg-type]
    return capture.get()


def test_the_summary_of_a_finished_run_says_what_it_did_and_what_is_next(
    ended: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = summary_text(ended, monkeypatch, state="FINISHED")
    assert "20 steps, 1,280 images, 8 workers, 1,234 images/s, data wait 2%, MFU 41%" in text
    assert "0.0500 in training, 0.1203 on validation, kNN 67.1%" in text
    assert "0.75 GiB at most on a worker" in text
    assert "3 steps skipped" in text
    assert f"crate-ray probe {ended.uri}\n" in text


def test_the_summary_of_a_stopped_run_names_its_rollbacks_and_goes_on(
    ended: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollback = Intervention(
        from_step=5,
        first_step=8,
        last_step=12,
        skipped_steps=5,
        pass_over=(448, 768),
        lr_factor=0.5,
        lr_steps=100,
        finding="blocks.0",
        time=time.time(),
        attempt=1,
    )
    write_interventions(ended, [rollback])
    text = summary_text(ended, monkeypatch, state="KILLED", reason="SIGTERM; a checkpoint was written")
    assert "KILLED (SIGTERM; a checkpoint was written)" in text
    assert "3 steps skipped, 1 rollback (from step 12 to 5)" in text
    assert "checkpoints  none" in text
    assert "the same command starts again" in text
