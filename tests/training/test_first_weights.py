"""Runs that start from weights: known by what these hold, refused when they do not fit, and independent of them later."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finished_runs import train

from crate_ray.config import ConfigError, RunConfig
from crate_ray.models import create_model
from crate_ray.models.layouts import to_published
from crate_ray.models.weight_files import encode_safetensors, read_weights
from crate_ray.runs import RunFolder
from crate_ray.training.checkpoint import MODEL_FILE, latest_checkpoint
from crate_ray.training.first_weights import load_first_weights, pin_weights
from crate_ray.training.loop import LocalContext, run_training
from crate_ray.training.prepare import absolute_paths, locate_run, prepare_run

LoadTiny = Callable[..., RunConfig]
CRATE = ("task=classify", "model.num_classes=10", "model.embedding=linear")
VIT = ("task=classify", "model.num_classes=10")


def weights_of(folder: RunFolder) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    return checkpoint.read(MODEL_FILE)


@pytest.fixture
def donor(load_tiny: LoadTiny) -> RunFolder:
    return train(load_tiny("train.steps=2", "name=donor"))


@pytest.fixture
def published(donor: RunFolder, tmp_path: Path) -> Path:
    """The donor's weights as the CRATE repository would hold them: no lambda, no eta."""
    path = tmp_path / "crate.pth"
    torch.save({"model": to_published(weights_of(donor), "crate")}, path)
    return path


@pytest.mark.parametrize(("recipe", "given"), [("digits_crate_mae", CRATE), ("digits_mae", VIT)])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_fine_tuning_starts_from_the_encoder_of_a_run_and_from_nothing_else(
    recipe: str, given: tuple[str, ...], pool: str, load_tiny: LoadTiny
) -> None:
    donor = train(load_tiny("train.steps=2", "name=donor", recipe=recipe))
    config = load_tiny(*given, f"model.pool={pool}", f"train.init_from={donor.uri}", recipe=recipe)
    torch.manual_seed(0)
    model = create_model(config.model)
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    load_first_weights(model, config)
    trained = weights_of(donor)
    own = {"head", "fc_norm"}
    for key, value in model.state_dict().items():
        assert torch.equal(value, fresh[key] if key.split(".")[0] in own else trained[key]), key


def test_pretraining_starts_from_all_of_another_run(donor: RunFolder, load_tiny: LoadTiny) -> None:
    config = load_tiny(f"train.init_from={donor.uri}", "train.steps=1", "optimizer.lr=1e-30", "optimizer.weight_decay=0")
    continued = train(config)
    assert continued.uri != donor.uri
    trained = weights_of(donor)
    assert all(torch.equal(value, trained[key]) for key, value in weights_of(continued).items())


def test_a_run_is_known_by_the_weights_and_not_by_where_they_lie(donor: RunFolder, load_tiny: LoadTiny, tmp_path: Path) -> None:
    checkpoint = latest_checkpoint(donor)
    assert checkpoint is not None
    copy = tmp_path / "elsewhere.safetensors"
    shutil.copy(Path(checkpoint.uri, MODEL_FILE), copy)
    said = ("model.ista_lambda=0.5", "model.ista_step_size=0.1")
    runs = {
        source: prepare_run(load_tiny(*CRATE, *said, f"train.init_from={source}"), device_type="cpu")[1].name
        for source in (donor.uri, str(copy))
    }
    assert len(set(runs.values())) == 1
    other = train(load_tiny("train.steps=2", "train.seed=1", "name=other"))
    from_other = prepare_run(load_tiny(*CRATE, *said, f"train.init_from={other.uri}"), device_type="cpu")[1].name
    assert from_other not in runs.values()


@pytest.mark.parametrize("name", ["null", "given"])
def test_a_run_goes_on_when_its_first_weights_are_gone(name: str, donor: RunFolder, load_tiny: LoadTiny) -> None:
    config = absolute_paths(load_tiny(*CRATE, f"train.init_from={donor.uri}", f"name={name}", "train.steps=2"))
    folder = train(config)
    shutil.rmtree(donor.uri)
    assert locate_run(config).uri == folder.uri
    resumed, again = prepare_run(config, device_type="cpu")
    assert again.uri == folder.uri
    assert run_training(resumed, again, LocalContext(2)).state == "FINISHED"


def test_weights_that_were_never_there_are_refused_with_what_to_give(load_tiny: LoadTiny, tmp_path: Path) -> None:
    for recipe in ("digits_finetune_crate", "digits_finetune_mae"):
        with pytest.raises(
            ConfigError, match=r"train\.init_from = '.*out/RUN' does not exist, and no run .*--set train\.init_from"
        ):
            locate_run(absolute_paths(load_tiny(recipe=recipe)))
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_is_no_run_is_refused(load_tiny: LoadTiny, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="is a folder, but not that of a run"):
        locate_run(load_tiny(*CRATE, f"train.init_from={tmp_path / 'folder'}"))
    _, unfinished = prepare_run(load_tiny(), device_type="cpu")
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        locate_run(load_tiny(*CRATE, f"train.init_from={unfinished.uri}"))


