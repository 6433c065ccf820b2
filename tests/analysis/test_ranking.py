"""Screening trials in order, and where the best tuned values lie."""

import math

import pytest

from crate_ray.analysis.ranking import own_values, point_of, rank, same_question, tuned_keys
from crate_ray.config import Domain


def places(arm):
    return [(trial.place, trial.row.id) for trial in arm.trials]


def test_each_arm_is_ranked_by_itself_best_first(make_sweep, make_trial):
    a, b, c = make_trial("crate", 0.7), make_trial("crate", 0.9), make_trial("mae", 0.8)
    ranking = rank([a, b, c], make_sweep())
    assert [arm.arm for arm in ranking.arms] == ["crate", "mae"]
    assert places(ranking.arms[0]) == [(1, b.id), (2, a.id)]
    assert places(ranking.arms[1]) == [(1, c.id)]


def test_a_loss_is_better_when_smaller(make_sweep, make_trial):
    high, low = (make_trial(objectives={"eval_loss": loss}) for loss in (0.5, 0.4))
    ranking = rank([high, low], make_sweep(objective="eval_loss"))
    assert places(ranking.arms[0]) == [(1, low.id), (2, high.id)]


def test_equal_values_share_a_place_and_the_next_is_counted_on(make_sweep, make_trial):
    rows = [make_trial(top1=0.8, depth=4), make_trial(top1=0.8, depth=2), make_trial(top1=0.7)]
    (arm,) = rank(rows, make_sweep()).arms
    assert places(arm) == [(1, rows[1].id), (1, rows[0].id), (3, rows[2].id)]  # of equals the smaller model stands first


def test_a_stopped_trial_stands_after_every_finished_one_with_its_step(make_sweep, make_trial):
    early = make_trial(top1=0.99, state="STOPPED", step=100)
    late = make_trial(top1=0.6, state="STOPPED", step=200)
    finished = make_trial(top1=0.5)
    (arm,) = rank([early, late, finished], make_sweep()).arms
    assert [(trial.row.id, trial.step) for trial in arm.trials] == [(finished.id, None), (late.id, 200), (early.id, 100)]
    assert arm.best.best.row is finished


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_trial_without_a_finite_value_has_no_place_and_is_counted(make_sweep, make_trial, value):
    rows = [make_trial(), make_trial(top1=value), make_trial(top1=None, state="INFEASIBLE"), make_trial(state="RUNNING")]
    (arm,) = rank(rows, make_sweep()).arms
    assert len(arm.trials) == 1
    assert arm.unranked == {"no finite value": 1, "infeasible": 1}


def test_confirm_runs_are_not_ranked(make_sweep, make_trial):
    assert rank([make_trial(stage="confirm")], make_sweep()).arms == ()


def test_losses_of_unequal_mask_ratio_are_never_ranked_together(make_sweep, make_trial):
    targets = [{"mask_ratio": ratio, "patch_size": 4, "norm_pix_loss": False} for ratio in (0.5, 0.75)]
    rows = [make_trial(objectives={"eval_loss": 0.1, "knn_top1": 0.5}, loss_target=target) for target in targets]
    by_loss = rank(rows, make_sweep(objective="eval_loss"))
    assert [(arm.target, places(arm)) for arm in by_loss.arms] == [
        ({"mask_ratio": 0.5}, [(1, rows[0].id)]),
        ({"mask_ratio": 0.75}, [(1, rows[1].id)]),
    ]
    assert len(rank(rows, make_sweep(objective="knn_top1")).arms) == 1
    assert same_question([], ["eval_loss"]) == []


def test_every_point_has_the_best_of_its_tuned_values(make_sweep, make_trial):
    rows = [
        make_trial(top1=top1, depth=d, lr=lr)
        for d, lr, top1 in [(2, 1e-4, 0.6), (2, 1e-2, 0.7), (4, 1e-4, 0.9), (4, 1e-3, 0.8)]
    ]
    (arm,) = rank(rows, make_sweep()).arms
    assert [(dict(point.values), point.best.row.id, point.num_finished) for point in arm.points] == [
        ({"model.encoder_depth": 4}, rows[2].id, 2),
        ({"model.encoder_depth": 2}, rows[1].id, 2),
    ]
    assert [point.tuned[0].position for point in arm.points] == ["lower edge", "upper edge"]
    assert rank(rows, make_sweep()).positions() == {"optimizer.lr": {"lower edge": 1, "upper edge": 1}}


@pytest.mark.parametrize(
    ("domain", "value", "position"),
    [
        ({"grid": [1, 2, 3]}, 1, "lower edge"),
        ({"grid": [3, 1, 2]}, 3, "upper edge"),
        ({"choice": [1, 2, 3]}, 2, "inside"),
        ({"grid": [0.05]}, 0.05, "single value"),
        ({"grid": ["a", "b"]}, "a", "no order"),
        ({"grid": [True, False]}, True, "no order"),
        ({"uniform": [0.0, 1.0]}, 0.09, "lower edge"),
        ({"uniform": [0.0, 1.0]}, 0.11, "inside"),
        ({"uniform": [0.0, 1.0]}, 0.95, "upper edge"),
        ({"loguniform": [1e-4, 1e-2]}, 1.5e-4, "lower edge"),  # log10(1.5) / 2 = 0.088 of the way
        ({"loguniform": [1e-4, 1e-2]}, 1e-3, "inside"),
        ({"quantized": [32, 128, 32]}, 32, "lower edge"),
        ({"quantized": [32, 128, 32]}, 64, "inside"),
        ({"quantized": [32, 128, 32]}, 128, "upper edge"),
    ],
)
def test_where_a_value_lies_among_those_asked_for(make_sweep, make_trial, domain, value, position):
    sweep = make_sweep().model_copy(update={"tune": {"k": Domain.parse(domain)}})
    (tuned,) = tuned_keys(make_trial(values={"k": value}), sweep)
    assert (tuned.key, tuned.best, tuned.position) == ("k", value, position)


def test_one_learning_rate_makes_a_sweep_exploratory(make_sweep, make_trial):
    assert rank([make_trial()], make_sweep()).exploratory is None
    assert "one fixed learning rate" in rank([make_trial()], make_sweep(tune={})).exploratory


def test_a_point_has_no_key_that_follows_a_tuned_one_and_only_what_tells_it_apart_is_shown(make_sweep):
    sweep = make_sweep(
        space={
            "model.width": {"grid": [64]},
            "model.encoder_depth": {"grid": [2, 4]},
            "model.decoder_depth": {"of": "model.encoder_depth"},
        },
        tune={"optimizer.lr": {"grid": [1e-3, 1e-2]}, "optimizer.weight_decay": {"of": "optimizer.lr", "times": 10}},
    )
    point = {"model.width": 64, "model.encoder_depth": 4, "model.decoder_depth": 4}
    values = point | {"optimizer.lr": 1e-3, "optimizer.weight_decay": 1e-2}
    assert point_of(values, sweep, "mae") == point
    population = {"type": "pbt", "interval_steps": 100, "perturb": {"train.clip_norm": {"uniform": [0.5, 2]}}}
    perturbed = make_sweep(space={}, scheduler=population)
    assert point_of({"model.width": 64, "train.clip_norm": 0.7}, perturbed, "mae") == {"model.width": 64}
    assert own_values(values, sweep, "mae") == {"model.encoder_depth": 4, "optimizer.lr": 1e-3}
