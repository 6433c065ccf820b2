"""Probing a finished run: what is recorded where, and what is refused."""

import sys
from collections.abc import Callable

import pytest
from finished_runs import train

from crate_ray.config import ConfigError, RunConfig
from crate_ray.training.prepare import prepare_run
from crate_ray.training.probes import ProbeRequest, probe_run

LoadTiny = Callable[..., RunConfig]


def test_a_verdict_on_validation_never_replaces_one_on_test(load_tiny: LoadTiny) -> None:
    folder = train(load_tiny("train.steps=3"))
    chosen = probe_run(folder, ProbeRequest("validation"))
    final = folder.read_json("final.json")
    assert final is not None
    assert final["values"]["final/probe_top1"] == pytest.approx(chosen["probe_top1"][0], rel=1e-3)

    reported = probe_run(folder, ProbeRequest("test"))
    tested = folder.read_json("final.json")
    probe_run(folder, ProbeRequest("validation"))
    assert tested is not None
    assert tested["values"]["final/probe_top1"] == pytest.approx(reported["probe_top1"][0], rel=1e-3)
    assert folder.read_json("final.json") == tested
    assert tested["cost"] == final["cost"]


def test_the_control_is_the_encoder_that_the_first_step_found(load_tiny: LoadTiny) -> None:
    folder = train(load_tiny("train.steps=1", "optimizer.lr=1e-30", "optimizer.weight_decay=0"))
    report = probe_run(folder, ProbeRequest("validation"))
    assert report["probe_top1"] == report["control_top1"]
    assert report["knn_top1"] == report["control_knn_top1"]
    assert report["gain"] == [0, 0, 0]


def test_a_checkpoint_is_judged_once(load_tiny: LoadTiny) -> None:
    folder = train(load_tiny("train.steps=1"))
    report = probe_run(folder, ProbeRequest("validation"))
    folder.write_json("probe_validation.json", {**report, "mark": "read, not computed"})
    assert probe_run(folder, ProbeRequest("validation"))["mark"] == "read, not computed"


def test_a_run_that_is_not_finished_is_refused(load_tiny: LoadTiny) -> None:
    _, folder = prepare_run(load_tiny(), device_type="cpu")
    with pytest.raises(ConfigError, match="is not finished; train it to its end first"):
        probe_run(folder, ProbeRequest("validation"))


def test_without_scikit_learn_a_probe_is_refused_in_one_line(load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = train(load_tiny("train.steps=1"))
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigError, match="needs scikit-learn, which is not installed; pip install scikit-learn"):
        probe_run(folder)
