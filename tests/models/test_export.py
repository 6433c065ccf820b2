"""Weights for other programs: the published classes load them, and the encoder runs without this package."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.published import PublishedMaskedAutoencoder
from crate_ray.config import ConfigError, ModelConfig
from crate_ray.models import MaskedAutoencoder, create_model, load_weights
from crate_ray.models.export import Encoder, Model, export_onnx, export_program, pickle_state, published_state

GOLDEN = Path(__file__).parents[1] / "golden"
FORMATS = {
    "crate_mae_a": "crate",
    "crate_mae_b_norm_pix": "crate",
    "crate_classifier": "crate",
    "vit_mae_all_tokens": "mae",
    "vit_mae_facebook": "mae",
}
SHAPE: dict[str, Any] = {"image_size": 16, "patch_size": 8, "width": 24, "num_heads": 2, "encoder_depth": 2, "decoder_depth": 1}
VISIBLE = {"encoder_tokens": "visible", "decoder_width": 16, "decoder_num_heads": 2}


def golden(name: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        case = json.loads(file.metadata()["case"])
        state = {key.removeprefix("param."): file.get_tensor(key) for key in file.keys() if key.startswith("param.")}  # noqa: SIM118
    return ModelConfig.parse({key: value for key, value in case.items() if key in ModelConfig.model_fields}), state


def build(**overrides: Any) -> Model:
    torch.manual_seed(0)
    return create_model(ModelConfig.parse({**SHAPE, **overrides}))


@pytest.mark.parametrize("name", FORMATS)
def test_every_published_state_dict_comes_back_under_its_own_names(name: str) -> None:
    config, theirs = golden(name)
    model = create_model(config)
    load_weights(model, theirs)
    ours = published_state(model, FORMATS[name]).state
    assert {key: tuple(value.shape) for key, value in ours.items()} == {k: tuple(v.shape) for k, v in theirs.items()}
    is_dead = {"decoder_embed.weight", "decoder_embed.bias"} if config.encoder_tokens == "all" else set()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs.keys() - is_dead)


@pytest.mark.parametrize(
    "keys",
    [
        {"family": "crate"},
        {"family": "crate", "num_heads": 1, "decoder_num_heads": 1, "norm_pix_loss": True},
        {"family": "crate", "encoder_tokens": "visible"},
        {"family": "vit"},
        {"family": "vit", **VISIBLE},
    ],
)
def test_the_published_class_loads_every_key_and_computes_the_same(keys: dict[str, Any]) -> None:
    model = build(**keys)
    assert isinstance(model, MaskedAutoencoder)
    published = PublishedMaskedAutoencoder(model.config)
    file = io.BytesIO(pickle_state(published_state(model, "crate" if keys["family"] == "crate" else "mae").state))
    published.load_state_dict(torch.load(file, weights_only=True)["model"], strict=True)
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 4)
    loss, pred, _, latent = published(images, noise)
    ours = model(images, noise)
    for mine, theirs in ((ours.loss, loss), (ours.pred, pred), (ours.latent, latent)):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_fine_tuned_vit_has_the_names_of_the_published_fine_tuning() -> None:
    layout, state, notes = published_state(build(family="vit", num_classes=5), "mae")
    assert (layout, notes) == ("mae-finetune", ())
    outside = {key for key in state if not key.startswith("blocks.")}
    tensors = {f"{name}.{kind}" for name in ("patch_embed.proj", "fc_norm", "head") for kind in ("weight", "bias")}
    assert outside == tensors | {"cls_token", "pos_embed"}


@pytest.mark.parametrize(
    ("keys", "format"),
    [
        ({"family": "crate"}, "mae"),
        ({"family": "vit"}, "crate"),
        ({"family": "crate", "num_classes": 5}, "mae"),
        ({"family": "crate", "num_classes": 5, "embedding": "linear"}, "crate"),
    ],
)
def test_a_repository_without_such_a_class_is_refused(keys: dict[str, Any], format: str) -> None:
    with pytest.raises(ConfigError, match=f"--format {format} cannot hold this model"):
        published_state(build(**keys), format)


def test_what_a_published_layout_cannot_say_is_said_beside_it() -> None:
    assert "never reads it" in " ".join(published_state(build(family="crate"), "crate").notes)
    assert "ista_lambda = 5.0" in " ".join(published_state(build(family="crate", ista_lambda=5.0), "crate").notes)
    assert "0.1/0.5, 0.1/0.5" in " ".join(published_state(build(family="crate", ista_learnable="layer"), "crate").notes)
    assert "features of whole images agree" in " ".join(published_state(build(family="crate", **VISIBLE), "crate").notes)


RUN_PROGRAMS = """
import importlib.abc, json, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "crate_ray":
            raise ImportError("blocked")
sys.meta_path.insert(0, Blocked())
import numpy as np, onnxruntime, torch
images = np.load("images.npy")
for name in sys.argv[1:]:
    if name.endswith(".pt2"):
        extra = {"metadata.json": ""}
        run = torch.export.load(name, extra_files=extra).module()
        outputs = [run(torch.from_numpy(images[:n])).numpy() for n in (1, 5)]
        metadata = json.loads(extra["metadata.json"])
    else:
        session = onnxruntime.InferenceSession(name, providers=["CPUExecutionProvider"])
        outputs = [session.run(["tokens"], {"images": images[:n]})[0] for n in (1, 5)]
        metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["note"] == "kept"
    np.savez(name, *outputs)
assert not any(name.split(".")[0] == "crate_ray" for name in sys.modules)
"""


@pytest.mark.parametrize(
    "keys", [{"family": "crate"}, pytest.param({"family": "vit", **VISIBLE}, marks=pytest.mark.slow)], ids=["crate", "vit"]
)
def test_the_encoder_runs_without_this_package(keys: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = build(**keys)
    (tmp_path / "encoder.pt2").write_bytes(export_program(model, {"note": "kept"}))
    (tmp_path / "encoder.onnx").write_bytes(export_onnx(model, {"note": "kept"}))
    assert capfd.readouterr() == ("", "")  # nor do the exporters chatter
    images = torch.randn(5, 3, 16, 16)
    np.save(tmp_path / "images.npy", images.numpy())
    files = ["encoder.pt2", "encoder.onnx"]
    subprocess.run([sys.executable, "-c", RUN_PROGRAMS, *files], cwd=tmp_path, check=True, timeout=100)
    for file in files:
        outputs = np.load(tmp_path / f"{file}.npz")
        for count, key in ((1, "arr_0"), (5, "arr_1")):
            expected = model.encode(images[:count]).detach().numpy()
            assert outputs[key].shape == (count, 5, 24), file
            assert np.abs(outputs[key] - expected).max() <= 1e-4 * np.abs(expected).max(), file


@pytest.mark.parametrize("keys", [{"family": "vit", **VISIBLE}, {"family": "vit", "num_classes": 5}])
def test_an_exported_encoder_holds_what_encoding_reads(keys: dict[str, Any]) -> None:
    model = build(**keys)
    is_read = {k for k in model.state_dict() if k.split(".")[0] in ("patch_embed", "cls_token", "pos_embed", "blocks", "norm")}
    assert {key.removeprefix("model.") for key in Encoder(model).state_dict()} == is_read
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(Encoder(model)(images), model.encode(images))


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_the_extra_to_install(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"pip install 'crate-ray\[export\]'"):
        export_onnx(build(family="crate"), {})
