"""Makes tests/golden/loss_curve.json again: the losses of a small run, and the kind of machine that made them.

    python -m benchmarks.golden_loss_curve              # writes the file
    python -m benchmarks.golden_loss_curve --compare    # prints the largest difference to it instead

In: nothing. Out: 50 losses of a CRATE-MAE on drawn shapes, in float32 and bfloat16, on one thread; to be made again when
torch changes, or when numbers are meant to change; `tests/training/test_determinism.py` compares with them for equality where
the machine is of the same kind.
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from crate_ray.config import RunConfig
from crate_ray.data import build_source
from crate_ray.runs import RunFolder, read_records
from crate_ray.training.loop import LocalContext, run_training

FILE = Path(__file__).parents[1] / "tests" / "golden" / "loss_curve.json"
STEPS = 50
RECIPE = "digits_crate_mae"
OVERRIDES = (
    *("model.image_size=16", "model.width=32", "model.num_heads=4", "model.encoder_depth=2", "model.decoder_depth=2"),
    *("data.augment=random_resized_crop", "data.num_loaders=2", "schedule.warmup_steps=5", "optimizer.lr=2e-3"),
    *(f"train.steps={STEPS}", "train.global_batch=8", "train.deterministic=true", "scale.use_gpu=false"),
    *("eval.log_every_steps=1", "eval.every_steps=null", "eval.probe_every_steps=null", "eval.whitebox_every_steps=null"),
)
_INSTRUCTIONS = ("fma", "avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


def machine_kind() -> dict[str, Any]:
    """What decides which kernels run: processor with its instructions, torch, threads."""
    kind: dict[str, Any] = {"machine": platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    kind["vectors"] = torch.backends.cpu.get_cpu_capability()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().split("\n\n")[0].splitlines() if cpuinfo.is_file() else []
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    kind |= {key: values.get(key) for key in ("vendor_id", "cpu family", "model", "model name")}
    flags = (values.get("flags") or values.get("Features") or "").split()
    return {**kind, "instructions": [name for name in _INSTRUCTIONS if name in flags]}


def loss_curve(folder: Path, precision: str) -> list[float]:
    """The loss of each step, exactly as recorded.

    Args:
        folder: Empty, or with the images of an earlier call.
        precision: float32 or bfloat16.
    """
    if not (folder / "train").is_dir():
        build_source("shapes:60", str(folder), image_size=16)
    data = (f"data.train={folder / 'train'}", f"data.eval={folder / 'validation'}")
    config = RunConfig.load(RECIPE, (*OVERRIDES, *data, f"train.precision={precision}"))
    run = RunFolder(str(folder / precision))
    run_training(config, run, LocalContext())
    return [record.values["train/loss"] for record in read_records(run) if "train/loss" in record.values]


def main() -> None:
    """Writes the file, or compares with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="print differences; write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        losses = {precision: loss_curve(Path(folder), precision) for precision in ("float32", "bfloat16")}
    if not arguments.compare:
        FILE.write_text(json.dumps({"kind": machine_kind(), "losses": losses}, indent=1) + "\n")
        return
    golden = json.loads(FILE.read_text())["losses"]
    for precision, values in losses.items():
        relative = [abs(ours - theirs) / theirs for ours, theirs in zip(values, golden[precision], strict=True)]
        print(f"{precision}: largest relative difference {max(relative):.1e}, at step {relative.index(max(relative)) + 1}")


if __name__ == "__main__":
    main()