def test_a_run_with_another_encoder_is_refused_with_the_keys_that_differ(donor: RunFolder, load_tiny: LoadTiny) -> None:
    other = ("model.num_heads=4", "model.ista_step_size=0.2", "model.ista_lambda=0.1", "model.block_norm_eps=1e-6")
    with pytest.raises(ConfigError) as caught:
        locate_run(load_tiny(*CRATE, *other, f"train.init_from={donor.uri}"))
    message = str(caught.value)
    for line in (
        "model.num_heads: 2 in the file, 4 in the model",
        "model.ista_step_size: 0.1 in the file, 0.2 in the model",
        "model.ista_lambda: 0.5 in the file, 0.1 in the model",
        "model.block_norm_eps: 1e-05 in the file, 1e-06 in the model",
    ):
        assert line in message
    assert message.count("\n  model.") == 4


@pytest.mark.parametrize("carries", ["a checkpoint that carries its configuration", "an old one"])
def test_pretraining_refuses_a_run_whose_decoder_computes_something_else(
    carries: str, donor: RunFolder, load_tiny: LoadTiny
) -> None:
    checkpoint = latest_checkpoint(donor)
    assert checkpoint is not None
    path = Path(checkpoint.uri, MODEL_FILE)
    if carries == "an old one":
        path.write_bytes(encode_safetensors(checkpoint.read(MODEL_FILE), None))
        manifest = donor.read_json(f"checkpoints/{path.parent.name}/manifest.json") or {}
        manifest["files"][MODEL_FILE] = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        donor.write_json(f"checkpoints/{path.parent.name}/manifest.json", manifest)
    else:
        assert read_weights(str(path)).config == donor.read_config().model
    differs = ("model.decoder_num_heads=4", "model.norm_pix_loss=true")
    with pytest.raises(ConfigError) as caught:
        locate_run(load_tiny(*differs, f"train.init_from={donor.uri}"))
    assert "model.decoder_num_heads: 2 in the file, 4 in the model" in str(caught.value)
    assert "model.norm_pix_loss: False in the file, True in the model" in str(caught.value)


def test_an_encoder_of_smaller_images_is_taken(donor: RunFolder, load_tiny: LoadTiny) -> None:
    config = load_tiny(*CRATE, f"train.init_from={donor.uri}", "model.image_size=32", "train.steps=1")
    assert weights_of(train(config))["pos_embed"].shape == (1, 65, 16)


def test_a_published_crate_file_needs_lambda_and_eta_said(published: Path, load_tiny: LoadTiny) -> None:
    given = (*CRATE, f"train.init_from={published}")
    with pytest.raises(ConfigError, match=r"no lambda and no eta.*model\.ista_lambda and model\.ista_step_size"):
        locate_run(load_tiny(*given))
    with pytest.raises(ConfigError, match=r"say what it was trained with: model\.ista_step_size \("):
        locate_run(load_tiny(*given, "model.ista_lambda=0.5"))
    train(load_tiny(*given, "model.ista_lambda=0.5", "model.ista_step_size=0.1", "train.steps=1"))


def test_weights_of_another_architecture_are_refused_before_anything_is_written(
    published: Path, load_tiny: LoadTiny, tmp_path: Path
) -> None:
    deeper = load_tiny(
        *CRATE, f"train.init_from={published}", "model.encoder_depth=2", "model.ista_lambda=0.5", "model.ista_step_size=0.1"
    )
    before = sorted(path.name for path in (tmp_path / "runs").iterdir())
    with pytest.raises(ConfigError, match=r"missing: blocks\.1\.attn\.qkv\.weight"):
        locate_run(deeper)
    with pytest.raises(ConfigError, match=r"missing: blocks\.1\.attn\.qkv\.weight"):
        prepare_run(deeper, device_type="cpu")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == before


def test_weights_that_changed_since_are_refused(donor: RunFolder, load_tiny: LoadTiny) -> None:
    config = pin_weights(load_tiny(*CRATE, f"train.init_from={donor.uri}"))
    assert config.train.init_digest == weights_digest(donor)
    other = load_tiny(*CRATE, f"train.init_from={donor.uri}", f"train.init_digest={'ab' * 32}")
    with pytest.raises(ConfigError, match="other weights than were asked for"):
        pin_weights(other)
    with pytest.raises(ConfigError, match="has changed since this run was prepared"):
        load_first_weights(create_model(other.model), other)


def weights_digest(folder: RunFolder) -> str:
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    return hashlib.sha256(Path(checkpoint.uri, MODEL_FILE).read_bytes()).hexdigest()
