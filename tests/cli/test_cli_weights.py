import json
from pathlib import Path
from typing import Any

import pytest
import torch

from crate_ray.config import ModelConfig
from crate_ray.data import build_source
from crate_ray.models import create_model, load_weights
from crate_ray.models.export import published_state
from crate_ray.models.weight_files import read_weights

SHAPE: dict[str, Any] = {"image_size": 16, "patch_size": 4, "width": 16, "num_heads": 2, "encoder_depth": 1, "decoder_depth": 1}
CRATE_TINY = {"image_size": 32}
HEADS = ("--set", "model.num_heads=2")
ISTA = ("--set", "model.ista_lambda=5", "--set", "model.ista_step_size=0.1")


@pytest.fixture
def publish(tmp_path):
    """Writes a random model as its published code would: `publish("crate", family="crate")`."""

    def write(format: str, **keys: Any) -> Path:
        torch.manual_seed(0)
        config = ModelConfig.parse(keys if "preset" in keys else {**SHAPE, **keys})
        path = tmp_path / f"{format}.pth"
        torch.save({"model": published_state(create_model(config), format).state, "epoch": 799}, path)
        return path

    return write


def test_a_file_is_described_with_the_presets_that_fit_and_what_it_cannot_say(invoke, publish):
    result = invoke("weights", publish("crate", preset="crate_mae_tiny", **CRATE_TINY))
    assert result.code == 0
    lines = dict(line.split(maxsplit=1) for line in result.out.splitlines() if not line.startswith(" "))
    assert lines["layout"] == "crate"
    assert lines["architecture"].startswith("CRATE layers: 12 encoder layers of width 384, 12 decoder layers of width 384")
    assert lines["presets"] == "crate_mae_tiny --set model.image_size=32"
    assert "crate_mae_visible_tiny --set model.image_size=32 (with --convert)" in result.out
    assert "model.num_heads, model.ista_lambda, model.ista_step_size" in result.out


@pytest.mark.parametrize(
    ("format", "keys", "layout", "has_decoder", "unsaid"),
    [
        ("crate", {"family": "crate"}, "crate", True, ["num_heads", "ista_lambda", "ista_step_size"]),
        ("crate", {"family": "crate", "num_classes": 5}, "crate-classifier", False, ["num_heads"]),
        ("mae", {"family": "vit", "encoder_tokens": "visible"}, "mae", True, ["num_heads", "decoder_num_heads"]),
        ("mae", {"family": "vit", "num_classes": 5}, "mae-finetune", False, ["num_heads"]),
    ],
)
def test_the_json_holds_layout_shapes_and_decoder(invoke, publish, format, keys, layout, has_decoder, unsaid):
    path = publish(format, **keys)
    found = json.loads(invoke("weights", path, "--json").out)
    assert (found["layout"], found["not_in_file"], found["config"], found["presets"]) == (layout, unsaid, None, [])
    expected = {"family": keys["family"], "width": 16, "encoder_depth": 1, "patch_size": 4, "image_size": 16}
    assert {key: found["architecture"][key] for key in expected} == expected
    assert found["architecture"]["has_decoder"] is has_decoder
    assert found["parameters"] == sum(value.numel() for value in torch.load(path)["model"].values())


def test_what_a_crate_file_does_not_hold_must_be_said(invoke, publish, tmp_path):
    path, out = publish("crate", family="crate"), tmp_path / "out.safetensors"
    result = invoke("weights", path, "--convert", out)
    assert result.code == 2
    assert "say --set model.num_heads=... --set model.ista_lambda=... --set model.ista_step_size=..." in result.err
    assert "--identify --data URL" in result.err
    assert not out.exists()


def test_a_conversion_carries_its_configuration_and_needs_nothing_said_again(invoke, publish, tmp_path):
    path, out = publish("crate", family="crate"), tmp_path / "out.safetensors"
    assert invoke("weights", path, *HEADS, *ISTA, "--convert", out).code == 0
    described = invoke("weights", out).out
    assert "its configuration: 2 heads, lambda 5, step size 0.1" in described.replace("5.0", "5")
    config = read_weights(str(out)).config
    assert config is not None
    model, direct = create_model(config), create_model(config)
    load_weights(model, str(out))
    load_weights(direct, str(path))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), direct.state_dict().values(), strict=True))


def test_a_conversion_to_visible_tokens_says_what_is_untrained(invoke, publish, tmp_path, caplog):
    path, out = (
        publish("crate", preset="crate_mae_tiny", encoder_depth=1, decoder_depth=1, **CRATE_TINY),
        tmp_path / "v.safetensors",
    )
    depths = ("--set", "model.encoder_depth=1", "--set", "model.decoder_depth=1", "--set", "model.image_size=32")
    result = invoke("weights", path, "--preset", "crate_mae_visible_tiny", *depths, *ISTA, "--convert", out, "--json")
    assert result.code == 0
    report = json.loads(result.out)
    assert report["untrained"] == ["decoder_embed.weight", "decoder_embed.bias"]
    assert len(report["warnings"]) == len(caplog.records) == 1
    assert report["config"]["encoder_tokens"] == "visible"


