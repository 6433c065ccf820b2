"""What only a CUDA device can show."""

import numpy as np
import pytest
import torch

from crate_ray.config import RunConfig
from crate_ray.data import Batch
from crate_ray.models import create_model
from crate_ray.training.optimizer import create_optimizer
from crate_ray.training.step import TrainStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("recipe", ["digits_crate_mae", "digits_mae"])
def test_a_step_on_the_gpu_has_the_loss_and_gradient_of_the_cpu(recipe: str) -> None:
    config = RunConfig.load(recipe, ["train.global_batch=16", "train.precision=float32"])
    random = np.random.default_rng(0)
    batch = Batch(
        images_BCHW=torch.from_numpy(random.integers(0, 256, (16, 3, 32, 32), dtype=np.uint8)),
        labels_B=torch.zeros(16, dtype=torch.int64),
        noise_BN=torch.from_numpy(random.random((16, 64), dtype=np.float32)),
        weights_B=torch.ones(16),
        sample_ids_B=torch.arange(16),
        epochs_B=torch.zeros(16, dtype=torch.int64),
        cursor_after=16,
    )
    outcomes = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = create_model(config.model).to(device)
        optimizer = create_optimizer(model, config.optimizer, lr=1e-3)
        step = TrainStep(model, optimizer, config, precision="float32")
        outcomes.append([step(batch, lr=1e-3).read() for _ in range(3)])
    for cpu, cuda in zip(*outcomes, strict=True):
        assert cuda.loss == pytest.approx(cpu.loss, rel=1e-4)
        assert cuda.grad_norm == pytest.approx(cpu.grad_norm, rel=1e-3)
