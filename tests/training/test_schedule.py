"""The learning rate against its closed form, and the length of a run in steps."""

import math

import pytest

from crate_ray.config import RunConfig
from crate_ray.training.schedule import cooldown_start, describe_rate, learning_rate, total_steps, warmup_steps


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


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_with_a_cooldown_the_peak_is_held_and_then_falls_on_a_straight_line(final: float) -> None:
    rates = [learning_rate(n, total=100, warmup=10, peak=0.5, final_fraction=final, cooldown=80) for n in range(100)]
    assert rates[:10] == pytest.approx([0.05 * n for n in range(1, 11)])
    assert rates[10:81] == [0.5] * 71
    assert rates[80:] == pytest.approx([0.5 - 0.5 * (1 - final) * n / 20 for n in range(20)])


def test_before_its_cooldown_the_rate_does_not_depend_on_the_length_of_the_run() -> None:
    short, long = (
        [learning_rate(n, total=t, warmup=10, peak=0.3, cooldown=c) for n in range(40)] for t, c in ((50, 40), (500, 400))
    )
    assert short == long


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (["train.steps=600"], None),
        (["train.steps=600", "schedule.cooldown_fraction=0.2"], 480),
        (["train.steps=600", "schedule.cooldown_fraction=1"], 50),  # the warm-up of 50 comes first
        (["train.steps=600", "schedule.cooldown_fraction=0.0001"], 599),
        (["train.epochs=8", "train.global_batch=100", "schedule.cooldown_fraction=0.25"], 60),
    ],
)
def test_the_cooldown_is_the_last_share_of_the_updates(overrides: list[str], start: int | None) -> None:
    assert cooldown_start(RunConfig.load("digits_mae", overrides), 1000) == start


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["optimizer.lr=null", "optimizer.base_lr=1.5e-4", "train.global_batch=512", "schedule.warmup_steps=40"],
            "learning rate 0.0003 at its peak by the linear scaling rule: optimizer.base_lr 0.00015 x train.global_batch "
            "512 / 256; warm-up over 40 steps, then a half cosine to step 2,000, ending at 0 of the peak; adamw",
        ),
        (
            ["optimizer.lr=1e-3", "optimizer.name=lion", "schedule.cooldown_fraction=0.25", "schedule.final_lr_fraction=0.1"],
            "learning rate 0.001 at its peak by optimizer.lr, absolute: the batch does not scale it; warm-up over 50 steps, "
            "then held to step 1,500, a linear cooldown to 2,000, ending at 0.1 of the peak; lion",
        ),
    ],
)
def test_the_rule_of_the_rate_is_said_in_a_sentence(overrides: list[str], expected: str) -> None:
    assert describe_rate(RunConfig.load("digits_mae", ["train.steps=2000", *overrides]), 1000) == expected
