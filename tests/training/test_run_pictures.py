"""Pictures of a finished run: which files, what they are made of, and that making them again changes nothing."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished_runs import train
from saved_checkpoints import save_checkpoint
from torchvision.io import encode_png

from crate_ray import storage
from crate_ray.config import ConfigError, RunConfig
from crate_ray.data import build_index, load_index, read_masks
from crate_ray.runs import read_records
from crate_ray.training.checkpoint import MODEL_FILE, latest_checkpoint
from crate_ray.training.pictures import Pictures, draw_pictures
from crate_ray.training.prepare import prepare_run
from crate_ray.training.probes import without_labels

LoadTiny = Callable[..., RunConfig]

OF_A_CRATE = [
    "reconstructions.png",
    "attention_layer01.png",
    "keys_layer01.png",
    "attention_layer02.png",
    "keys_layer02.png",
    "emergence.png",
    "layers.png",
    "emergence.json",
]
SHALLOW = ("model.encoder_depth=2", "model.decoder_depth=2", "train.steps=2")


def write_unlabelled(folder: Path, *, masks: bool) -> None:
    """Plain images in a tar, without labels, with an empty object mask each where asked."""
    generator = torch.Generator().manual_seed(0)
    with tarfile.open(folder / "images-000000.tar", "w") as shard:
        for number in range(8):
            pixels = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=generator)
            members = {"png": pixels, **({"mask.png": torch.zeros(1, 16, 16, dtype=torch.uint8)} if masks else {})}
            for extension, image in members.items():
                data = encode_png(image).numpy().tobytes()
                header = tarfile.TarInfo(f"{number:04d}.{extension}")
                header.size = len(data)
                shard.addfile(header, io.BytesIO(data))
    build_index(str(folder))


def names(made: Pictures) -> list[str]:
    return [uri.rpartition("/")[2] for uri in made.files]


def test_a_crate_run_on_shapes_has_every_picture_and_its_emergence_in_the_records(load_tiny: LoadTiny) -> None:
    folder = train(load_tiny(*SHALLOW))
    before = folder.read_json("final.json")
    made = draw_pictures(folder)
    assert (names(made), made.left_out) == (OF_A_CRATE, [])
    assert all(storage.read_bytes(uri)[:4] == b"\x89PNG" for uri in made.files if uri.endswith(".png"))

    held = folder.read_json("pictures/emergence.json")
    assert held is not None
    assert [layer["layer"] for layer in held["layers"]] == [1, 2]
    record = next(record.values for record in read_records(folder) if record.step == 2)
    for layer in held["layers"]:
        for name in ("attention_jaccard", "attention_mean_jaccard", "foreground_jaccard"):
            key = f"emergence/layer{layer['layer']:02d}/{name}"
            value, low, high = layer[name]["trained"]
            assert low <= value <= high
            assert record[key] == value
            gain = layer[name]["trained"][0] - layer[name]["untrained"][0]
            assert record[f"{key}_gain"] == pytest.approx(gain, abs=2e-4)
    assert folder.read_json("final.json") == before

    url = str(folder.read_config().data.eval)
    masks = read_masks(url, range(load_index(url).num_samples), image_size=16).numpy()
    patches = [(slice(top, top + 4), slice(left, left + 4)) for top in range(0, 16, 4) for left in range(0, 16, 4)]
    shares = np.array([[mask[patch].mean() >= 0.5 for patch in patches] for mask in masks])
    shares = shares[shares.any(axis=1)]
    assert held["num_images"] == len(shares)
    assert held["object_share_of_patches"] == pytest.approx(shares.mean(), abs=1e-4)
    assert held["trivial"]["all_patches"]["jaccard"][0] == pytest.approx(shares.mean(), abs=1e-4)


@pytest.mark.slow
def test_an_encoder_that_did_not_learn_gains_nothing(load_tiny: LoadTiny) -> None:
    made = draw_pictures(train(load_tiny("train.steps=1", "optimizer.lr=1e-30", "optimizer.weight_decay=0")))
    assert made.emergence is not None
    for layer in made.emergence["layers"]:
        measures = [value for key, value in layer.items() if key != "layer"]
        assert all(measure["trained"] == measure["untrained"] for measure in measures)
        assert all(measure["gain"] == [0, 0, 0] for measure in measures)


@pytest.mark.slow
def test_the_vit_family_has_what_is_defined_for_it(load_tiny: LoadTiny) -> None:
    made = draw_pictures(train(load_tiny(*SHALLOW, recipe="digits_mae")), layers=[1])
    assert names(made) == [name for name in OF_A_CRATE if name != "layers.png" and "layer02" not in name]
    assert made.left_out == ["layer-wise curves: none of the white-box measures is defined for the family vit"]


@pytest.mark.slow
def test_an_ablation_has_the_curves_of_the_half_layers_that_it_has(load_tiny: LoadTiny) -> None:
    made = draw_pictures(train(load_tiny("model.attention=untied", "model.encoder_depth=2", "train.steps=2")))
    assert any(file.endswith("layers.png") for file in made.files)
    assert made.left_out == []
    made = draw_pictures(train(load_tiny("model.attention=untied", "model.feedforward=mlp", "train.steps=2")))
    assert made.left_out == ["layer-wise curves: none of the white-box measures is defined for the family crate untied mlp"]


def test_a_classifier_has_all_but_reconstructions(load_tiny: LoadTiny) -> None:
    made = draw_pictures(train(load_tiny("task=classify", "model.num_classes=10", *SHALLOW)))
    assert names(made) == [name for name in OF_A_CRATE if name != "reconstructions.png"]
    assert made.left_out == ["reconstructions: a classifier predicts classes and has no decoder"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("masks", "reason"),
    [(False, "has no mask"), (True, "no object fills half of any patch of 4 x 4 pixels")],
    ids=["none", "empty"],
)
def test_shards_without_objects_leave_emergence_out_with_a_reason(
    masks: bool, reason: str, load_tiny: LoadTiny, tmp_path: Path
) -> None:
    write_unlabelled(tmp_path, masks=masks)
    folder = train(load_tiny(*SHALLOW, f"data.train={tmp_path}", f"data.eval={tmp_path}", "data.test=null"))
    made = draw_pictures(folder)
    assert names(made) == [name for name in OF_A_CRATE if "emergence" not in name]
    assert len(made.left_out) == 1
    assert reason in made.left_out[0]
    assert not any(key.startswith("emergence/") for record in read_records(folder) for key in record.values)


def test_a_run_that_cannot_have_pictures_is_refused_and_gets_no_file(load_tiny: LoadTiny) -> None:
    _, folder = prepare_run(load_tiny(), device_type="cpu")
    with pytest.raises(ConfigError, match="is not finished; train it to its end first"):
        draw_pictures(folder)
    assert storage.list_dir(folder.path("pictures")) == []

    blind = train(load_tiny("train.steps=1", "data.eval=null", "data.test=null"))
    with pytest.raises(ConfigError, match=r"has no data\.eval; its pictures are of validation images"):
        draw_pictures(blind)

    diverged = train(load_tiny("train.steps=1"))
    checkpoint = latest_checkpoint(diverged)
    assert checkpoint is not None
    weights = checkpoint.read(MODEL_FILE)
    weights["norm.weight"][0] = torch.nan
    save_checkpoint(diverged, step=2, cursor=0, train_seconds=0.0, model=weights, optimizer={})
    with pytest.raises(ConfigError, match="has no encoder layer 2; valid: 1 to 1"):
        draw_pictures(diverged, layers=[1, 2])
    with pytest.raises(ConfigError, match="diverged: its weights hold NaN or infinity"):
        draw_pictures(diverged)
    assert storage.list_dir(diverged.path("pictures")) == []


def test_a_run_on_unlabelled_shards_has_pictures_and_no_probe_beside_a_labelled_one(
    load_tiny: LoadTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from crate_ray.cli.main import main

    write_unlabelled(tmp_path, masks=False)
    data = (f"data.train={tmp_path}", f"data.eval={tmp_path}", "data.test=null")
    plain = train(load_tiny("train.steps=1", "name=plain", *data))
    labelled = train(load_tiny("train.steps=1", "name=labelled"))

    def probe(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["crate-ray", "probe", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0)

    assert probe(plain.uri) == 2
    reason = f"data.eval = '{tmp_path}' has no labels"
    assert f"a probe needs labelled images, and {reason}" in capsys.readouterr().err

    assert probe(plain.uri, labelled.uri, "--pictures", "--json") == 0
    shown = capsys.readouterr()
    assert f"{plain.name}: no probe: {reason}\n" in shown.err
    told = json.loads(shown.out)
    assert told["not_probed"] == {plain.name: reason}
    assert told["runs"].keys() == {labelled.name}
    drawn = told["pictures"]
    assert [uri.rpartition("/")[2] for uri in drawn[plain.name]["files"]] == [
        name for name in OF_A_CRATE if "layer02" not in name and "emergence" not in name
    ]
    assert drawn[labelled.name]["left_out"] == []
    assert plain.read_json("probe_validation.json") is None


@pytest.mark.slow
def test_the_verb_lists_what_it_drew_and_drawing_again_changes_nothing(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from crate_ray.cli.main import main

    folder = train(load_tiny(*SHALLOW))
    paths = [folder.path("pictures", name) for name in OF_A_CRATE]

    for flags, message in ((("--layer", "3", "--pictures"), "no encoder layer 3"), (("--layer", "2"), "give --pictures too")):
        monkeypatch.setattr("sys.argv", ["crate-ray", "probe", folder.uri, *flags])
        with pytest.raises(SystemExit) as refused:
            main()
        assert refused.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())

    def probe(*flags: str) -> tuple[Any, list[bytes], int]:
        monkeypatch.setattr("sys.argv", ["crate-ray", "probe", folder.uri, "--pictures", *flags])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        num_records = storage.read_text(folder.path("metrics.jsonl")).count("\n")
        return capsys.readouterr(), [storage.read_bytes(path) for path in paths], num_records

    plain, pictures, num_records = probe()
    assert [line for line in plain.out.splitlines() if line.startswith(folder.uri)] == paths
    assert "drawing pictures" in plain.err

    as_json, again, num_after = probe("--json")
    assert json.loads(as_json.out)["pictures"] == {folder.name: {"files": paths, "left_out": []}}
    assert (again, num_after) == (pictures, num_records)
    assert storage.list_dir(folder.path("pictures")) == sorted(OF_A_CRATE)


def test_labels_are_looked_for_in_every_split_that_a_probe_reads(load_tiny: LoadTiny, shards: Path, tmp_path: Path) -> None:
    write_unlabelled(tmp_path, masks=False)
    none = f"'{tmp_path}' has no labels"
    assert without_labels(load_tiny(), split="test") is None
    assert without_labels(load_tiny(f"data.train={tmp_path}"), split="validation") == f"data.train = {none}"
    assert without_labels(load_tiny(f"data.test={tmp_path}"), split="test") == f"data.test = {none}"
    assert without_labels(load_tiny(f"data.test={tmp_path}"), split="validation") is None
    mix = [{"train": str(tmp_path), "weight": 1}]
    mixed = load_tiny("data.train=null", f"data.mix={json.dumps(mix)}")
    reason = without_labels(mixed, split="validation")
    assert reason is not None
    assert "no data set of data.mix has the 10 classes of data.eval" in reason
    labelled = [*mix, {"train": str(shards / "train"), "weight": 1}]
    assert without_labels(load_tiny("data.train=null", f"data.mix={json.dumps(labelled)}"), split="validation") is None
    with pytest.raises(ConfigError, match=r"data\.test is not set"):
        without_labels(load_tiny("data.test=null"), split="test")
