"""`crate-ray sweep --dry-run` and `--coord-check`: what they count and print, and that nothing is written; without Ray."""

import functools
import json
import re
from pathlib import Path

import pytest
import yaml

from crate_ray.training import coordinates

SIZES = {"model.width": 32, "model.num_heads": 2, "model.decoder_depth": 1, "model.patch_size": 8, "model.mask_ratio": 0.5}


@pytest.fixture
def sweep_file(digits: Path, tmp_path: Path) -> Path:
    """Two arms; of 2 depths x 3 rates each, the two-layer points of one arm are too large."""
    path = tmp_path / "small.yaml"
    body = {
        "base": "digits_crate_mae",
        "set": {
            **SIZES,
            "storage.path": str(tmp_path / "out"),
            "data.train": f"{digits}/train",
            "data.eval": f"{digits}/validation",
            "train.steps": 20,
            "train.global_batch": 32,
            "schedule.warmup_steps": 5,
            "eval.max_images": 64,
            "eval.whitebox_every_steps": None,
        },
        "arms": {"crate": {}, "vit": {"base": "digits_mae", "set": {"model.decoder_width": 32, "model.decoder_num_heads": 2}}},
        "space": {"model.encoder_depth": {"grid": [1, 2]}},
        "tune": {"optimizer.lr": {"grid": [1e-4, 3e-4, 1e-3]}},
        "constraints": ["params_m <= 0.05"],
        "confirm": {"top_k": 1, "seeds": 5},
        "report_every_steps": 10,
    }
    path.write_text(yaml.safe_dump(body))
    return path


def test_a_dry_run_counts_what_would_run_and_writes_nothing(invoke, sweep_file: Path, tmp_path: Path) -> None:
    outcome = invoke("sweep", sweep_file, "--dry-run", "--no-measure", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    # A ViT layer of width 32 has 12 d^2 + 13 d = 12704 parameters, a CRATE layer 3 d^2 + 5 d = 3232.
    assert (found["trials"], found["confirm_trials"]) == (9, 10)
    assert {arm: body["points"] for arm, body in found["arms"].items()} == {"crate": 6, "vit": 3}
    assert found["feasible_share"] == 9 / 12
    assert found["refused"] == {"not params_m <= 0.05": 3}
    assert found["exploratory"] is None
    assert [first["shape"] for first in found["arms"]["crate"]["first"]] == ["d1 lr1e-4", "d1 lr3e-4", "d1 lr1e-3"]
    assert found["capacity"]["where"] == "this machine"
    assert found["capacity"]["trials_at_a_time"] == found["capacity"]["cpus"] > 0
    assert (found["forecast"], found["price"]) == (None, "no price given")
    assert {path.name for path in tmp_path.iterdir()} == {"small.yaml"}


def test_the_text_says_what_the_budget_leaves_out_and_what_is_exploratory(invoke, sweep_file: Path) -> None:
    words = ["--set", "budget.trials=4", "--set", "tune.optimizer.lr={grid: [0.001]}"]
    text = invoke("sweep", sweep_file, "--dry-run", "--no-measure", *words).out
    assert "small: 3 screening trials; feasible points: crate 2, vit 1; then 10 runs to confirm, 5 seeds each" in text
    assert "refused: 1 x not params_m <= 0.05" in text
    assert "exploratory, at one fixed learning rate" in text
    words = ["--set", "budget.trials=4", "--set", "budget.price=0.05"]
    text = invoke("sweep", sweep_file, "--dry-run", "--no-measure", *words).out
    assert "budget.trials = 4 leaves out 5 of them" in text
    assert "price: 0.05 USD per CPU hour" in text


@pytest.mark.slow
def test_a_dry_run_forecasts_hours_and_cost_from_measured_steps(invoke, sweep_file: Path, tmp_path: Path) -> None:
    words = ["--set", "budget.price=0.05", "--set", "budget.hours=0.0001"]
    found = json.loads(invoke("sweep", sweep_file, "--dry-run", "--json", *words).out)
    total, stages = found["forecast"]["total"], found["forecast"]["stages"]
    assert {name: stage["trials"] for name, stage in stages.items()} == {"screen": 9, "confirm": 10}
    for unit in ("cpu_hours", "wall_hours", "usd"):
        assert 0 < total[unit]["low"] <= total[unit]["expected"] <= total[unit]["high"]
    assert total["usd"]["expected"] == pytest.approx(0.05 * total["cpu_hours"]["expected"])
    assert found["beyond_budget"][0].startswith("budget.hours = 0.0001, forecast")
    assert {path.name for path in tmp_path.iterdir()} == {"small.yaml"}


@pytest.fixture
def quick_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real check at small widths, after one update."""
    quick = functools.partial(coordinates.coordinate_check, seeds=(0, 1), steps=(1,))
    monkeypatch.setattr(coordinates, "coordinate_check", quick)
    monkeypatch.setattr(coordinates, "WIDTHS", (32, 64, 96, 128))


@pytest.mark.usefixtures("quick_check")
def test_the_coordinate_check_of_a_sweep_has_rows_of_both_parametrizations_for_each_arm(invoke, sweep_file: Path) -> None:
    outcome = invoke("sweep", sweep_file, "--coord-check", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["arms"].keys() == {"crate", "vit"}
    for arm in found["arms"].values():
        assert {row["parametrization"] for row in arm["rows"]} == {"standard", "mup"}
        for key, passes in arm["passes"].items():
            assert passes == all(abs(r["slope"]) < found["limit"] for r in arm["rows"] if r["parametrization"] == key)


@pytest.mark.usefixtures("quick_check")
def test_the_coordinate_check_of_a_recipe_prints_slopes_and_a_verdict(invoke) -> None:
    outcome = invoke("sweep", "digits_crate_mae", "--coord-check", "--set", "model.encoder_depth=1")
    assert outcome.code == 0, outcome.err
    assert "standard slope [95%]" in outcome.out
    assert "blocks.*.attn" in outcome.out
    assert re.search(r"muP (passes|does not pass \((grows|shrinks|grows and shrinks|unclear)\)): largest", outcome.out)
    parts = {line.split()[0]: line.split()[-1] for line in outcome.out.splitlines() if re.match(r"\S+ +[+-]\d", line)}
    assert parts.keys() >= {"patch_embed", "blocks.*.attn", "blocks.*.ista", "decoder_pred"}
    assert set(parts.values()) <= {"passes", "grows", "shrinks", "unclear"}
    assert "docs/numerics.md" in outcome.out
    assert "not checked" not in outcome.out


@pytest.mark.usefixtures("quick_check")
def test_of_shared_layers_the_coordinate_check_says_which_applications_it_does_not_see(invoke) -> None:
    words = ["--set", "model.share_layers=true", "--set", "model.encoder_depth=3"]
    outcome = invoke("sweep", "digits_mae", "--coord-check", *words)
    assert outcome.code == 0, outcome.err
    assert "not checked: the first 2 of 3 applications of the shared encoder layer" in " ".join(outcome.out.split())
