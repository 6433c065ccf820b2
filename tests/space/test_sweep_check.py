"""A sweep that could not give what it asks for is refused before anything starts, in one sentence with the fix."""

from collections.abc import Callable
from typing import Any

import pytest

from crate_ray.config import ConfigError, SweepConfig
from crate_ray.space import check_sweep, scheduler_metric

Make = Callable[..., SweepConfig]
TUNE = {"optimizer.lr": {"grid": [1e-3, 3e-3]}}
PBT = {"type": "pbt", "perturb": TUNE, "interval_steps": 20, "population": 2}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"confirm": {"seeds": 5}},
        {"scheduler": {"type": "asha", "grace_steps": 20, "bracket_by": "params"}},
        {"scheduler": {"type": "median", "metric": "knn_top1"}},
        {"scheduler": PBT},
        {"search": {"method": "nsga2"}, "objective": ["knn_top1", "params_m"], "budget": {"trials": 4}},
        {
            "objective": ["probe_top1"],
            "arms": {"mae": {"set": {"model.mask_ratio": 0.5}}, "crate": {"base": "digits_crate_mae"}},
        },
        {"pair": False, "arms": {"mae": {"set": {"data.window": 8}}, "crate": {"base": "digits_crate_mae"}}},
        {
            "objective": ["knn_top1"],
            "space": {"model.mask_ratio": {"grid": [0.5, 0.75]}},
            "set": {"train.steps": 60},
            "arms": {"images": {}, "flops": {"space": {"train.steps": {"same_flops_as": {"model.mask_ratio": 0.75}}}}},
        },
    ],
)
def test_a_sweep_that_can_be_run_passes(sweep_of: Make, changes: dict[str, Any]) -> None:
    check_sweep(sweep_of(**{"tune": TUNE, **changes}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"constraints": ["params <= 5"]}, "unknown name 'params'"),
        ({"arms": {"a": {"base": "digits_mea"}}}, "recipe 'digits_mea' is unknown"),
        ({"set": {"model.mask_ratio": 3}}, "mask_ratio = 3"),
        ({"set": {"data.eval": None}}, "no run of arm 'mae' reports eval_loss: its data.eval is null"),
        ({"set": {"data.eval": None}, "objective": ["params_m", "knn_top1"]}, "no run of arm 'mae' reports knn_top1"),
        ({"search": {"method": "nsga2"}, "budget": {"trials": 4}}, "nsga2 searches for a front of two objectives"),
        ({"objective": ["probe_top1"], "scheduler": {"type": "asha"}}, "set scheduler.metric to one of eval_loss"),
        (
            {"arms": {"mae": {}, "crate": {"set": {"model.mask_ratio": 0.5}}}},
            "objective = eval_loss, but model.mask_ratio takes 0.5, 0.75 over the trials",
        ),
        ({"space": {"model.norm_pix_loss": {"grid": [True, False]}}}, "model.norm_pix_loss takes False, True"),
        ({"space": {"model.patch_size": {"grid": [4, 8]}}}, "choose knn_top1 or probe_top1, or hold model.patch_size equal"),
        (
            {
                "space": {"model.patch_size": {"grid": [4, 8]}},
                "objective": ["knn_top1"],
                "scheduler": {"type": "asha", "metric": "eval_loss"},
            },
            "scheduler.metric = eval_loss, but model.patch_size",
        ),
        ({"arms": {"mae": {}, "b": {"set": {"storage.path": "x"}}}}, "storage.path differs between arms (mae: out, b: x)"),
        (
            {"arms": {"mae": {}, "b": {"set": {"train.global_batch": 64}}}},
            "train.global_batch differs between arms (mae: 128, b: 64)",
        ),
        ({"arms": {"mae": {}, "b": {"set": {"data.lanes": 8}}}}, "data.lanes differs between arms (mae: 64, b: 8)"),
        ({"arms": {"mae": {}, "b": {"set": {"data.train": "x"}}}}, "data.train differs between arms"),
        ({"arms": {"mae": {}, "b": {"set": {"train.steps": 30}}}}, "let train.steps follow training FLOPs (same_flops_as)"),
        ({"arms": {"mae": {}, "b": {"space": {"train.global_batch": {"grid": [32]}}}}}, "train.global_batch varies in arm 'b'"),
        ({"scheduler": {"type": "asha", "grace_steps": 10}}, "grace_steps = 10 comes before the first report"),
        ({"scheduler": {"type": "asha", "grace_steps": 60}}, "stops no trial before step 60, and the shortest runs have 60"),
        ({"scheduler": {"type": "asha", "reduction_factor": 1.2}}, "too coarse for rungs at 24 and 28.8 steps"),
        (
            {"scheduler": {"type": "hyperband", "bracket_by": "params"}},
            "bracket_by does nothing for scheduler.type = hyperband",
        ),
        ({"scheduler": {"type": "asha", "perturb": TUNE}}, "perturb has no effect with scheduler.type = asha"),
        ({"scheduler": {**PBT, "perturb": {}}}, "pbt changes nothing without scheduler.perturb"),
        ({"scheduler": {**PBT, "perturb": {"model.width": {"grid": [8]}}}}, "goes on with another one's weights"),
        (
            {"scheduler": {**PBT, "perturb": {"optimizer.name": {"choice": ["adamw", "lion"]}}}},
            "keys of optimizer but its name",
        ),
        (
            {"scheduler": PBT, "space": {"optimizer.weight_decay": {"of": "optimizer.lr", "times": 10}}, "tune": TUNE},
            "optimizer.weight_decay of arm 'mae' follows it, and would keep its old value",
        ),
        ({"scheduler": {**PBT, "interval_steps": None}}, "interval_steps = None"),
        ({"scheduler": {**PBT, "interval_steps": 10}}, "give a multiple of 20"),
        ({"scheduler": {**PBT, "interval_steps": 60}}, "no trial could copy another one"),
        ({"scheduler": {**PBT, "population": 3}}, "scheduler.population = 3, and arm 'mae' has 2 feasible points"),
        ({"scheduler": PBT, "search": {"method": "tpe"}, "budget": {"trials": 4}}, "two searches of the same trials"),
        ({"constraints": ["gflops <= 1e-9"]}, "no point of arm 'mae' is feasible"),
    ],
)
def test_what_could_not_work_is_refused_with_the_fix(sweep_of: Make, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_sweep(sweep_of(**{"tune": TUNE, **changes}))
    assert says in str(caught.value)


def test_a_random_population_is_drawn_as_large_as_it_is_asked_for(sweep_of: Make) -> None:
    tune = {"optimizer.lr": {"loguniform": [1e-4, 1e-2]}}
    check_sweep(sweep_of(tune=tune, search={"method": "random"}, scheduler={**PBT, "population": 6}))


@pytest.mark.parametrize(
    ("changes", "metric"),
    [
        ({}, "eval_loss"),
        ({"objective": ["probe_top1", "images_per_s"]}, "images_per_s"),
        ({"objective": ["probe_top1"]}, None),
        ({"objective": ["probe_top1"], "scheduler": {"metric": "knn_top1"}}, "knn_top1"),
    ],
)
def test_rungs_are_judged_by_the_first_objective_that_is_known_while_training(
    sweep_of: Make, changes: dict[str, Any], metric: str | None
) -> None:
    assert scheduler_metric(sweep_of(tune=TUNE, **changes)) == metric
