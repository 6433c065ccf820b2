"""Recipes and overrides become one frozen configuration, which survives being written and read."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from crate_ray.config import ConfigError, RunConfig, dump_yaml, read_yaml, recipe_names


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_survives_being_written_and_read(recipe: str, tmp_path: Path) -> None:
    config = RunConfig.load(recipe)
    text = dump_yaml(config)
    assert RunConfig.parse(read_yaml(text, where="dump")) == config
    (tmp_path / "copy.yaml").write_text(text)
    assert RunConfig.load(str(tmp_path / "copy.yaml")) == config


def test_values_a_layer_survive_being_written_and_read() -> None:
    config = RunConfig.load("digits_crate_mae", ["model.ista_lambda=[0.1, 0.2, 0.3, 0.4]"])
    assert config.model.ista_lambda == (0.1, 0.2, 0.3, 0.4)
    assert RunConfig.parse(read_yaml(dump_yaml(config), where="dump")) == config


def test_a_recipe_of_ones_own_is_named_after_its_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "model: {preset: mae_small, image_size: 32, patch_size: 4}\ndata: {train: shards}\n"
        "optimizer: {base_lr: 1.5e-4}\ntrain: {epochs: 2, global_batch: 512}\n"
    )
    config = RunConfig.load(str(tmp_path / "mine.yaml"))
    assert config.recipe == "mine"
    assert (config.model.width, config.model.decoder_width, config.model.num_patches) == (384, 512, 64)
    assert config.optimizer.peak_lr(config.train.global_batch) == pytest.approx(3e-4)


@pytest.mark.parametrize(
    ("text", "value"), [("3e-5", 3e-5), ("1E-3", 1e-3), ("1.5e-4", 1.5e-4), ("2", 2.0), (".5", 0.5), ("+1e+0", 1.0)]
)
def test_numbers_are_read_as_people_write_them(text: str, value: float) -> None:
    assert RunConfig.load("digits_mae", [f"optimizer.lr={text}"]).optimizer.lr == value


def test_null_clears_a_key() -> None:
    config = RunConfig.load("digits_mae", ["train.clip_norm=null", "data.eval=null"])
    assert config.train.clip_norm is None
    assert config.data.eval is None


def test_the_last_override_of_a_key_wins() -> None:
    assert RunConfig.load("digits_mae", ["train.steps=5", "train.steps=6"]).train.steps == 6


@pytest.mark.parametrize(
    ("override", "section", "kept", "dropped"),
    [
        ("train.epochs=2", "train", "epochs", "steps"),
        ("optimizer.base_lr=1e-4", "optimizer", "base_lr", "lr"),
        ("schedule.warmup_epochs=1", "schedule", "warmup_epochs", "warmup_steps"),
    ],
)
def test_setting_one_of_two_exclusive_keys_drops_the_recipes_other_one(
    override: str, section: str, kept: str, dropped: str
) -> None:
    part = getattr(RunConfig.load("digits_mae", [override]), section)
    assert getattr(part, kept) is not None
    assert getattr(part, dropped) is None


@pytest.mark.parametrize("text", ["- a list", "just text", "a: [1", ""])
def test_a_file_that_is_no_mapping_is_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        RunConfig.load(str(path))


def test_a_configuration_cannot_be_changed() -> None:
    config = RunConfig.load("digits_mae")
    with pytest.raises(ValidationError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]
