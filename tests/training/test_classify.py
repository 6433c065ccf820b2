"""A classifier in the loop of the autoencoders: resumed bit by bit, measured exactly, refused before it starts."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import train
from gloo_ranks import run_ranks
from test_workers import work
from torch.nn import functional
from torchvision.io import encode_png

from crate_ray.config import ConfigError, RunConfig
from crate_ray.data import build_index, read_all
from crate_ray.models import Classifier, create_model
from crate_ray.models.cost import count_parameters
from crate_ray.runs import RunFolder, read_records
from crate_ray.training.checkpoint import MODEL_FILE, OPTIMIZER_FILE, latest_checkpoint
from crate_ray.training.evaluate import Evaluator
from crate_ray.training.loop import LocalContext, LoopResult, run_training
from crate_ray.training.objective import Classification
from crate_ray.training.prepare import locate_run, prepare_run
from crate_ray.training.probes import ProbeRequest, probe_run

LoadTiny = Callable[..., RunConfig]
MIXED = ("data.mixup_alpha=0.8", "data.cutmix_alpha=1", "train.label_smoothing=0.1", "optimizer.layer_decay=0.65")
CLASSIFIERS = {
    "published": ("task=classify", "model.num_classes=10"),
    "crate": ("task=classify", "model.num_classes=10", "model.embedding=linear"),
    "vit": ("task=classify", "model.num_classes=10", "model.family=vit"),
}
KINDS = pytest.mark.parametrize("kind", CLASSIFIERS)


class StoppedContext(LocalContext):
    """A worker that is asked to stop after some step."""

    def __init__(self, stop_after: int) -> None:
        super().__init__()
        self._stop_after = stop_after

    def heartbeat(self, step: int) -> None:
        if step == self._stop_after:
            self.stop()


def series(folder: RunFolder) -> list[tuple[int, str, float]]:
    keys = ("train/loss", "train/grad_norm", "train/lr", "eval/loss", "eval/top1", "eval/knn_top1")
    return [(r.step, key, r.values[key]) for r in read_records(folder) for key in keys if key in r.values]


def state(folder: RunFolder) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    return {**checkpoint.read(MODEL_FILE), **checkpoint.read(OPTIMIZER_FILE)}


@KINDS
def test_a_stopped_classifier_that_goes_on_is_the_undisturbed_one_bit_by_bit(
    kind: str, load_tiny: LoadTiny, tmp_path: Path
) -> None:
    given = (*CLASSIFIERS[kind], *MIXED, "eval.every_steps=4", "eval.probe_every_steps=12")
    config = load_tiny(*given)
    whole, parts = RunFolder(str(tmp_path / "whole")), RunFolder(str(tmp_path / "parts"))
    assert run_training(config, whole, LocalContext()) == LoopResult("FINISHED", 12)
    assert run_training(config, parts, StoppedContext(6)) == LoopResult("KILLED", 7)
    other_cadence = load_tiny(*given, "data.num_loaders=0")
    assert run_training(other_cadence, parts, LocalContext(2)) == LoopResult("FINISHED", 12)
    assert series(whole) == series(parts)
    ours, theirs = state(whole), state(parts)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_micro_batches_of_whole_pairs_train_the_same_run(load_tiny: LoadTiny, tmp_path: Path) -> None:
    folders = []
    for micro_batch in ("null", "2", "6"):
        config = load_tiny(*CLASSIFIERS["crate"], *MIXED, f"train.micro_batch={micro_batch}", "train.steps=4")
        folders.append(RunFolder(str(tmp_path / micro_batch)))
        run_training(config, folders[-1], LocalContext())
    losses = [[value for _, key, value in series(folder) if key == "train/loss"] for folder in folders]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)  # float32: other orders of sums
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


@KINDS
def test_the_loss_of_a_classifier_falls(kind: str, load_tiny: LoadTiny, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    run_training(load_tiny(*CLASSIFIERS[kind], "train.steps=60", "optimizer.lr=3e-3"), folder, LocalContext())
    losses = [value for _, key, value in series(folder) if key == "train/loss"]
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])


def test_final_numbers_are_those_of_the_last_evaluation(load_tiny: LoadTiny, tmp_path: Path) -> None:
    config = load_tiny(*CLASSIFIERS["vit"], "train.steps=3", "eval.probe_every_steps=3")
    folder = RunFolder(str(tmp_path / "run"))
    run_training(config, folder, LocalContext())
    final = folder.read_json("final.json")
    assert final is not None
    last = {key: value for step, key, value in series(folder) if step == 3}
    for name in ("loss", "top1"):
        assert final["values"][f"final/eval_{name}"] == float(f"{last[f'eval/{name}']:.4g}")
    assert final["values"]["final/params_m"] == pytest.approx(count_parameters(config.model).trainable / 1e6, rel=5e-4)
    assert "final/eval_knn_top1" not in final["values"]


def test_evaluation_is_plain_cross_entropy_and_the_share_of_right_answers(load_tiny: LoadTiny) -> None:
    config = load_tiny(*CLASSIFIERS["crate"], *MIXED)
    torch.manual_seed(0)
    model = create_model(config.model)
    assert isinstance(model, Classifier)
    torch.nn.init.normal_(model.head.weight)
    (batch,) = read_all(config.data.eval or "", batch_size=100, image_size=16)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (config.data.mean, config.data.std))
    with torch.no_grad():
        logits = model((batch.images_BCHW / 255 - mean) / std).double()
    log_odds = logits - logits.exp().sum(dim=1, keepdim=True).log()
    right = log_odds[torch.arange(len(logits)), batch.labels_B]
    found = Evaluator(config, rank=0, world_size=1, precision="float32").metrics(model)
    assert found["eval/loss"] == pytest.approx(float(-right.mean()), rel=1e-5)
    assert found["eval/top1"] == float((logits.argmax(dim=1) == batch.labels_B).double().mean())
    assert model.training


def test_the_training_loss_is_smoothed_cross_entropy(load_tiny: LoadTiny) -> None:
    config = load_tiny(*CLASSIFIERS["crate"], "train.label_smoothing=0.2")
    torch.manual_seed(0)
    model = create_model(config.model)
    assert isinstance(model, Classifier)
    torch.nn.init.normal_(model.head.weight)
    images, labels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8), torch.tensor([0, 3, 9, 3])
    objective = Classification(model, config)
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0])
    log_odds = model(objective.normalise(images)).log_softmax(dim=1)
    targets = 0.8 * functional.one_hot(labels, 10) + 0.2 / 10
    expected = -(targets * log_odds).sum(dim=1)[[0, 1, 3]].sum()
    torch.testing.assert_close(objective(images, labels, weights), expected)


def test_labels_without_a_class_are_refused_before_anything_is_written(load_tiny: LoadTiny, tmp_path: Path) -> None:
    config = load_tiny("task=classify", "model.num_classes=3")
    expected = r"data\.train = .* has the labels 0 to 9, but model\.num_classes = 3 takes 0 to 2; set model\.num_classes to 10"
    for refuse in (lambda: prepare_run(config, device_type="cpu"), lambda: locate_run(config)):
        with pytest.raises(ConfigError, match=expected):
            refuse()
    assert not (tmp_path / "runs").exists()


def test_images_without_a_label_are_refused(load_tiny: LoadTiny, tmp_path: Path) -> None:
    picture = bytes(encode_png(torch.zeros(3, 16, 16, dtype=torch.uint8)).numpy())
    with tarfile.open(tmp_path / "shard-000000.tar", "w") as shard:
        for name, content in {"a.png": picture, "b.png": picture, "b.cls": b"3"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    build_index(str(tmp_path))
    with pytest.raises(ConfigError, match=r"data\.eval = .* 1 of 2 images have no label, and task = classify needs one"):
        locate_run(load_tiny(*CLASSIFIERS["crate"], f"data.eval={tmp_path}"))


def test_a_classifier_is_judged_by_its_top1_over_source_images(load_tiny: LoadTiny) -> None:
    folder = train(load_tiny(*CLASSIFIERS["published"], "train.steps=30", "optimizer.lr=1e-2"))
    chosen = probe_run(folder, ProbeRequest("validation"))
    final = folder.read_json("final.json")
    assert final is not None
    assert final["values"]["final/top1"] == pytest.approx(final["values"]["final/eval_top1"])
    assert chosen["top1"][1] <= chosen["top1"][0] <= chosen["top1"][2]
    assert (chosen["task"], chosen["split"]) == ("classify", "validation")

    tested = probe_run(folder, ProbeRequest("test"))
    probe_run(folder, ProbeRequest("validation"))
    final = folder.read_json("final.json")
    assert final is not None
    assert final["values"]["final/top1"] == pytest.approx(tested["top1"][0], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["crate", "vit"])
def test_two_workers_train_the_classifier_of_one(kind: str, load_tiny: LoadTiny, tmp_path: Path) -> None:
    config = load_tiny(*CLASSIFIERS[kind], *MIXED, "eval.every_steps=4", "train.steps=8")
    alone = RunFolder(str(tmp_path / "alone"))
    run_training(config, alone, LocalContext())
    run_ranks(2, work, config, str(tmp_path / "shared"), scratch=tmp_path / "shared")
    shared = RunFolder(str(tmp_path / "shared" / "whole"))
    found, expected = ({(s, k): v for s, k, v in series(folder)} for folder in (shared, alone))
    assert found.keys() == expected.keys()
    for at, value in expected.items():
        # float32: the same sums in another order, through eight updates of AdamW; answers are counted, not rounded.
        assert found[at] == (value if "top1" in at[1] else pytest.approx(value, rel=1e-4)), at
    results: list[Any] = [json.loads((tmp_path / "shared" / f"result-{rank}.json").read_text()) for rank in range(2)]
    assert results == [["KILLED", 5]] * 2
