import itertools

import pytest

from crate_ray.config import SweepConfig
from crate_ray.runs import TrialRow


@pytest.fixture
def make_sweep():
    def make(**changes):
        values = {
            "name": "made",
            "base": "digits_mae",
            "arms": {"crate": {"base": "digits_crate_mae"}, "mae": {}},
            "space": {"model.encoder_depth": {"grid": [2, 4]}},
            "tune": {"optimizer.lr": {"grid": [1e-4, 1e-3, 1e-2]}},
            "objective": ["knn_top1"],
        }
        return SweepConfig.parse({**values, **changes}, where="a test")

    return make


@pytest.fixture
def make_trial():
    numbers = itertools.count()

    def make(arm="crate", top1=0.8, *, depth=2, lr=1e-3, **changes):
        values = {
            "id": f"{arm}-{next(numbers):08x}",
            "arm": arm,
            "seed": 0,
            "state": "FINISHED",
            "values": {"model.encoder_depth": depth, "optimizer.lr": lr},
            "quantities": {"encoder_params_m": 0.1 * depth, "gflops": 0.01 * depth, "train_pflops": 2.0 * depth},
            "objectives": {} if top1 is None else {"knn_top1": top1},
            "loss_target": {"mask_ratio": 0.75, "patch_size": 4, "norm_pix_loss": False},
            "step": 300,
            "total_steps": 300,
            "seconds": 36.0,
        }
        return TrialRow(**{**values, **changes})

    return make
