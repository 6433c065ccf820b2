"""A wrong configuration is refused with one message: the key, the value, what is valid, the fix."""

from typing import Any

import pytest

from crate_ray.config import PRESETS, ConfigError, ModelConfig, RunConfig

CLASSIFY = ("task=classify", "model.num_classes=10")
TINY = {"family": "vit", "image_size": 32, "patch_size": 4, "width": 16, "num_heads": 2, "encoder_depth": 2}


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        RunConfig.load("digits_mae", overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "key", "suggestion", "valid"),
    [
        ("trian.steps=3", "trian", "train", "checkpoint, data, eval"),
        ("train.step=3", "train.step", "steps", "clip_norm, compile"),
        ("model.widht=16", "model.widht", "width", "block_norm_eps"),
        ("eval.probe_every=5", "eval.probe_every", "probe_every_steps", "every_steps"),
        ("scale.num_worker=2", "scale.num_worker", "num_workers", "cpus_per_worker"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_and_all_valid_ones(
    override: str, key: str, suggestion: str, valid: str
) -> None:
    message = refusal(override)
    assert f"{key}: unknown key (did you mean '{suggestion}'?)" in message
    assert valid in message


def test_an_unknown_key_without_a_near_one_gets_no_suggestion() -> None:
    assert "did you mean" not in refusal("train.qqqqqqq=1")


def test_every_problem_is_reported_at_once() -> None:
    message = refusal("train.seed=-1", "scale.num_workers=0", "train.foo=1")
    assert all(key in message for key in ("train.seed", "scale.num_workers", "train.foo"))


def test_an_unknown_recipe_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'digits_crate_mae'"):
        RunConfig.load("digits_crate_mea")


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'crate_mae_base'"):
        ModelConfig.parse({"preset": "crate_mae_bse"})


@pytest.mark.parametrize("preset", ["5", "[a]", "{a: 1}", "true"])
def test_a_preset_that_is_no_name_is_one_error(preset: str) -> None:
    assert "is unknown; valid: crate_base" in refusal(f"model.preset={preset}")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"preset": "mae_base", "ista_learnable": "layer"}, "family vit has none"),
        ({"preset": "crate_tiny", "mask_ratio": 3}, "mask_ratio = 3.0 is no share of the patches"),
        ({"preset": "crate_tiny", "mask_ratio": 0}, "a classifier hides none"),
    ],
)
def test_a_key_that_would_be_read_by_nobody_is_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ModelConfig.parse(values)


@pytest.mark.parametrize("override", ["train.steps", "=3", "train..steps=3", "train.steps.x=3", "train.steps=[1"])
def test_an_override_that_is_no_assignment_is_refused_with_its_text(override: str) -> None:
    assert f"--set {override}" in refusal(override)


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        (["optimizer.lr=null"], "give exactly one of optimizer.lr"),
        (["train.steps=null"], "give exactly one of train.steps and train.epochs"),
        (["scale.num_workers=129"], "use at most 128 workers"),
        (["scale.num_workers={min: 1, max: 129}"], "scale.num_workers.max = 129 is more than train.global_batch = 128"),
        (["scale.num_workers={min: 3, max: 2}"], "such as {min: 1, max: 8}, not {'min': 3, 'max': 2}"),
        (["scale.num_workers={min: 1}"], "not {'min': 1}"),
        (["scale.num_workers={min: 1, most: 2}"], "not {'min': 1, 'most': 2}"),
        (["scale.num_workers=1.5"], "scale.num_workers = 1.5: give a whole number of workers, 1 or more"),
        (["data.crop_scale=[0.5, 0.2]"], "smallest <= largest"),
        (["model.num_classes=10"], "leave it out"),
        (["task=classify"], "give the number of classes"),
        (["data.mixup_alpha=0.8"], "set task to classify"),
        (["train.label_smoothing=0.1", "optimizer.layer_decay=0.65"], "train.label_smoothing, optimizer.layer_decay"),
        ([*CLASSIFY, "data.mixup_alpha=0.8", "train.global_batch=127"], "use 126"),
        (
            [*CLASSIFY, "data.cutmix_alpha=1", "scale.num_workers=3"],
            "train.global_batch = 128 is not a multiple of 2 x 3 workers",
        ),
        (
            [*CLASSIFY, "data.cutmix_alpha=1", "scale.num_workers={min: 1, max: 4}"],
            "train.global_batch = 128 is not a multiple of 24, which 1 to 4 workers need: use 120",
        ),
        ([*CLASSIFY, "data.cutmix_alpha=1", "train.micro_batch=7"], "train.micro_batch = 7 is odd: use 8"),
        ([*CLASSIFY, "model.embedding=normed"], "embedding linear with either family"),
        (["model.pool=mean"], "belong to classifiers"),
        (["train.init_digest=" + "a" * 64], "give both"),
    ],
)
def test_values_that_do_not_fit_together_are_refused_with_the_fix(overrides: list[str], advice: str) -> None:
    assert advice in refusal(*overrides)


