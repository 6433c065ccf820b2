"""Input that a user can correct: one message that says how, exit code 2, nothing written."""

from pathlib import Path

import pytest

from crate_ray.runs import Lease
from crate_ray.training.prepare import prepare_run


def options(digits: Path, out: Path, *more: str) -> list[str]:
    paths = [f"data.{key}={digits}/{split}" for key, split in (("train", "train"), ("eval", "validation"), ("test", "test"))]
    return [word for item in (*paths, f"storage.path={out}", *more) for word in ("--set", item)]


@pytest.mark.parametrize(
    ("recipe", "more", "expected"),
    [
        ("digits_crate_mea", [], "did you mean 'digits_crate_mae'?"),
        ("digits_mae", ["train.step=5"], "did you mean 'steps'?"),
        ("digits_mae", ["optimiser.lr=1"], "did you mean 'optimizer'?"),
        ("digits_mae", ["model.mask_ratio=1.0"], "keeps 0 of 64 patches"),
        ("digits_mae", ["model.mask_ratio=0"], "keeps 64 of 64 patches"),
        ("digits_mae", ["model.num_heads=5"], "width = 128 is not divisible by num_heads = 5"),
        ("digits_mae", ["model.image_size=30"], "image_size = 30 is not a multiple of patch_size = 4"),
        ("digits_mae", ["data.train=/no/such/folder"], "/no/such/folder"),
        ("digits_mae", ["data.train=pipe:cat"], "would run a shell command"),
        ("digits_mae", ["scale.num_workers=200"], "use at most 128 workers"),
        ("digits_mae", ["train.steps"], "expected key=value"),
    ],
)
def test_one_message_exit_code_2_and_nothing_written(
    invoke, digits: Path, tmp_path: Path, recipe: str, more: list[str], expected: str
) -> None:
    outcome = invoke("train", recipe, *options(digits, tmp_path / "out", *more))
    assert outcome.code == 2
    assert expected in " ".join(outcome.err.split())
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_folder_without_shards_says_how_to_make_some(invoke, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    outcome = invoke("train", "digits_mae", *options(digits, tmp_path / "out", f"data.train={tmp_path / 'empty'}"))
    assert outcome.code == 2
    assert "crate-ray data" in " ".join(outcome.err.split())


def test_a_name_that_another_configuration_has_lists_the_keys_that_differ(invoke, digits: Path, tmp_path: Path) -> None:
    from crate_ray.config import RunConfig

    words = options(digits, tmp_path / "out", "name=mine")
    prepare_run(RunConfig.load("digits_mae", words[1::2]), device_type="cpu")
    outcome = invoke("train", "digits_mae", *words, "--set", "optimizer.lr=0.5", "--set", "model.mask_ratio=0.25")
    assert outcome.code == 2
    flat = " ".join(outcome.err.split())
    assert "belongs to another configuration" in flat
    assert "optimizer.lr" in flat
    assert "model.mask_ratio" in flat
    assert "train.steps" not in flat


def test_a_folder_that_another_live_driver_holds_is_refused_before_a_cluster_starts(
    invoke, digits: Path, tmp_path: Path
) -> None:
    from crate_ray.config import RunConfig

    words = options(digits, tmp_path / "out", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db")
    _, folder = prepare_run(RunConfig.load("digits_mae", words[1::2]), device_type="cpu")
    lease = Lease.take(folder)
    outcome = invoke("train", "digits_mae", *words)
    lease.end("KILLED")
    assert outcome.code == 2
    assert "held by another live driver" in " ".join(outcome.err.split())


def test_a_dry_run_prints_the_plan_and_writes_nothing(invoke, digits: Path, tmp_path: Path) -> None:
    outcome = invoke("train", "digits_mae", *options(digits, tmp_path / "out", "scale.num_workers=3"), "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "each 43 images a step" in outcome.out  # 128 over 3, rounded up
    assert not (tmp_path / "out").exists()
