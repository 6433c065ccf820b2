import itertools

import pytest

from crate_ray.analysis import ComparisonRow, Estimate
from crate_ray.config import SweepConfig
from crate_ray.runs import TrialRow


@pytest.fixture
def make_row():
    def make(name="CRATE-MAE", *, family="crate", top1=0.9, half=0.01, control=0.6, gain_half=0.02, **changes):
        values = {
            "name": name,
            "family": family,
            "recipe": name,
            "params_trainable": 800_000,
            "params_encoder": 400_000,
            "params_paper": 810_000,
            "gflops_forward": 0.1,
            "training_gflops_per_image": 0.3,
            "train_pflops": 30.0,
            "images_per_s": 500.0,
            "train_seconds": 60.0,
            "eval_loss": 0.25,
            "probe_top1": Estimate(top1, top1 - half, top1 + half),
            "control_top1": control,
            "gain": Estimate(top1 - control, top1 - control - gain_half, top1 - control + gain_half),
            "mask_ratio": 0.75,
            "patch_size": 4,
            "norm_pix_loss": False,
            "seeds": (0,),
        }
        return ComparisonRow(**{**values, **changes})

    return make


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
