"""Which keys make another run of it, and which only change how the same run is carried out."""

import pytest

from crate_ray.config import RunConfig, compare_parts, digest, fingerprint, flatten, resume_parts, run_name

DATA = "0" * 64
HELD = "a" * 64

# Everything that may change while a run goes on. Every other key of RunConfig is part of the run's identity.
FREE = {
    "name",
    "recipe",
    "data.train",
    "data.eval",
    "data.test",
    "data.num_loaders",
    "data.preprocess",
    "data.max_pixels",
    "data.on_error",
    "data.max_replaced_fraction",
    "data.loader_timeout_s",
    "data.cache_dir",
    "data.cache_bytes",
    "train.micro_batch",
    "train.init_from",  # train.init_digest says what it held
}
FREE_SECTIONS = {"eval", "checkpoint", "scale", "health", "storage", "tracking"}


def identity(*overrides: str) -> str:
    return digest(resume_parts(RunConfig.load("digits_crate_mae", overrides), DATA))


@pytest.mark.parametrize(
    "override",
    [
        "name=mine",
        "scale.num_workers=4",
        "scale.num_workers={min: 1, max: 4}",
        "scale.resize_check_s=5",
        "scale.use_gpu=true",
        "scale.parallel=fsdp",
        "scale.max_failures=0",
        "scale.hang_timeout_s=30",
        "health.max_skipped=2",
        "health.max_rollbacks=0",
        "health.lr_factor=0.1",
        "health.lr_steps=7",
        "health.spike_z=4",
        "scale.peak_tflops=989",
        "scale.node_wait_s=60",
        "storage.path=s3://bucket/runs",
        "tracking.uri=http://mlflow:5000",
        "tracking.experiment=crate-mae/other",
        "tracking.system_every_s=60",
        "eval.every_steps=7",
        "eval.probe_every_steps=null",
        "eval.whitebox_every_steps=null",
        "eval.whitebox_images=8",
        "eval.norms_every_steps=null",
        "scale.activation_checkpointing=true",
        "checkpoint.every_steps=3",
        "checkpoint.keep_last=9",
        "checkpoint.keep_best=2",
        "data.num_loaders=0",
        "data.preprocess=ray_data",
        "data.train=/elsewhere/train",
        "data.mix=[{train: /elsewhere/a}, {train: /elsewhere/b}]",  # contents and weights are in the data's digest
        "data.on_error=raise",
        "data.cache_dir=/scratch/shards",
        "train.micro_batch=2",
    ],
)
def test_how_a_run_is_carried_out_does_not_change_its_identity(override: str) -> None:
    assert identity(override) == identity()


@pytest.mark.parametrize(
    "override",
    [
        "model.width=64",
        "model.ista_step_size=0.2",
        "model.ista_lambda=[0.5, 0.5, 0.5, 0.4]",
        "model.mask_ratio=0.5",
        "model.norm_pix_loss=true",
        "data.lanes=32",
        "data.window=16",
        "data.augment=random_resized_crop",
        "data.mean=[0.4, 0.5, 0.5]",
        "optimizer.lr=1e-3",
        "optimizer.weight_decay=0",
        "optimizer.betas=[0.9, 0.99]",
        "optimizer.name=lion",
        "optimizer.name=muon",
        "schedule.warmup_steps=10",
        "schedule.final_lr_fraction=0.1",
        "train.steps=601",
        "train.global_batch=64",
        "train.seed=1",
        "train.precision=float32",
        "train.clip_norm=null",
        "train.ema=0.99",
    ],
)
def test_what_decides_the_numbers_changes_the_identity(override: str) -> None:
    assert identity(override) != identity()


def test_every_key_is_either_identity_or_known_to_be_free() -> None:
    given = [
        "name=given",
        "train.micro_batch=8",
        "data.cache_dir=/x",
        "data.preprocess=ray_data",
        "train.init_from=weights.pth",
        f"train.init_digest={HELD}",
    ]
    config = RunConfig.load("digits_crate_mae", given)  # keys that are null are left out
    keys = {key for key in flatten(config.model_dump(mode="json")) if key.split(".")[0] not in FREE_SECTIONS}
    assert keys - resume_parts(config, DATA).keys() == FREE
    assert resume_parts(config, DATA).keys() - keys == {"data.digest"}


