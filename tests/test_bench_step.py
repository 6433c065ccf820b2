"""The step benchmark runs on a bare machine, and its roofline counts the operations that the models execute."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from missing_packages import without

from benchmarks import bench_step, peers
from benchmarks.roofline import matmuls, training_roofline
from crate_ray.config import ModelConfig
from crate_ray.models.cost import BACKWARD_FACTOR, count_parameters, forward_flops

ROOT = Path(__file__).parent.parent
TINY: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "width": 48,
    "num_heads": 3,
    "encoder_depth": 2,
    "decoder_width": 32,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
}
SMALL = [f"--set={key}={value}" for key, value in TINY.items()]

BARE = (
    without("ray", "mlflow", "timm", "transformers", "webdataset", "sklearn", "scipy", "matplotlib", "typer", "rich", "psutil")
    + """
import sys

import torch
torch.set_num_threads(1)
from benchmarks import bench_step
bench_step.main(sys.argv[1:])
assert not MISSING & {name.split(".")[0] for name in sys.modules}
"""
)


@pytest.mark.slow
def test_it_runs_with_torch_and_little_else_and_says_who_is_left_out(tmp_path: Path) -> None:
    options = ["--device=cpu", "--models=mae_base", "--batch=2", "--rounds=2", f"--json={tmp_path / 'out.json'}", *SMALL]
    done = subprocess.run(
        [sys.executable, "-c", BARE, *options], capture_output=True, text=True, timeout=100, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    for name in ("transformers", "timm"):
        assert f"{name}: left out, not installed" in done.stdout
    assert "| ours float32 eager | published float32 eager |" in done.stdout
    model = json.loads((tmp_path / "out.json").read_text())["models"]["mae_base"]
    assert len(model["rows"]) == 4
    for row in model["rows"]:
        assert row["images_per_s"] > 0
        assert 0 < row["mfu_measured"] < 1
        assert row["mfu_data_sheet"] is None
    for ratio in model["ratios"]:
        assert len(ratio["all"]) == 2


@pytest.mark.parametrize("family", ["crate", "vit"])
@pytest.mark.parametrize("tokens", ["all", "visible"])
@pytest.mark.parametrize("heads", [1, 3])
def test_the_products_of_the_roofline_are_those_of_the_closed_form(family: str, tokens: str, heads: int) -> None:
    width = 48 if tokens == "all" else 32
    shape = {**TINY, "family": family, "encoder_tokens": tokens, "decoder_width": width, "num_heads": heads}
    config = ModelConfig.parse({**shape, "decoder_num_heads": heads if tokens == "all" else 1})
    assert sum(product.count * product.flops for product in matmuls(config)) == forward_flops(config)


def test_a_roofline_is_operations_over_peak_where_memory_is_fast() -> None:
    config = ModelConfig.parse({"preset": "crate_mae_base"})
    fast = training_roofline(config, batch=64, element_bytes=2, peak_flops=1e12, bandwidth_bytes=1e18)
    assert fast.matmul_s == pytest.approx(64 * BACKWARD_FACTOR * forward_flops(config) / 1e12, rel=1e-3)
    slow = training_roofline(config, batch=64, element_bytes=2, peak_flops=1e18, bandwidth_bytes=1e12)
    assert slow.optimizer_s == pytest.approx(28 * count_parameters(config).trainable / 1e12)
    assert slow.stream_s == pytest.approx(28 * 64 * 2 * 24 * 197 * 768 / 1e12)
    assert slow.total_s == slow.matmul_s + slow.stream_s + slow.optimizer_s


def test_the_peers_compute_the_published_loss() -> None:
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    config = ModelConfig.parse({"preset": "mae_base", **TINY})
    torch.manual_seed(0)
    found = {each.name: each for each in peers.implementations(config, say=lambda _: None)}
    assert list(found) == ["ours", "published", "transformers", "timm"]
    timm_model, published = found["timm"].loss.model, found["published"].loss.model
    timm_model.load_state_dict(published.state_dict())
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, config.num_patches)
    torch.testing.assert_close(found["timm"].loss(images, noise), found["published"].loss(images, noise))
    assert found["transformers"].loss(images, noise).shape == ()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--precision=half"], "half is unknown; valid: float32, bfloat16"),
        (["--device=tpu"], "invalid choice"),
        (["--models=crate_tiny"], "crate_tiny: no preset of an autoencoder; valid: crate_mae_tiny"),
        (["--models=mae_base,nope"], "nope: no preset of an autoencoder"),
        (["--device=cpu", "--set=num_classes=5"], "a classifier has no peers here"),
    ],
)
def test_a_wrong_option_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_step.main(arguments)
    assert said in capsys.readouterr().err.splitlines()[-1]
