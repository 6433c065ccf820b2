"""Which keys decided the objective."""

import itertools

import pytest

from crate_ray.analysis.importance import importances

pytest.importorskip("optuna")


def grid(make_trial, top1_of):
    return [make_trial(top1=top1_of(d, lr), depth=d, lr=lr) for d, lr in itertools.product((2, 4, 8), (1e-4, 1e-3, 1e-2))]


def test_the_key_that_decides_alone_has_nearly_all_the_variance(make_sweep, make_trial):
    found = importances(grid(make_trial, lambda depth, lr: 0.1 * depth), make_sweep(), "crate")
    assert found.num_trials == 9
    assert list(found.shares) == ["model.encoder_depth", "optimizer.lr"]
    assert found.shares["model.encoder_depth"] > 0.9
    assert found.shares["optimizer.lr"] < 0.05


def test_it_is_the_same_every_time_whatever_the_order(make_sweep, make_trial):
    rows = grid(make_trial, lambda depth, lr: 0.1 * depth + 30 * lr)
    first, again = (importances(rows, make_sweep(), "crate") for _ in range(2))
    assert first == again


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([(2, 1e-3, 0.5), (4, 1e-3, 0.6), (2, 1e-4, 0.7)], "3 distinct finished trials; it needs 4"),
        ([(2, 1e-3, 0.5)] * 6, "1 distinct finished trials; it needs 4"),
        ([(d, 1e-3, 0.1 * d) for d in (1, 2, 3, 4)], "only model.encoder_depth varies; it needs two keys"),
        ([(d, lr, 0.5) for d in (2, 4) for lr in (1e-3, 1e-2)], "every trial has the same value"),
    ],
)
def test_it_says_why_it_says_nothing(make_sweep, make_trial, rows, why):
    trials = [make_trial(top1=top1, depth=depth, lr=lr) for depth, lr, top1 in rows]
    found = importances(trials, make_sweep(), "crate")
    assert (found.shares, found.why_not) == ({}, why)


def test_stopped_confirmed_and_other_arms_trials_say_nothing(make_sweep, make_trial):
    rows = [make_trial(depth=d, lr=lr, top1=d * lr, **change) for d in (2, 4) for lr in (1e-3, 1e-2) for change in CHANGES]
    assert importances(rows, make_sweep(), "crate").num_trials == 0


CHANGES = ({"state": "STOPPED"}, {"stage": "confirm"}, {"arm": "mae"}, {"objectives": {"knn_top1": float("nan")}})


def test_a_key_that_follows_another_one_has_no_share_of_its_own(make_sweep, make_trial):
    sweep = make_sweep(space={"model.encoder_depth": {"grid": [2, 4, 8]}, "model.decoder_depth": {"of": "model.encoder_depth"}})
    rows = grid(make_trial, lambda depth, lr: 0.1 * depth)
    assert set(importances(rows, sweep, "crate").shares) == {"model.encoder_depth", "optimizer.lr"}


def test_names_are_categories(make_sweep, make_trial):
    sweep = make_sweep(
        space={"model.parametrization": {"grid": ["standard", "mup"]}} | {"model.encoder_depth": {"grid": [2, 4]}}
    )
    rows = [
        make_trial(top1=0.9 if name == "mup" else 0.1, values={"model.parametrization": name, "model.encoder_depth": depth})
        for name in ("standard", "mup")
        for depth in (2, 4)
    ]
    shares = importances(rows, sweep, "crate").shares
    assert shares["model.parametrization"] > shares["model.encoder_depth"]
