"""The report of a sweep: its sentences, tables and pictures."""

import itertools
import struct
from pathlib import Path

import pytest

from crate_ray.analysis.sweep_findings import sweep_findings
from crate_ray.analysis.sweep_report import report_text, write_report
from crate_ray.config import ConfigError, dump_sweep
from crate_ray.runs import RecordWriter, RunFolder, write_trial

FAMILIES = {"crate": "crate", "mae": "vit"}
FORECAST = {
    "stages": {
        "screen": {"trials": 12, "steps": {"low": 1000, "expected": 3000, "high": 3600}},
        "confirm": {"trials": 10, "steps": {"low": 3000, "expected": 3000, "high": 3000}},
    },
    "total": {
        "cpu_hours": {"low": 0.4, "expected": 0.5, "high": 0.6},
        "wall_hours": {"low": 0.1, "expected": 0.2, "high": 0.3},
    },
    "error": {"trials": 20, "relative": 0.25},
}


def screened(make_trial):
    """CRATE's best learning rate lies at the top of its grid, MAE's inside; the largest rate of the deep MAE diverges."""
    rows = []
    for arm, depth, (index, lr) in itertools.product(FAMILIES, (2, 4), enumerate((1e-4, 1e-3, 1e-2))):
        top1 = 0.5 + 0.02 * depth + (0.05 * index if arm == "crate" else 0.06 - 0.05 * abs(index - 1))
        is_divergent = (arm, depth, lr) == ("mae", 4, 1e-2)
        ending = {"state": "INFEASIBLE", "reason": "loss nan at step 7\nlong | trace"} if is_divergent else {}
        rows.append(make_trial(arm, None if is_divergent else top1, depth=depth, lr=lr, **ending))
    rows[0] = make_trial("crate", 0.99, depth=2, lr=1e-4, state="STOPPED", step=100)
    return rows


def confirmed(make_trial):
    pairs = [("crate", 0.66, 1e-2), ("mae", 0.62, 1e-3)]
    rows = [
        make_trial(arm, top1 + 0.01 * (seed % 3), depth=4, lr=lr, seed=seed, stage="confirm")
        for arm, top1, lr in pairs
        for seed in range(1000, 1005)
    ]
    rows[0] = make_trial("crate", None, depth=4, lr=1e-2, seed=1000, stage="confirm", state="FAILED", reason="worker lost")
    return rows


@pytest.fixture
def written(tmp_path, make_sweep, make_trial):
    """Writes the folder of a sweep and gives its report's text."""

    def write(rows, sweep, results=None):
        folder = RunFolder(str(tmp_path / sweep.name))
        Path(folder.uri).mkdir()
        Path(folder.path("sweep.yaml")).write_text("# schema_version: 1\n" + dump_sweep(sweep))
        for row in rows:
            trial = RunFolder(folder.path("trials", row.id))
            write_trial(trial, row)
            trial.write_json("run_meta.json", {"family": FAMILIES[row.arm]})
            writer = RecordWriter(trial, 1)
            for step in range(100, row.step + 1, 100):
                writer.write(step, {"eval/knn_top1": 0.4 + step / 1000, "train/loss": 1.0})
            writer.close()
        folder.write_json("results.json", results or {})
        return Path(write_report(folder.uri))

    return write


def text_of(rows, sweep, results=None):
    return report_text(sweep_findings(sweep, rows), results or {}, [])


def test_the_report_says_what_was_found_and_what_must_not_be_concluded(make_sweep, make_trial):
    rows = [*screened(make_trial), *confirmed(make_trial)]
    results = {
        "planned": 12,
        "refused": {"params_m = 60, asked for <= 50": 3},
        "forecast": FORECAST,
        "spent": {"hours": 0.25, "trial_hours": 0.22, "gpu_hours": 0.0},
    }
    text = text_of(rows, make_sweep(confirm={}), results)
    for expected in (
        "# Sweep made",
        # CRATE leads by 4 points at every seed, and one seed is missing.
        "crate minus mae: +4.0 [4.0, 4.0] points over 4 paired seeds; crate is better. "
        "Left out of the pairs: seed 1000: crate failed (worker lost).",
        "| crate | screen | 0 | 5 | 1 | 0 | 0 | 0 | 6 |",
        "| mae | screen | 0 | 5 | 0 | 1 | 0 | 0 | 6 |",
        "| crate | confirm | 0 | 4 | 0 | 0 | 1 | 0 | 5 |",
        "- Planned: 12 screening trials.",
        "- Refused before they cost anything: 3 points, params_m = 60, asked for <= 50.",
        "- Infeasible: 1 trial, loss nan at step 7.",
        "| crate | encoder_depth 4, lr 0.01 | 0.4 | 0.04 | 67.3 [65.7, 68.8] | 4 | 1000: failed (worker lost) |",
        "| `optimizer.lr` | crate | 0.01 | upper edge |",
        "| `optimizer.lr` | mae | 0.001 | inside |",
        "- `optimizer.lr` over all 4 points: inside at 2, upper edge at 2.",
        "stopped at step 100 of 300",
        # 6000 steps were expected; 11 x 300 + 100 were made in the screening, 10 x 300 in the confirmation.
        "| training steps | 6,000 | 4,000 to 6,600 | 6,400 | +7%, inside its range |",
        "| wall time (hours) | 0.2 | 0.1 to 0.3 | 0.25 | +25%, inside its range |",
        "| CPU-hours | 0.5 | 0.4 to 0.6 | 0.22 | -56%, outside its range |",
        "For the steps that they trained, trials took 25% more than forecast.",
        "- The best `optimizer.lr` of crate (0.01) lies on the upper edge of its grid: a better one may lie beyond.",
        "- crate and mae: 4 paired seeds, fewer than 5: too few for a firm statement.",
        "Candidates are means of confirmed configurations.",
    ):
        assert expected in text
    assert "Exploratory" not in text
    assert "not over" not in text.lower()


