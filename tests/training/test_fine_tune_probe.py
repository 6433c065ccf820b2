"""Fine-tuning as a judgement: which runs it takes, and what is made of them."""

from collections.abc import Callable

import numpy as np
import pytest
from finished_runs import train

from crate_ray.config import ConfigError, RunConfig
from crate_ray.training.ema import EMA_FILE
from crate_ray.training.prepare import locate_run
from crate_ray.training.probes import ProbeRequest, find_subject, plan_fine_tunes, record_fine_tunes

LoadTiny = Callable[..., RunConfig]
SHORT = ("train.steps=2", "schedule.warmup_epochs=0", "eval.log_every_steps=1")


@pytest.mark.parametrize(("recipe", "pool"), [("digits_crate_mae", "cls"), ("digits_mae", "mean")])
def test_the_runs_are_the_classifier_of_the_protocol_from_the_checkpoint_and_from_random_weights(
    recipe: str, pool: str, load_tiny: LoadTiny
) -> None:
    folder = train(load_tiny("train.steps=1", recipe=recipe))
    plan = plan_fine_tunes(find_subject(folder, ProbeRequest()), seeds=2)
    assert [config.train.seed for config in plan.tuned] == [config.train.seed for config in plan.control] == [0, 1]
    for config in (*plan.tuned, *plan.control):
        assert (config.task, config.model.num_classes, config.model.pool) == ("classify", 10, pool)
        assert (config.optimizer.base_lr, config.optimizer.layer_decay, config.train.epochs) == (5e-4, 0.65, 100)
        assert config.train.global_batch == 4, "48 images: the greatest power of two with ten steps an epoch"
        assert config.storage.path == folder.uri.rpartition("/")[0]
    assert all(config.train.init_from is None for config in plan.control)
    places = {locate_run(config).uri for config in (*plan.tuned, *plan.control)}
    assert len(places) == 4
    assert places == {locate_run(c).uri for c in (*plan.tuned, *plan.control)}, "the same request gives the same runs"
    other = plan_fine_tunes(find_subject(folder, ProbeRequest()), seeds=2, overrides=["train.epochs=3"])
    assert not places & {locate_run(config).uri for config in other.tuned}


def test_the_report_has_the_mean_over_seeds_beside_the_control_and_what_was_overridden(load_tiny: LoadTiny) -> None:
    folder = train(load_tiny("train.steps=1", "train.ema=0.5"))
    subject = find_subject(folder, ProbeRequest(use_ema=True))
    plan = plan_fine_tunes(subject, seeds=2, overrides=SHORT)
    assert all((config.train.init_from or "").endswith(EMA_FILE) for config in plan.tuned)
    tuned, control = ([train(config) for config in configs] for configs in plan)
    report = record_fine_tunes(subject, tuned, control, overrides=SHORT)
    found = report["fine_tune"]
    assert found["top1"][0] == pytest.approx(np.mean(found["top1_by_seed"]))
    assert found["std_over_seeds"] == pytest.approx(np.std(found["top1_by_seed"], ddof=1))
    for folder_of, top1 in zip(tuned, found["top1_by_seed"], strict=True):
        final = folder_of.read_json("final.json")
        assert final is not None
        assert final["values"]["final/eval_top1"] == pytest.approx(top1, rel=1e-3)
    assert report["fine_tune_gain"][0] == pytest.approx(found["top1"][0] - report["control_fine_tune"]["top1"][0])
    assert report["fine_tune_overrides"] == list(SHORT)
    assert report["measured_by"]["final/finetune_top1"] == "fine-tune/1"
    answers = folder.read_json("answers_validation.json")
    assert answers is not None
    assert sum(answers["correct"]["finetune_top1"]) / sum(answers["rows"]) == pytest.approx(found["top1"][0])


def test_a_classifier_and_a_wrong_key_are_refused(load_tiny: LoadTiny) -> None:
    classifier = train(load_tiny("train.steps=1", "task=classify", "model.num_classes=10"))
    with pytest.raises(ConfigError, match="is a classifier already"):
        plan_fine_tunes(find_subject(classifier, ProbeRequest()), seeds=1)
    encoder = find_subject(train(load_tiny("train.steps=1")), ProbeRequest())
    with pytest.raises(ConfigError, match=r"train\.stepz"):
        plan_fine_tunes(encoder, seeds=1, overrides=["train.stepz=3"])
