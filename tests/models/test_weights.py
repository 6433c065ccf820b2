"""Weights from files: every layout, and every way to be refused."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from crate_ray.config import ConfigError, ModelConfig
from crate_ray.models import MaskedAutoencoder, create_model, load_weights

GOLDEN = Path(__file__).parents[1] / "golden"
SHAPE: dict[str, Any] = {
    "family": "crate",
    "image_size": 32,
    "patch_size": 8,
    "width": 48,
    "num_heads": 3,
    "encoder_depth": 2,
    "decoder_depth": 2,
}


def build(seed: int = 0, **overrides: Any) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    model = create_model(ModelConfig.parse({**SHAPE, **overrides}))
    assert isinstance(model, MaskedAutoencoder)
    return model


def published() -> dict[str, Tensor]:
    with safe_open(GOLDEN / "crate_mae_a.safetensors", "pt") as file:
        return {key.removeprefix("param."): file.get_tensor(key) for key in file.keys() if key.startswith("param.")}  # noqa: SIM118


def same(first: MaskedAutoencoder, second: MaskedAutoencoder) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_our_own_weights_survive_a_file(tmp_path: Path, suffix: str) -> None:
    path, source, target = tmp_path / f"weights{suffix}", build(1), build(2)
    if suffix == ".pth":
        torch.save(source.state_dict(), path)
    else:
        safetensors.torch.save_file(source.state_dict(), path)
    assert not same(source, target)
    load_weights(target, str(path))
    assert same(source, target)


@pytest.mark.parametrize("wrapping", ["model", "state_dict", "module."])
def test_published_weights_load_from_a_training_checkpoint(tmp_path: Path, wrapping: str) -> None:
    state = published()
    wrapped = {f"module.{k}": v for k, v in state.items()} if wrapping == "module." else {wrapping: state, "epoch": 799}
    torch.save(wrapped, tmp_path / "checkpoint.pth")
    plain, from_file = build(1), build(2)
    load_weights(plain, state)
    load_weights(from_file, str(tmp_path / "checkpoint.pth"))
    assert same(plain, from_file)


def test_published_weights_leave_trained_ista_scalars_as_configured() -> None:
    model = build(ista_learnable="layer", ista_lambda=[0.1, 0.5])
    load_weights(model, published())
    lambdas = [float(block.ista.lam.detach()) for block in model.blocks]  # type: ignore[union-attr,operator]
    assert lambdas == pytest.approx([0.1, 0.5])


def test_every_difference_is_listed_in_one_error_and_nothing_is_loaded() -> None:
    state = published()
    del state["norm.weight"]
    state["surplus"] = torch.zeros(1)
    state["mask_token"] = torch.zeros(1, 1, 40)
    model, untouched = build(1), build(1)
    with pytest.raises(ConfigError) as caught:
        load_weights(model, state)
    message = str(caught.value)
    assert "missing: norm.weight" in message
    assert "extra: surplus" in message
    assert "mask_token is (1, 1, 40), the model has (1, 1, 48)" in message
    assert same(model, untouched)


def test_a_long_list_of_differences_is_cut_with_a_count() -> None:
    with pytest.raises(ConfigError, match=r"and \d+ more"):
        load_weights(build(encoder_depth=9), published())


def test_keys_of_no_known_layout_are_refused() -> None:
    with pytest.raises(ConfigError, match="no known layout"):
        load_weights(build(), {"backbone.conv1.weight": torch.zeros(3)})


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model": published(), "args": argparse.Namespace(lr=1.0)}, tmp_path / "stranger.pth")
    with pytest.raises(ConfigError, match="hold more than tensors"):
        load_weights(build(), str(tmp_path / "stranger.pth"))


@pytest.mark.parametrize(
    ("name", "content"), [("a.safetensors", b"nonsense"), ("a.pth", b"nonsense"), ("a.bin", b""), ("b.pth", None)]
)
def test_files_that_are_no_weights_are_refused(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        load_weights(build(), str(tmp_path / name))


def test_a_file_without_a_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ConfigError, match="hold a list, not a state dict"):
        load_weights(build(), str(tmp_path / "list.pth"))