def test_the_pictures_are_there_and_a_second_writing_changes_nothing(written, make_sweep, make_trial):
    path = written([*screened(make_trial), *confirmed(make_trial)], make_sweep(confirm={}))
    pictures = path.parent / "pictures"
    first = {file.name: file.read_bytes() for file in (path, *pictures.iterdir())}
    assert set(first) == {"report.md", "front.png", "importance.png", "keys.png", "learning.png"}
    for name in set(first) - {"report.md"}:
        width, height = struct.unpack(">II", first[name][16:24])
        assert width > height > 300
        assert f"](pictures/{name})" in path.read_text()
    (pictures / "stale.png").write_bytes(b"of an earlier release")
    write_report(str(path.parent))
    assert {file.name: file.read_bytes() for file in (path, *pictures.iterdir())} == first


def test_a_sweep_without_confirmation_and_with_one_rate_claims_nothing(make_sweep, make_trial):
    text = text_of(screened(make_trial)[6:], make_sweep(tune={}))
    assert "**Exploratory**, at one fixed learning rate" in text
    assert "Not confirmed: best of the screening, one seed a trial." in text
    assert "nothing here compares arms" in text
    assert "minus" not in text
    assert "One seed a trial: differences between single trials are not differences between" in text
    assert "on one seed, which flatters them" in text


def test_trials_that_were_helped_past_losses_that_were_no_numbers_are_named(make_sweep, make_trial):
    rows = screened(make_trial)
    assert "rolled back" not in text_of(rows, make_sweep())
    helped = make_trial("crate", 0.7, objectives={"knn_top1": 0.7, "rollbacks": 1, "skipped_steps": 5})
    assert f"or the run rolled back, in {helped.id}: these are not" in text_of([*rows, helped], make_sweep())


def test_unequal_tuning_size_and_an_unfinished_sweep_are_said(make_sweep, make_trial):
    mae = [make_trial("mae", 0.6 + 0.01 * s, depth=4, seed=1000 + s, stage="confirm") for s in range(5)]
    crate = [make_trial("crate", 0.5 + 0.01 * s, depth=2, seed=1000 + s, stage="confirm") for s in range(5)]
    rows = [make_trial("crate", depth=2), make_trial("crate", depth=2), make_trial("mae", depth=4), make_trial(state="KILLED")]
    text = text_of([*rows, *mae, *crate], make_sweep(confirm={}), {"planned": 12})
    assert "The sweep is not over: 1 trial without an end, 4 of 12 planned screening trials have started." in text
    assert "**Not over**: what follows may change." in text
    assert "Unequal tuning budgets (crate 2, mae 1 trials)" in text
    assert "crate and mae: crate has 0.50 times the training FLOPs and 0.50 times the encoder parameters of mae." in text


def test_losses_at_unequal_mask_ratio_have_a_ranking_and_pictures_each(written, make_sweep, make_trial):
    sweep = make_sweep(space={"model.mask_ratio": {"grid": [0.5, 0.75]}}, objective="eval_loss")
    rows = [
        make_trial(
            "mae",
            values={"model.mask_ratio": ratio, "optimizer.lr": lr},
            objectives={"eval_loss": ratio + lr},
            loss_target={"mask_ratio": ratio, "patch_size": 4, "norm_pix_loss": False},
        )
        for ratio in (0.5, 0.75)
        for lr in (1e-4, 1e-3)
    ]
    path = written(rows, sweep)
    text = path.read_text()
    assert "### mae at mask_ratio 0.5\n" in text
    assert "### mae at mask_ratio 0.75\n" in text
    assert "Validation losses are compared only where mask_ratio agree" in text
    assert {file.name for file in (path.parent / "pictures").iterdir()} == {"keys_1.png", "keys_2.png"}  # all are of one size


def test_a_report_can_be_written_before_any_trial_has_ended(written, make_sweep, make_trial):
    text = written([make_trial(top1=None, state="RUNNING", step=0)], make_sweep(confirm={})).read_text()
    assert "No trial has finished yet." in text
    assert "No confirm run has finished yet." in text


def test_rows_whose_folder_is_gone_come_from_the_results(written, make_sweep, make_trial):
    gone = make_trial("mae", 0.7)
    text = written([make_trial()], make_sweep(), {"rows": [gone.as_dict()]}).read_text()
    assert f"`{gone.id}`" in text


def test_a_folder_without_a_sweep_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no sweep\.yaml"):
        write_report(str(tmp_path))
