"""`crate-ray data plan` on real shards: what it prints is what readers hand out, and bad input is one message."""

import json
import shutil
from itertools import islice

import pytest
from rich.console import Console

from crate_ray.cli import output, plan
from crate_ray.config import DataConfig
from crate_ray.data import build_index, build_source, load_index, open_reader
from crate_ray.data.shards import pack_shard

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63606060000000040001f61738550000000049"
    "454e44ae426082"
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    out = tmp_path_factory.mktemp("planned") / "set"
    build_source("shapes:60", str(out), image_size=16)
    return str(out / "train")


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Four shards of 5, 1, 9 and 2 images."""
    folder = tmp_path_factory.mktemp("uneven")
    for shard, count in enumerate((5, 1, 9, 2)):
        samples = [{"__key__": f"s{shard}-{i}", "png": PNG, "cls": b"0"} for i in range(count)]
        (folder / f"part-{shard}.tar").write_bytes(pack_shard(samples))
    build_index(str(folder))
    return str(folder)


def read_plan(invoke, url, *options):
    result = invoke("data", "plan", url, "--json", *options)
    assert result.code == 0, result.err
    return json.loads(result.out)


def keys_of(plan_json):
    """Keys by step and rank, the part of the JSON that other programs may rely on."""
    return [[rank["keys"] for rank in step["ranks"]] for step in plan_json["steps"]]


def test_a_plan_of_one_epoch_reads_every_key_once(invoke, shapes):
    found = read_plan(invoke, shapes, "--world-size", 3, "--global-batch", 8, "--steps", 6)
    keys = [key for step in keys_of(found) for rank in step for key in rank]
    assert sorted(keys) == sorted(load_index(shapes).samples["key"].to_pylist())
    coverage = found["coverage"]
    assert coverage["duplicates_within_an_epoch"] == 0
    assert coverage["reads"] == coverage["distinct_samples"] == coverage["num_samples"] == 48


def test_the_global_batches_do_not_depend_on_the_number_of_ranks(invoke, uneven):
    def batches(world_size):
        found = read_plan(invoke, uneven, "--world-size", world_size, "--global-batch", 8, "--steps", 6)
        return [[key for rank in step for key in rank] for step in keys_of(found)]

    assert batches(1) == batches(3) == batches(5) == batches(8)


@pytest.mark.parametrize("world_size", [1, 3, 4, 7])
def test_a_plan_is_what_the_readers_hand_out(invoke, uneven, world_size):
    """Uneven shards, ranks that do not divide the batch, over the ends of two epochs, with any number of loaders."""
    settings = {"seed": 5, "lanes": 3, "window": 4}
    options = [part for name, value in settings.items() for part in (f"--{name}", value)]
    found = read_plan(
        invoke, uneven, "--world-size", world_size, "--global-batch", 7, "--start-step", 2, "--steps", 5, *options
    )
    keys = load_index(uneven).samples["key"].to_pylist()
    for rank in range(world_size):
        with open_reader(
            uneven, global_batch=7, rank=rank, world_size=world_size, cursor=14, image_size=8, num_loaders=rank % 3, **settings
        ) as reader:
            batches = list(islice(reader, 5))
        for batch, step in zip(batches, found["steps"], strict=True):
            real = batch.weights_B > 0
            planned = step["ranks"][rank]
            assert [keys[i] for i in batch.sample_ids_B[real].tolist()] == planned["keys"]
            assert batch.epochs_B[real].tolist() == planned["epochs"]
            assert int((~real).sum()) == planned["padding"]
    assert [start["epoch"] for start in found["epoch_starts"]] == [1, 2]


def test_its_defaults_are_those_of_a_run(invoke, shapes):
    found = read_plan(invoke, shapes, "--global-batch", 8)
    with open_reader(shapes, global_batch=8, image_size=16) as reader:
        batch = next(reader)
    assert found["steps"][0]["ranks"][0]["sample_ids"] == batch.sample_ids_B.tolist()
    assert (found["lanes"], found["window"]) == tuple(DataConfig.model_fields[name].default for name in ("lanes", "window"))


def test_a_first_step_is_the_cursor_after_the_steps_before_it(invoke, uneven):
    options = ("--world-size", 2, "--global-batch", 6, "--steps", 2)
    assert keys_of(read_plan(invoke, uneven, "--start-step", 4, *options)) == keys_of(
        read_plan(invoke, uneven, "--cursor", 24, *options)
    )


def test_the_ranks_add_up_to_the_images_and_bytes_of_the_set(invoke, uneven):
    found = read_plan(invoke, uneven, "--world-size", 2, "--global-batch", 17)
    assert [rank["images"] for rank in found["ranks"]] == [8, 9]
    assert sum(rank["bytes"] for rank in found["ranks"]) == 17 * len(PNG)
    assert [rank["padding"] for rank in found["ranks"]] == [1, 0]
    assert {name for rank in found["ranks"] for name in rank["shards"]} == {f"part-{i}.tar" for i in range(4)}


def test_people_read_ranks_first_keys_turns_of_the_epoch_and_coverage(invoke, uneven):
    result = invoke("data", "plan", uneven, "--world-size", 2, "--global-batch", 8, "--steps", 20)
    assert "17 images in 4 shards; seed 0, 64 lanes, windows of 2048" in result.out
    assert "epoch 1 begins in step 2, after 1 image of its batch" in result.out
    assert "160 reads of 17 different images, 100.0% of all; 0 read twice in one epoch; 4 of 4 shards touched" in result.out
    assert "16 more rows" in result.out
    assert "and 6 more epochs begin" in result.out


def test_on_a_narrow_terminal_keys_are_cut_to_whole_ones_and_no_line_is_folded(invoke, shapes, monkeypatch):
    terminal = Console(force_terminal=True, color_system=None, width=100, highlight=False)
    monkeypatch.setattr(output, "console", terminal)
    monkeypatch.setattr(plan, "console", terminal)
    with terminal.capture() as capture:
        assert invoke("data", "plan", shapes, "--world-size", 2, "--global-batch", 48).code == 0
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 100
    keys = set(load_index(shapes).samples["key"].to_pylist())
    rows = [line.split() for line in lines if " +" in line]
    assert len(rows) == 2
    for row in rows:
        shown, rest = [word for word in row if word in keys], int(row[-1])
        assert len(shown) >= 2
        assert len(shown) + rest == 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--world-size", 9, "--global-batch", 8], "9 workers cannot share a global batch of 8"),
        (["--steps", 0], "Invalid value for '--steps'"),
        (["--steps", 10**9], "show at most 390,625 steps"),
        (["--world-size", 0], "Invalid value for '--world-size'"),
        (["--lanes", 0], "Invalid value for '--lanes'"),
        (["--lanes", 10**23], "Invalid value for '--lanes'"),
        (["--window", 10**23], "Invalid value for '--window'"),
        (["--seed", -1], "Invalid value for '--seed'"),
        (["--seed", 2**63], "Invalid value for '--seed'"),
        (["--cursor", 2**64], "beyond any run"),
        (["--cursor", 8, "--start-step", 1], "give one of them"),
    ],
)
def test_bad_values_are_one_message(invoke, shapes, options, message):
    result = invoke("data", "plan", shapes, *options)
    assert result.code == 2
    assert message in " ".join(result.err.split())
    assert "Traceback" not in result.err
    assert result.out == ""


def test_a_folder_without_an_index_is_one_message_that_names_the_fix(invoke, shapes, tmp_path):
    missing = invoke("data", "plan", tmp_path / "nowhere")
    assert missing.code == 2
    assert "does not exist" in missing.err
    shutil.copy(f"{shapes}/train-000000.tar", tmp_path)
    result = invoke("data", "plan", tmp_path)
    assert result.code == 2
    assert f"run `crate-ray data index {tmp_path}`" in result.err
