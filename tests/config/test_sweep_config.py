"""A sweep file becomes a SweepConfig, or is refused with one message that says what to write instead."""

from pathlib import Path
from typing import Any

import pytest

from crate_ray.config import ConfigError, SweepConfig, dump_sweep, is_exploratory

FILE = """
base: digits_mae
set: {model.mask_ratio: 0.75, train.steps: 60}
arms:
  mae: {}
  crate: {base: digits_crate_mae, set: {model.encoder_depth: 2}}
space:
  model.width: {grid: [64, 128]}
  model.num_heads: {of: model.width, times: 0.03125}
tune:
  optimizer.lr: {grid: [1e-3, 3e-3]}
report_every_steps: 20
budget: {trials: 8, hours: 1}
smoke:
  set: {train.steps: 4}
  space: {model.width: {grid: [32]}}
  budget: {trials: 2}
  report_every_steps: 2
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "shape.yaml"
    file.write_text(FILE)
    return str(file)


def refusal(path: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        SweepConfig.load(path, overrides)
    return str(caught.value)


def test_the_name_is_the_files_and_numbers_are_read_as_people_write_them(path: str) -> None:
    sweep = SweepConfig.load(path)
    assert sweep.name == "shape"
    assert sweep.tune["optimizer.lr"].grid == (0.001, 0.003)
    assert sweep.objective == ("eval_loss",)


def test_the_small_size_merges_set_and_budget_key_by_key_and_replaces_entries_of_the_space(path: str) -> None:
    small = SweepConfig.load(path, smoke=True)
    assert small.name == "shape-smoke"
    assert small.set == {"model.mask_ratio": 0.75, "train.steps": 4}
    assert small.space["model.width"].grid == (32,)
    assert small.space["model.num_heads"].times == 0.03125
    assert (small.budget.trials, small.budget.hours, small.report_every_steps) == (2, 1, 2)
    assert SweepConfig.load(path).set["train.steps"] == 60


@pytest.mark.parametrize("kind", ["asha", "median", "hyperband"])
def test_without_a_grace_period_the_first_report_is_the_first_rung(path: str, kind: str) -> None:
    assert SweepConfig.load(path, [f"scheduler.type={kind}"]).scheduler.grace_steps == 20
    assert SweepConfig.load(path, [f"scheduler={{type: {kind}, grace_steps: 40}}"]).scheduler.grace_steps == 40
    assert (
        SweepConfig.parse({"name": "a", "base": "b", "confirm": {}, "scheduler": {"type": kind}}).scheduler.grace_steps == 100
    )
    assert SweepConfig.load(path).scheduler.grace_steps is None


def test_a_file_without_a_small_size_says_how_to_add_one(tmp_path: Path) -> None:
    file = tmp_path / "plain.yaml"
    file.write_text("base: digits_mae\ntune: {optimizer.lr: {grid: [1e-3]}}\n")
    with pytest.raises(ConfigError, match=r"has no small size: add a mapping `smoke:`"):
        SweepConfig.load(str(file), smoke=True)


@pytest.mark.parametrize("smoke", [False, True])
def test_what_is_written_down_is_read_back_as_the_same_sweep(path: str, tmp_path: Path, smoke: bool) -> None:
    overrides = ["tune.model.ista_lambda={of: model.width, map: {32: [0.1, 0.2], 64: 0.5, 128: null}}", "data.eval=null"]
    sweep = SweepConfig.load(path, overrides, smoke=smoke)
    copy = tmp_path / "copy.yaml"
    copy.write_text(f"# schema_version: 1\n{dump_sweep(sweep)}")
    assert SweepConfig.load(str(copy)) == sweep


@pytest.mark.parametrize(
    ("override", "where", "expected"),
    [
        ("budget.trials=4", ("budget", "trials"), 4),
        ("objective=knn_top1", ("objective",), ("knn_top1",)),
        ("name=other", ("name",), "other"),
        ("train.steps=9", ("set",), {"model.mask_ratio": 0.75, "train.steps": 9}),
        ("set.train.steps=9", ("set",), {"model.mask_ratio": 0.75, "train.steps": 9}),
        ("arms.crate.set.model.encoder_depth=3", ("arms", "crate", "set"), {"model.encoder_depth": 3}),
        ("space.model.width={grid: [16]}", ("space", "model.width", "grid"), (16,)),
        ("confirm.set.train.steps=90", ("confirm", "set"), {"train.steps": 90}),
        ("scheduler.perturb.optimizer.lr={grid: [1]}", ("scheduler", "perturb", "optimizer.lr", "grid"), (1,)),
    ],
)
def test_an_override_sets_a_key_of_the_sweep_or_of_its_runs(path: str, override: str, where: Any, expected: Any) -> None:
    value: Any = SweepConfig.load(path, [override])
    for part in where:
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    assert value == expected


def test_null_takes_an_entry_out_of_the_space(path: str) -> None:
    assert set(SweepConfig.load(path, ["space.model.num_heads=null"]).space) == {"model.width"}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("spce.model.width=1", "unknown key 'spce' (did you mean 'space'?)"),
        ("model.widht=3", "--set model.widht: no key of a run (did you mean 'model.width'?)"),
        ("space.model.widht={grid: [3]}", "space.model.widht: no key of a run (did you mean 'model.width'?)"),
        ("arms.crate.set.trian.steps=3", "arms.crate.set.trian.steps: no key of a run (did you mean 'train.steps'?)"),
        ("tune.optimizer={grid: [3]}", "tune.optimizer: no key of a run"),
        ("budget.trials=0", "a budget that small starts no trial"),
        ("budget.gpu_hours=0", "a budget that small starts no trial"),
        ("budget.trial=3", "budget.trial: unknown key (did you mean 'trials'?)"),
        ("model.width=3", "model.width is set to 3 and varies in the space of arm 'mae' too"),
        ("tune.model.width={grid: [3]}", "model.width under both space and tune"),
        ("tune.optimizer.lr={loguniform: [1e-4, 1e-2]}", "loguniform without end in a grid search; give num"),
        ("tune.optimizer.lr={loguniform: [1e-2, 1e-4]}", "the range is empty"),
        ("tune.optimizer.lr={grid: []}", "tune.optimizer.lr.grid"),
        ("tune.optimizer.lr={grid: [1, 1]}", "a value stands there twice"),
        ("tune.optimizer.lr={grid: [1], num: 3}", "num counts the values of uniform and loguniform"),
        ("tune.optimizer.lr={}", "give exactly one of grid, choice"),
        ("space.model.encoder_depth={uniform: [1, 4], num: 3}", "takes whole numbers, and uniform draws others"),
        ("space.model.num_heads={of: model.wdth}", "depends on 'model.wdth', which is no key of this space (did you mean"),
        ("space.model.width={of: model.num_heads}", "depend on each other in a circle"),
        ("space.model.encoder_depth={same_flops_as: {model.width: 8}}", "same_flops_as solves for train.steps alone"),
        ("objective=eval_los", "no run reports 'eval_los' (did you mean 'eval_loss'?); valid: eval_loss"),
        ("scale.num_workers=2", "set.scale.num_workers: follows from the sweep; set resources_per_trial.num_workers"),
        ("train.seed=2", "set screen.seed and confirm.first_seed instead"),
        ("confirm.seeds=3", "confirm.seeds = 3"),
        ("confirm={first_seed: 0}", "screen.seed = 0 is one of the seeds that confirm, 0 to 4, and those must be fresh"),
        ("budget.gpu_hours=2", "these trials use no GPU hours, so it would never end the sweep; limit budget.hours"),
        ("match={quantity: params_m, to: mea, over: {model.width: {grid: [8]}}}", "match.to = 'mea' is no arm"),
        ("match={quantity: params_m, to: mae, over: {data.crop_scale: {uniform: [1, 2]}}}", "the solver tries every value"),
        ("budget", "expected key=value"),
        ("budget.trials.x=3", "'trials' holds a value"),
    ],
)
def test_what_contradicts_itself_is_refused_with_the_fix(path: str, override: str, says: str) -> None:
    message = refusal(path, override)
    assert says in message
    assert len(message.splitlines()) <= 2


def test_a_search_without_end_needs_a_number_of_trials(path: str) -> None:
    assert "give budget.trials" in refusal(path, "budget.trials=null", "search.method=tpe")


def test_nothing_that_varies_and_nothing_to_confirm_is_no_sweep(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("base: digits_mae\n")
    with pytest.raises(ConfigError, match="nothing varies and nothing is confirmed"):
        SweepConfig.load(str(file))
    assert SweepConfig.load(str(file), ["confirm.seeds=5"]).confirm is not None


def test_a_missing_file_is_answered_with_those_beside_it(path: str) -> None:
    with pytest.raises(ConfigError, match=r"is no \.yaml file \(did you mean '.*shape\.yaml'\?\)"):
        SweepConfig.load(path.replace("shape", "shpe"))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ([], None),
        (["tune.optimizer.lr=null"], "at one fixed learning rate"),
        (["tune.optimizer.lr={grid: [1e-3]}"], "at one fixed learning rate"),
        (["tune.optimizer.lr=null", "tune.optimizer.base_lr={grid: [1e-3, 1e-2]}"], None),
        (
            ["tune.optimizer.lr=null", "space.optimizer.lr={grid: [1, 2]}", "arms.crate.space.optimizer.lr={grid: [1, 3]}"],
            "unequal grids",
        ),
    ],
)
def test_a_sweep_that_does_not_tune_its_learning_rate_alike_is_exploratory(
    path: str, overrides: list[str], reason: str | None
) -> None:
    found = is_exploratory(SweepConfig.load(path, overrides))
    assert found is None if reason is None else reason in (found or "")
