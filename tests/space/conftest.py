"""What tests of the space read."""

from collections.abc import Callable
from typing import Any

import pytest

from crate_ray.config import SweepConfig

BASE = {
    "name": "tested",
    "base": "digits_mae",
    "set": {"model.mask_ratio": 0.75, "train.steps": 60},
    "arms": {"mae": {}, "crate": {"base": "digits_crate_mae"}},
    "report_every_steps": 20,
}


@pytest.fixture(scope="session")
def sweep_of() -> Callable[..., SweepConfig]:
    """Makes a sweep of MAE and CRATE-MAE on digits, with keys of its own over it."""

    def make(**changes: Any) -> SweepConfig:
        return SweepConfig.parse({**BASE, **changes})

    return make