def test_a_file_that_exists_is_kept_unless_forced(invoke, publish, tmp_path):
    path, out = publish("crate", family="crate"), tmp_path / "out.safetensors"
    out.write_text("mine")
    assert invoke("weights", path, *HEADS, *ISTA, "--convert", out).code == 2
    assert out.read_text() == "mine"
    assert invoke("weights", path, *HEADS, *ISTA, "--convert", out, "--force").code == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--identify"], "needs --data URL"),
        (["--identify", "--convert", "x.safetensors"], "two steps"),
        (["--preset", "crate_mae_tiny"], "are for --convert OUT and --identify"),
        ([*HEADS, *ISTA, "--convert", "x.pth"], "weights of this package are .safetensors"),
        ([*HEADS, *ISTA, "--set", "train.steps=3", "--convert", "x.safetensors"], "--set train.steps=3: valid here"),
        (["--out", "x.d", "--images", "4"], "--out, --images: read with --identify only"),
        ([*HEADS, *ISTA, "--data", "x", "--convert", "x.safetensors"], "--data: read with --identify only"),
        (["--force"], "--force is for --convert"),
        ([*HEADS, *ISTA, "--set", "data.mean=[0,0,0]", "--convert", "x.safetensors"], "data.std are read with --identify only"),
        (["--preset", "mae_base", *ISTA, "--convert", "x.safetensors"], "do not fit the model"),
        (["--preset", "crate_mae_bse", *ISTA, "--convert", "x.safetensors"], "did you mean 'crate_mae_base'"),
    ],
)
def test_what_does_not_fit_together_is_one_error(invoke, publish, tmp_path, monkeypatch, arguments, says):
    path = publish("crate", family="crate")
    monkeypatch.chdir(tmp_path)
    result = invoke("weights", path, *arguments)
    assert result.code == 2
    assert says in result.err
    assert "Traceback" not in result.err
    assert not list(tmp_path.glob("x.*"))


def test_values_that_are_not_finite_are_named(invoke, publish):
    path = publish("crate", family="crate")
    assert json.loads(invoke("weights", path, "--json").out)["not_finite"] == []
    content = torch.load(path)
    content["model"]["mask_token"][0, 0, 3] = float("nan")
    torch.save(content, path)
    result = invoke("weights", path)
    assert result.code == 0
    assert "NaN or infinite values in 1 of " in result.out
    assert "which no model takes: mask_token" in result.out
    assert json.loads(invoke("weights", path, "--json").out)["not_finite"] == ["mask_token"]


def test_a_folder_is_told_from_a_missing_file_and_a_run_has_its_export(invoke, tmp_path):
    result = invoke("weights", tmp_path)
    assert result.code == 2
    assert "are a folder" in result.err
    assert "crate-ray export" in result.err


def test_findings_that_cannot_be_written_are_refused_before_the_search(invoke, publish, tmp_path):
    build_source("shapes:30", str(tmp_path / "shapes"), image_size=16)
    (tmp_path / "file").write_text("")
    given = ("--identify", "--data", tmp_path / "shapes" / "validation", "--out", tmp_path / "file" / "found", *HEADS)
    result = invoke("weights", publish("crate", family="crate"), *given)
    assert (result.code, result.out) == (2, "")
    assert "cannot be written" in result.err


def test_identify_prints_both_targets_writes_pictures_and_does_not_claim_proof(invoke, publish, tmp_path):
    build_source("shapes:30", str(tmp_path / "shapes"), image_size=16)
    path, out = publish("crate", family="crate"), tmp_path / "found"
    arguments = (
        "--identify",
        "--data",
        tmp_path / "shapes" / "validation",
        "--out",
        out,
        *HEADS,
        "--set",
        "data.mean=[0.5,0.5,0.5]",
    )
    result = invoke("weights", path, *arguments)
    assert result.code == 0
    assert "target: pixels normalised by patch (norm_pix_loss)" in result.out
    assert "no usable fit" in result.out  # the weights are random
    assert "best fit" not in result.out
    report = json.loads((out / "identify.json").read_text())
    assert len(report["fits"]) == len(list(out.glob("*.png"))) == 16
    assert "consistent with, not proof of, the training setting" in report["conclusion"]
    assert json.loads(invoke("weights", path, *arguments, "--json").out)["fits"] == report["fits"]
