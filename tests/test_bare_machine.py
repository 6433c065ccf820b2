"""A GPU machine with torch and little else: every room below launch imports there, trains and saves.

It has torch, torchvision, numpy, pyarrow, safetensors, pydantic and pyyaml. What crate-ray needs beside these is blocked in a
fresh interpreter, which is the only way to be sure that nothing else has imported it before.
"""

import subprocess
import sys
from pathlib import Path

from missing_packages import without

BARE = (
    without("ray", "mlflow", "webdataset", "sklearn", "scipy", "matplotlib", "typer", "rich", "psutil", "xxhash", "optuna")
    + """
import importlib, pkgutil, sys

import crate_ray
for room in ("config", "storage", "runs", "data", "models", "evaluation", "training"):
    package = importlib.import_module(f"crate_ray.{room}")
    for module in pkgutil.walk_packages(getattr(package, "__path__", []), f"{package.__name__}."):
        importlib.import_module(module.name)

import torch
from crate_ray.config import RunConfig
from crate_ray.data import Batch
from crate_ray.models import create_model
from crate_ray.runs import NullSink, RunFolder
from crate_ray.training.checkpoint import MODEL_FILE, OPTIMIZER_FILE, latest_checkpoint
from crate_ray.training.optimizer import create_optimizer, optimizer_tensors
from crate_ray.training.parallel import Parallel
from crate_ray.training.saving import CheckpointSaver
from crate_ray.training.step import TrainStep

def train(recipe, folder):
    torch.manual_seed(0)
    config = RunConfig.load(recipe, ["train.global_batch=4", "train.precision=float32"])
    model = create_model(config.model)
    optimizer = create_optimizer(model, config.optimizer, lr=1e-3)
    step = TrainStep(model, optimizer, config, precision="float32")
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    whole = torch.zeros(4, dtype=torch.int64)
    batch = Batch(images, whole, torch.rand(4, model.num_patches), torch.ones(4), whole, whole, 4)
    losses = [step(batch, lr=1e-3).read().loss for _ in range(3)]
    assert losses[0] > losses[1] > losses[2], losses
    files = {MODEL_FILE: (model.state_dict(), {}), OPTIMIZER_FILE: (optimizer_tensors(model, optimizer), {})}
    saver = CheckpointSaver(config, folder, ranks=Parallel(), device=torch.device("cpu"), sink=NullSink(), attempt=1)
    saver.save(3, files, {"cursor": 12, "train_seconds": 0.0})
    saver.wait(is_last=True)
    saver.close()
    saved = latest_checkpoint(folder).read(MODEL_FILE)
    assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items())

torch.set_num_threads(1)
for recipe in ("digits_crate_mae", "digits_mae"):
    train(recipe, RunFolder(f"{sys.argv[1]}/{recipe}"))
assert not MISSING & {name.split(".")[0] for name in sys.modules}
print("trained")
"""
)


def test_both_families_train_and_save_with_torch_and_little_else(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", BARE, str(tmp_path)], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (0, "trained\n"), done.stderr
