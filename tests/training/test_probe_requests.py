"""What may be asked of a run: other protocols, earlier checkpoints, averages, other data; and what is written down."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from finished_runs import train

from crate_ray.config import ConfigError, RunConfig
from crate_ray.data import build_source, load_index
from crate_ray.data.workers import map_here
from crate_ray.runs import Lease, read_records
from crate_ray.training.checkpoint import list_checkpoints
from crate_ray.training.prepare import prepare_run
from crate_ray.training.probes import OtherData, ProbeRequest, encode, find_subject, probe_run
from crate_ray.training.probes.encode import FOLDER, FeatureReader
from crate_ray.training.probes.measures import Findings

LoadTiny = Callable[..., RunConfig]
T, R = TypeVar("T"), TypeVar("R")
_NOTHING = Findings({}, {})


def test_answers_add_up_to_the_accuracies_and_every_number_says_its_protocol(load_tiny: LoadTiny) -> None:
    folder = train(load_tiny("train.steps=2"))
    report = probe_run(folder, ProbeRequest(protocols=("house", "published", "label-free"), few_labels=(2,)))
    answers = folder.read_json("answers_validation.json")
    assert answers is not None
    index = load_index(folder.read_config().data.eval or "")
    assert answers["sources"] == sorted(set(index.sources))
    assert sum(answers["rows"]) == index.num_samples
    for name in ("probe_top1", "control_top1", "cls_top1", "knn_top1", "published_probe_top1", "published_both_top1"):
        assert sum(answers["correct"][name]) / sum(answers["rows"]) == pytest.approx(report[name][0])
    gain = np.subtract(answers["correct"]["probe_top1"], answers["correct"]["control_top1"]).sum() / sum(answers["rows"])
    assert gain == pytest.approx(report["gain"][0])

    final = folder.read_json("final.json")
    assert final is not None
    assert set(report["values"]) == set(report["measured_by"]) <= set(final["values"])
    assert report["measured_by"]["final/probe_top1"] == "house/1"
    assert report["measured_by"]["final/published_probe_top1"] == "published/1"
    assert report["measured_by"]["final/rankme"] == "label-free/1"
    assert report["values"]["final/fewshot2_top1"] == report["few_labels"]["2"]["top1"][0]
    assert report["label_free"]["rankme"] != report["control_label_free"]["rankme"]


def test_a_protocol_is_added_to_those_before_and_one_of_an_older_version_is_judged_again(load_tiny: LoadTiny) -> None:
    folder = train(load_tiny("train.steps=1"))
    first = probe_run(folder, ProbeRequest(protocols=("label-free",)))
    assert "probe_top1" not in first
    both = probe_run(folder)
    assert both["label_free"] == first["label_free"]
    old = {**both, "probe_top1": [0, 0, 0], "protocols": {"house": 0, "label-free": 1}}
    folder.write_json("probe_validation.json", old)
    assert probe_run(folder)["probe_top1"] == both["probe_top1"]


def test_measures_without_labels_do_not_keep_validation_from_the_final_values(load_tiny: LoadTiny) -> None:
    folder = train(load_tiny("train.steps=1"))
    probe_run(folder, ProbeRequest("test", protocols=("label-free",)))
    chosen = probe_run(folder)
    final = folder.read_json("final.json")
    assert final is not None
    assert final["values"]["final/probe_top1"] == pytest.approx(chosen["probe_top1"][0], rel=1e-3)


def test_measures_without_labels_take_a_mix_in_which_nothing_has_the_classes_of_validation(
    load_tiny: LoadTiny, tmp_path: Path
) -> None:
    build_source("shapes:40", str(tmp_path / "other"), image_size=16, num_classes=3)
    mix = json.dumps([{"train": f"{tmp_path}/other/train", "weight": 1.0}])
    folder = train(load_tiny("data.train=null", f"data.mix={mix}", "train.steps=1"))
    assert "label_free" in probe_run(folder, ProbeRequest(protocols=("label-free",)))
    with pytest.raises(ConfigError, match=r"no data set of data\.mix has the 10 classes .* --protocol label-free"):
        probe_run(folder)


def test_an_earlier_checkpoint_is_judged_beside_the_last_and_is_no_final_value(load_tiny: LoadTiny) -> None:
    folder = train(load_tiny("train.steps=4", "checkpoint.every_steps=2", "optimizer.lr=1e-2"))
    last = probe_run(folder)
    final = folder.read_json("final.json")
    earlier = probe_run(folder, ProbeRequest(step=2))
    assert (earlier["step"], earlier["control_top1"]) == (2, last["control_top1"])
    assert earlier["label_free"] != last["label_free"]
    assert folder.read_json("probe_validation_step_00000002.json") == {"schema_version": 1, **earlier}
    assert folder.read_json("final.json") == final
    (record,) = [record for record in read_records(folder) if "probe/probe_top1" in record.values]
    assert (record.step, record.values["probe/probe_top1"]) == (2, earlier["probe_top1"][0])
    assert probe_run(folder, ProbeRequest(step=4)) == folder.read_json("probe_validation.json")
    with pytest.raises(ConfigError, match=r"has no checkpoint of step 3; it has 2, 4"):
        probe_run(folder, ProbeRequest(step=3))


def test_a_run_that_trains_on_is_judged_without_a_word_in_its_records_and_its_checkpoint_is_kept_meanwhile(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train(load_tiny("train.steps=2"))
    lease = Lease.take(folder)  # another driver goes on with it
    try:
        with pytest.raises(ConfigError, match=r"is not finished; .* or judge a checkpoint of it: --step 2"):
            probe_run(folder)
        before, pinned = len(read_records(folder)), []
        monkeypatch.setattr(
            "crate_ray.training.probes.judge.MEASURES",
            {"label-free": lambda s, _: pinned.extend(Path(s.checkpoint.uri).glob("pinned-*")) or _NOTHING},
        )
        probe_run(folder, ProbeRequest(step=2, protocols=("label-free",)))
        assert [path.name for path in pinned] == ["pinned-probe"]
        assert not list(Path(list_checkpoints(folder)[0].uri).glob("pinned-*"))
        assert len(read_records(folder)) == before
        assert folder.read_json("probe_validation_step_00000002.json") is not None
    finally:
        lease.end("FINISHED")


def test_the_average_of_the_weights_replaces_the_verdict_on_the_weights(load_tiny: LoadTiny) -> None:
    folder = train(load_tiny("train.steps=4", "train.ema=0.5", "optimizer.lr=1e-2"))
    weights = probe_run(folder, ProbeRequest(protocols=("label-free",)))
    average = probe_run(folder, ProbeRequest(protocols=("label-free",), use_ema=True))
    assert (weights["ema"], average["ema"]) == (False, True)
    assert weights["label_free"] != average["label_free"]
    assert weights["control_label_free"] == average["control_label_free"]


def test_another_data_set_has_files_and_names_of_its_own(load_tiny: LoadTiny, tmp_path: Path) -> None:
    folder = train(load_tiny("train.steps=1"))
    build_source("shapes:40", str(tmp_path / "other"), image_size=16, seed=5)
    shutil.rmtree(tmp_path / "other" / "validation")
    other = OtherData.parse(f"{tmp_path}/other")
    assert other.name == "other"
    report = probe_run(folder, ProbeRequest("test", protocols=("published",), data=other))
    assert (report["data"], report["split"]) == ("other", "test")
    answers = json.loads(Path(folder.path("answers_test_other.json")).read_text())
    assert sum(answers["rows"]) == load_index(f"{tmp_path}/other/test").num_samples
    final = folder.read_json("final.json")
    assert final is not None
    assert final["values"]["final/other_published_probe_top1"] == pytest.approx(report["published_probe_top1"][0], rel=1e-3)
    assert "final/published_probe_top1" not in final["values"]
    with pytest.raises(
        ConfigError, match=r"has no folder validation, which this reads; `--protocol published --test` reads train and test"
    ):
        probe_run(folder, ProbeRequest("test", data=other))
    with pytest.raises(ConfigError, match="small letters"):
        OtherData.parse("CIFAR 10=/data/x")


def test_too_many_labels_a_class_and_a_damaged_name_are_refused_before_anything_is_encoded(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train(load_tiny("train.steps=1"))
    monkeypatch.setattr("crate_ray.training.probes.encode.encode_images", None)
    with pytest.raises(ConfigError, match="400 labels a class, but the smallest class has"):
        probe_run(folder, ProbeRequest(few_labels=(400,)))
    assert folder.read_json("probe_validation.json") is None


class Interrupted:
    """Computes tasks here, and stops before the last one the first time."""

    def __init__(self) -> None:
        self.computed: list[int] = []
        self.is_first = True

    def __call__(self, function: Callable[[T], R], tasks: Sequence[T], /) -> Iterator[tuple[int, R]]:
        for number, task in enumerate(tasks):
            if self.is_first and number == len(tasks) - 1:
                self.is_first = False
                raise KeyboardInterrupt
            self.computed.append(number)
            yield number, function(task)


def test_features_in_blocks_are_those_of_one_process_bit_by_bit(load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crate_ray.training.evaluate.EVAL_BATCH", 5)
    monkeypatch.setattr(encode, "BLOCK_IMAGES", 10)
    folder = train(load_tiny("train.steps=1"))
    subject = find_subject(folder, ProbeRequest())
    whole, blocks = FeatureReader(subject), FeatureReader(subject, map_here)
    source = subject.config.data.source
    for trained in (True, False):
        expected, found = (reader.read(source, trained=trained) for reader in (whole, blocks))
        for name in ("mean_ND", "cls_ND", "labels_N"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert len(list(Path(folder.path(FOLDER)).glob("*/block_*.safetensors"))) == 2 * 5
    blocks.delete()
    assert not list(Path(folder.path(FOLDER)).glob("*"))


def test_an_interrupted_encoding_goes_on_and_a_torn_block_is_made_again(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BLOCK_IMAGES", 10)
    folder = train(load_tiny("train.steps=1"))
    subject, tasks = find_subject(folder, ProbeRequest()), Interrupted()
    source = subject.config.data.source
    with pytest.raises(KeyboardInterrupt):
        FeatureReader(subject, tasks).read(source, trained=True)
    assert tasks.computed == [0, 1, 2, 3]
    first = min(Path(folder.path(FOLDER)).glob("*/block_*.safetensors"))
    first.write_bytes(first.read_bytes()[:100])
    found = FeatureReader(subject, tasks).read(source, trained=True)
    assert tasks.computed == [0, 1, 2, 3, 0, 1], "the torn block and the missing one"
    np.testing.assert_array_equal(found.labels_N, load_index(str(source)).labels)


def test_a_probe_leaves_no_features_behind(load_tiny: LoadTiny) -> None:
    folder = train(load_tiny("train.steps=1"))
    alone = probe_run(folder, ProbeRequest(protocols=("label-free",)))
    Path(folder.path("probe_validation.json")).unlink()
    shared = probe_run(folder, ProbeRequest(protocols=("label-free",)), task_map=map_here)
    assert shared == alone
    assert not list(Path(folder.path(FOLDER)).glob("*"))


def test_a_folder_of_an_unfinished_run_without_a_checkpoint_says_so(load_tiny: LoadTiny) -> None:
    _, folder = prepare_run(load_tiny(), device_type="cpu")
    with pytest.raises(ConfigError, match=r"has no checkpoint of step 5; it has none"):
        probe_run(folder, ProbeRequest(step=5))
