import json
import shutil

import pytest

from crate_ray.data import build_source, load_index

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes") / "set"
    build_source("shapes:60", str(out), image_size=16)
    return out


def test_build_writes_shards_and_names_the_next_command(invoke, tmp_path):
    out = tmp_path / "set"
    first = invoke("data", "build", "shapes:40", out, "--image-size", 16)
    assert first.code == 0
    assert f"crate-ray train digits_crate_mae --set data.train={out}/train" in first.out
    assert load_index(str(out / "train")).num_samples == 32
    again = json.loads(invoke("data", "build", "shapes:40", out, "--image-size", 16, "--json").out)
    assert again["reused"]
    assert again["splits"]["train"]["num_samples"] == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shpes:10"], "unknown source 'shpes:10'; known are digits"),
        (["digits", "--image-size", 64], "belong to shapes:N"),
        (["folder:/no/such/folder"], "/no/such/folder"),
    ],
)
def test_build_refuses_what_it_cannot_read(invoke, tmp_path, arguments, message):
    source, *options = arguments
    result = invoke("data", "build", source, tmp_path / "set", *options)
    assert result.code == 2
    assert message in result.err


def test_index_counts_shards_that_another_program_wrote(invoke, shapes, tmp_path):
    for shard in (shapes / "train").glob("*.tar"):
        shutil.copy(shard, tmp_path)
    result = invoke("data", "index", tmp_path, "--json")
    found = json.loads(result.out)
    assert found["num_samples"] == found["num_labelled"] == 48
    assert found["digest"] == load_index(str(shapes / "train")).digest


def test_index_of_a_folder_without_shards_is_an_error(invoke, tmp_path):
    result = invoke("data", "index", tmp_path)
    assert result.code == 2
    assert "no *.tar shards" in result.err


def test_verify_finds_a_changed_byte(invoke, shapes, tmp_path):
    copy = tmp_path / "train"
    shutil.copytree(shapes / "train", copy)
    assert invoke("data", "verify", copy).code == 0
    shard = sorted(copy.glob("*.tar"))[0]
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    result = invoke("data", "verify", copy, "--json")
    found = json.loads(result.out)
    assert result.code == 1
    assert not found["ok"]
    (finding,) = found["findings"]
    assert finding["shard"] == shard.name
    assert finding["fault"] == "changed-bytes"


def test_verify_without_shards_is_an_error(invoke, tmp_path):
    result = invoke("data", "verify", tmp_path)
    assert result.code == 2
    assert "no *.tar shards" in result.err


def test_the_next_command_for_other_pictures_is_not_the_digits_run(invoke, tmp_path):
    built = invoke("data", "build", "shapes:20", tmp_path / "shapes", "--image-size", "32")
    assert "--set recipe=shapes --set data.augment=random_resized_crop" in " ".join(built.out.split())
