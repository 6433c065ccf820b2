"""The learning rate against its closed form, and the length of a run in steps."""

import math

import pytest

from crate_ray.config import RunConfig
from crate_ray.training.schedule import learning_rate, total_steps, warmup_steps


def rates(total: int, warmup: int, peak: float, final: float) -> list[float]:
    return [learning_rate(step, total=total, warmup=warmup, peak=peak, final_fraction=final) for step in range(total)]


def test_warm_up_is_a_straight_line_to_the_peak() -> None:
    assert rates(100, 10, 0.5, 0.0)[:10] == pytest.approx([0.05 * n for n in range(1, 11)])


def test_after_warm_up_the_rate_is_a_half_cosine() -> None:
    after = rates(110, 10, 0.5, 0.0)[10:]
    assert after == pytest.approx([0.5 * math.cos(math.pi * n / 200) ** 2 for n in range(100)])


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_the_half_way_rate_is_the_mean_of_peak_and_floor_and_the_floor_is_kept(final: float) -> None:
    values = rates(1000, 0, 2.0, final)
    assert values[500] == pytest.approx((2.0 + 2.0 * final) / 2)
    assert min(values) >= 2.0 * final
    assert values[-1] == pytest.approx(2.0 * final, abs=1e-5)


def test_a_run_that_is_all_warm_up_reaches_its_peak() -> None:
    assert rates(5, 5, 1.0, 0.0) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize(
    ("overrides", "total", "warmup"),
    [
        (["train.steps=600"], 600, 50),
        (["train.epochs=2", "train.global_batch=128"], math.ceil(2 * 1000 / 128), 50),
        (["train.epochs=0.001"], 1, 50),
        (["train.epochs=8", "train.global_batch=100", "schedule.warmup_epochs=1.5"], 80, 15),
        (["train.steps=600", "schedule.warmup_steps=null"], 600, 30),
        (["train.steps=600", "schedule.warmup_steps=0"], 600, 0),
    ],
)
def test_length_and_warm_up_count_images_seen(overrides: list[str], total: int, warmup: int) -> None:
    config = RunConfig.load("digits_mae", overrides)
    assert total_steps(config, 1000) == total
    assert warmup_steps(config, 1000) == warmup