CLASSIFIER = ("task=classify", "model.num_classes=10")


@pytest.mark.parametrize(
    "override",
    [
        "model.num_classes=11",
        "model.embedding=linear",
        "data.mixup_alpha=0.8",
        "data.cutmix_alpha=1",
        "optimizer.layer_decay=0.65",
        "train.label_smoothing=0.1",
    ],
)
def test_what_decides_the_numbers_of_a_classifier_changes_its_identity(override: str) -> None:
    assert identity(*CLASSIFIER, override) != identity(*CLASSIFIER)


def test_first_weights_are_known_by_what_they_hold_and_not_by_where_they_lie() -> None:
    def started_from(path: str, held: str) -> str:
        return identity(f"train.init_from={path}", f"train.init_digest={held}")

    assert started_from("a.pth", HELD) == started_from("s3://bucket/b.safetensors", HELD)
    assert started_from("a.pth", HELD) != started_from("a.pth", "b" * 64)
    assert started_from("a.pth", HELD) != identity()


def test_classifiers_and_autoencoders_are_not_compared() -> None:
    pretrain, classify = RunConfig.load("digits_crate_mae"), RunConfig.load("digits_crate_mae", CLASSIFIER)
    assert compare_parts(classify, DATA, "float32")["task"] == "classify"
    assert "task" not in compare_parts(pretrain, DATA, "float32"), "runs from before there was a choice keep their digest"


# Identities of the recipes as they were before there was a task to choose; a change here renames everybody's runs.
RESUME = {
    "digits_crate_mae": "00a139159bc8",
    "digits_mae": "ca24e8dc2a46",
    "digits_mae_small": "0a9001a01e2b",
    "imagenet_crate_mae_base": "c50caf82ca84",
    "imagenet_mae_base": "dde7b65994b8",
    "quickstart": "a81dba71764e",
}


@pytest.mark.parametrize("recipe", RESUME)
def test_the_recipes_keep_their_identities(recipe: str) -> None:
    assert digest(resume_parts(RunConfig.load(recipe), DATA))[:12] == RESUME[recipe]


def test_measuring_the_average_is_the_same_run_and_is_not_compared_with_measuring_the_weights() -> None:
    weights, average = (RunConfig.load("digits_mae", ["train.ema=0.99", f"eval.use_ema={ema}"]) for ema in ("false", "true"))
    assert resume_parts(weights, DATA) == resume_parts(average, DATA)
    assert compare_parts(weights, DATA, "float32") != compare_parts(average, DATA, "float32")


def test_other_data_are_another_run() -> None:
    config = RunConfig.load("digits_crate_mae")
    assert resume_parts(config, "1" * 64) != resume_parts(config, DATA)


def test_runs_of_different_models_are_comparable_and_of_different_precision_are_not() -> None:
    crate, vit = RunConfig.load("digits_crate_mae"), RunConfig.load("digits_mae")
    assert compare_parts(crate, DATA, "float32") == compare_parts(vit, DATA, "float32")
    assert compare_parts(crate, DATA, "float32") != compare_parts(crate, DATA, "bfloat16")


def test_a_run_without_a_name_is_named_after_recipe_and_identity() -> None:
    config = RunConfig.load("digits_crate_mae")
    resume = fingerprint(config, DATA, "float32")["resume"]["digest"]
    assert run_name(config, resume) == f"digits_crate_mae-{resume[:8]}"
    assert run_name(RunConfig.load("digits_crate_mae", ["name=mine"]), resume) == "mine"


def test_an_optional_key_that_is_not_set_changes_no_digest() -> None:
    assert flatten({"train": {"steps": 5, "ema": None}}) == {"train.steps": 5}
