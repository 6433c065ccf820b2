"""Constraints are one comparison a line, of names that a run has."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crate_ray.config import ConfigError, RunConfig, SweepConfig
from crate_ray.space import Point, feasible, quantities
from crate_ray.space.constraints import parse_constraint

RUN = RunConfig.load("digits_crate_mae")
KNOWN = quantities(RUN)


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ("model.width <= 128", True),
        ("model.width < 128", False),
        ("model.width>=128", True),
        ("model.width > 1.28e2", False),
        (" model.width == 128 ", True),
        ("model.width == 64", False),
        ("model.width within 5% of 132", True),
        ("model.width within 5% of 140", False),
        ("model.width  within 2.5 % of 126", True),
        ("optimizer.weight_decay >= .05", True),
        ("train_pflops > 0", True),
    ],
)
def test_a_line_accepts_or_refuses(text: str, accepted: bool) -> None:
    assert (parse_constraint(text).refusal(RUN, KNOWN) is None) == accepted


@given(bound=st.floats(0.01, 1e6), percent=st.floats(0.1, 99), value=st.floats(0, 2e6))
def test_within_is_relative_to_what_stands_at_the_end(bound: float, percent: float, value: float) -> None:
    constraint = parse_constraint(f"params_m within {percent!r}% of {bound!r}")
    assert (constraint.refusal(RUN, {"params_m": value}) is None) == (abs(value - bound) <= constraint.tolerance * bound)


@pytest.mark.parametrize(
    "text",
    [
        "params_m",
        "params_m <= x",
        "params_m <= 5 and gflops < 3",
        "5 <= params_m",
        "params_m within 5 of 3",
        "",
        "params_m =< 5",
    ],
)
def test_what_is_not_of_the_grammar_is_answered_with_it(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not of the form NAME <= NUMBER .* or NAME within P% of NUMBER"):
        parse_constraint(text)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown name 'param_m' \(did you mean 'params_m'\?\); valid: params_m, encoder"):
        parse_constraint("param_m <= 5")


@pytest.mark.parametrize("text", ["params_m within 0% of 5", "params_m within 150% of 5", "params_m within 5% of 0"])
def test_a_tolerance_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="within takes a share"):
        parse_constraint(text)


def test_a_key_that_holds_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.family = 'crate' is no number"):
        parse_constraint("model.family == 3").refusal(RUN, KNOWN)


def test_training_cost_without_a_known_length_is_refused() -> None:
    run = RunConfig.load("digits_mae", ["train.epochs=3"])
    with pytest.raises(ConfigError, match=r"set train\.steps"):
        parse_constraint("train_pflops <= 5").refusal(run, quantities(run))
    assert "train_pflops" in quantities(run, num_samples=1000)


def test_a_point_is_refused_with_its_numbers(sweep_of: Callable[..., SweepConfig]) -> None:
    sweep = sweep_of(space={"model.width": {"grid": [64, 130]}}, constraints=["encoder_params_m within 5% of 0.054"])
    assert feasible(sweep, Point("crate", {"model.width": 64}, 0)) is None
    refusal = feasible(sweep, Point("mae", {"model.width": 64}, 0))
    assert refusal is not None
    assert refusal.startswith("encoder_params_m = 0.2")
    assert "the sweep asks for encoder_params_m within 5% of 0.054" in refusal
    assert "130" in str(feasible(sweep, Point("mae", {"model.width": 130}, 0)))
