import pytest

from crate_ray.analysis import ComparisonRow, Estimate


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
