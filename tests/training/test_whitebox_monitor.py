"""The white-box measures in the loop: when they are taken, of what, and that training does not notice."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from crate_ray.config import RunConfig
from crate_ray.data import read_all
from crate_ray.evaluation.spectrum import measure_latents
from crate_ray.evaluation.whitebox import as_metrics, measure_layers, patch_latents
from crate_ray.models import create_model
from crate_ray.runs import RunFolder, read_records
from crate_ray.training.checkpoint import MODEL_FILE, OPTIMIZER_FILE, latest_checkpoint
from crate_ray.training.loop import LocalContext, run_training
from crate_ray.training.whitebox import WhiteboxMonitor

LoadTiny = Callable[..., RunConfig]
LAYER_MEASURES = {
    "coding_rate_pre_nats",
    "coding_rate_post_nats",
    "nonzero_fraction",
    "ista_descent_ratio",
    "ista_objective_ratio",
    "dictionary_coherence",
    "subspace_overlap",
}


def train(config: RunConfig, folder: Path) -> RunFolder:
    run = RunFolder(str(folder))
    run_training(config, run, LocalContext())
    return run


def whitebox(run: RunFolder) -> dict[int, dict[str, float]]:
    """What was recorded, by step."""
    found = {r.step: {key: value for key, value in r.values.items() if key.startswith("whitebox/")} for r in read_records(run)}
    return {step: values for step, values in found.items() if values}


def state(run: RunFolder) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    return {**checkpoint.read(MODEL_FILE), **checkpoint.read(OPTIMIZER_FILE)}


def test_every_layer_is_measured_at_initialisation_in_between_and_at_the_end(load_tiny: LoadTiny, tmp_path: Path) -> None:
    config = load_tiny("eval.whitebox_every_steps=5", "model.encoder_depth=2")
    records = whitebox(train(config, tmp_path / "run"))
    assert sorted(records) == [0, 5, 10, 12]
    names = {f"whitebox/layer{layer:02d}/{name}" for layer in (1, 2) for name in LAYER_MEASURES}
    assert all(values.keys() == names | {"whitebox/latent/rankme", "whitebox/latent/alpha_req"} for values in records.values())
    assert all(records[step] != records[0] for step in (5, 10, 12))


def test_a_transformer_records_its_latents_and_nothing_else(load_tiny: LoadTiny, tmp_path: Path) -> None:
    records = whitebox(train(load_tiny("eval.whitebox_every_steps=50", recipe="digits_mae"), tmp_path / "run"))
    assert sorted(records) == [0, 12]
    assert all(values.keys() == {"whitebox/latent/rankme", "whitebox/latent/alpha_req"} for values in records.values())


@pytest.mark.parametrize("recipe", ["digits_crate_mae", "digits_mae"])
def test_training_is_the_same_bit_by_bit_with_and_without(recipe: str, load_tiny: LoadTiny, tmp_path: Path) -> None:
    plain = train(load_tiny("train.precision=bfloat16", recipe=recipe), tmp_path / "plain")
    watched = train(load_tiny("train.precision=bfloat16", "eval.whitebox_every_steps=1", recipe=recipe), tmp_path / "watched")
    assert whitebox(plain) == {}
    assert len(whitebox(watched)) == 13
    losses = [
        [(r.step, r.values[key]) for r in read_records(run) for key in ("train/loss", "train/grad_norm") if key in r.values]
        for run in (plain, watched)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 24
    ours, theirs = state(plain), state(watched)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_what_is_recorded_is_the_model_on_validation_images_in_float32(load_tiny: LoadTiny, tmp_path: Path) -> None:
    config = load_tiny("eval.whitebox_every_steps=100", "eval.whitebox_images=2", "train.precision=bfloat16")
    run = train(config, tmp_path / "run")
    model = create_model(config.model)
    model.load_state_dict({key: value for key, value in state(run).items() if key in model.state_dict()})
    (first_and_last,) = read_all(config.data.eval or "", batch_size=2, image_size=16, sample_ids=[0, 5])
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (config.data.mean, config.data.std))
    images = (first_and_last.images_BCHW / 255 - mean) / std
    expected = as_metrics(measure_layers(model, images), measure_latents(patch_latents(model, images)))
    assert whitebox(run)[12] == pytest.approx(expected, rel=1e-4)  # float32, pixels normalised by another order of operations


def test_the_batch_is_the_same_whatever_reads_it(load_tiny: LoadTiny) -> None:
    torch.manual_seed(0)
    model = create_model(load_tiny().model).train()
    overrides = [
        ["data.num_loaders=0"],
        ["data.num_loaders=3"],
        ["train.seed=9", "train.global_batch=4"],
        ["eval.max_images=1"],
    ]
    measured = [WhiteboxMonitor(load_tiny(*keys), device=torch.device("cpu")).measure(model) for keys in overrides]
    assert all(values == measured[0] for values in measured)
    assert model.training


def test_a_classifier_is_measured_as_well(load_tiny: LoadTiny) -> None:
    torch.manual_seed(0)
    monitor = WhiteboxMonitor(load_tiny(), device=torch.device("cpu"))
    values = monitor.measure(create_model(load_tiny().model, num_classes=4))
    assert {key.split("/")[-1] for key in values} == LAYER_MEASURES | {"rankme", "alpha_req"}


@pytest.mark.parametrize("override", ["eval.whitebox_every_steps=null", "data.eval=null"])
def test_nothing_is_measured_where_it_is_switched_off_or_has_no_images(
    override: str, load_tiny: LoadTiny, tmp_path: Path
) -> None:
    assert whitebox(train(load_tiny("eval.whitebox_every_steps=5", override), tmp_path / "run")) == {}


def test_a_run_that_goes_on_does_not_measure_its_initialisation_again(load_tiny: LoadTiny, tmp_path: Path) -> None:
    config = load_tiny("eval.whitebox_every_steps=8", "train.steps=12")
    run = RunFolder(str(tmp_path / "run"))
    first, second = LocalContext(1), LocalContext(2)
    first.heartbeat = lambda step: first.stop() if step == 5 else None  # type: ignore[method-assign]
    assert run_training(config, run, first).state == "KILLED"
    assert run_training(config, run, second).state == "FINISHED"
    measured = [(r.step, r.attempt) for r in read_records(run) if "whitebox/latent/rankme" in r.values]
    assert measured == [(0, 1), (8, 2), (12, 2)]