def test_a_refusal_of_a_section_does_not_repeat_the_whole_section() -> None:
    message = refusal("model.num_heads=3")
    assert "model: width = 128 is not divisible by num_heads = 3" in message
    assert "'encoder_depth'" not in message


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"num_heads": 3}, "valid head counts: 1, 2, 4, 8, 16"),
        ({"patch_size": 5}, "use an image size of 30"),
        ({"width": 18, "num_heads": 2}, "must be a multiple of 4"),
        ({"encoder_tokens": "all", "decoder_width": 32}, "must equal width = 16"),
        ({"ista_lambda": [0.1, 0.2, 0.3]}, "ista_lambda has 3 values; give one, or one for each of the 2 layers"),
        ({"ista_step_size": [0.1]}, "ista_step_size has 1 values"),
        ({"ista_lambda": -0.1}, "at least 0"),
        ({"ista_step_size": float("nan")}, "finite"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused_with_the_fix(changes: dict[str, object], advice: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.parse({**TINY, **changes})
    assert advice in str(caught.value)


@pytest.mark.parametrize("mask_ratio", [0.0, 1.0, 0.9999, -0.5, 1.5])
def test_a_mask_that_keeps_or_hides_everything_is_refused(mask_ratio: float) -> None:
    with pytest.raises(ConfigError, match="at least one must be kept and one masked"):
        ModelConfig.parse({**TINY, "mask_ratio": mask_ratio})


@pytest.mark.parametrize("grid", range(2, 33))
def test_the_mask_ratio_that_the_refusal_proposes_is_accepted(grid: int) -> None:
    shape = {**TINY, "image_size": 4 * grid}
    with pytest.raises(ConfigError) as caught:
        ModelConfig.parse({**shape, "mask_ratio": 1.0})
    proposed = float(str(caught.value).rsplit(" ", 1)[-1])
    assert ModelConfig.parse({**shape, "mask_ratio": proposed}).num_kept >= 1


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_whole_model(preset: str) -> None:
    config = ModelConfig.parse({"preset": preset})
    of_classifiers = {"num_classes", "embedding", "pool"}
    # null: as the family has it
    of_studies = {"attention", "feedforward", "mlp_ratio", "share_layers"}
    of_studies |= {f"mup_base_{key}" for key in ("width", "num_heads", "decoder_width", "decoder_num_heads")}
    missing = {key for key, value in config.model_dump().items() if value is None}
    assert missing == of_studies | (of_classifiers if config.num_classes is None else set())
    assert len(config.per_layer("ista_lambda")) == config.encoder_depth


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.betas=[1.5, 0.9]",
        "data.std=[0, 0.2, 0.2]",
        "optimizer.lr=.inf",
        "train.seed=99999999999999999999999",
        "model.mask_ratio=.nan",
        "recipe=../../elsewhere",
    ],
)
def test_a_number_that_would_only_fail_in_a_worker_is_refused_with_its_key(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0].replace(".", r"\.")):
        RunConfig.load("digits_crate_mae", [override])


def test_a_preset_replaces_the_recipes_model_and_later_keys_adjust_it() -> None:
    config = RunConfig.load("digits_crate_mae", ["model.preset=mae_base", "model.image_size=32", "model.patch_size=4"])
    assert (config.model.family, config.model.width, config.model.decoder_width) == ("vit", 768, 512)
    assert config.model.image_size == 32
