import io
import json
import logging
import shutil
import sys

import pytest
from PIL import Image
from rich.console import Console

from crate_ray.cli import progress
from crate_ray.data import build_source, load_index
from crate_ray.data.shards import pack_shard

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")


SINK = io.BytesIO()
Image.new("RGB", (9, 9), "red").save(SINK, "PNG")
PICTURE = SINK.getvalue()


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


def test_build_into_a_place_that_cannot_be_written_is_one_message(invoke):
    result = invoke("data", "build", "shapes:50", "/proc/no/such/set")
    assert result.code == 2
    assert "/proc/no/such/set cannot be written" in " ".join(result.err.split())
    assert "choose another folder" in " ".join(result.err.split())
    assert "Traceback" not in result.err


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


@pytest.fixture
def damaged(shapes, tmp_path):
    """The training shards without an index; the second is cut, the first holds a pickle's name and a picture cut short."""
    first, second = sorted((shapes / "train").glob("*.tar"))
    rows = [
        {"__key__": "whole", "png": PICTURE, "cls": b"1"},
        {"__key__": "cut", "png": PICTURE[:50], "cls": b"1", "pyd": b"."},
    ]
    (tmp_path / "a.tar").write_bytes(pack_shard(rows))
    (tmp_path / "b.tar").write_bytes(second.read_bytes()[:5000])
    shutil.copy(first, tmp_path / "c.tar")
    return tmp_path


def test_verify_reports_all_faults_as_a_table_and_as_json(invoke, damaged):
    result = invoke("data", "verify", damaged, "--json")
    found = json.loads(result.out)
    assert result.code == 1
    assert not found["ok"]
    assert [(finding["shard"], finding["fault"], finding["key"]) for finding in found["findings"]] == [
        ("a.tar", "bad-image", "cut"),
        ("a.tar", "ignored-member", "cut"),
        ("b.tar", "truncated", ""),
    ]
    assert all(finding["what"] and finding["fix"] and finding["offset"] is not None for finding in found["findings"])
    table = invoke("data", "verify", damaged)
    assert table.code == 1
    assert "no index to compare with" in table.out
    for word in ("bad-image", "ignored-member", "truncated", "shard", "byte", "3 faults"):
        assert word in table.out


def test_index_refuses_damaged_shards_with_all_findings_unless_told_to_skip_them(invoke, damaged):
    result = invoke("data", "index", damaged, "--json")
    assert result.code == 2
    assert "shard b.tar at byte" in result.err
    assert [finding["shard"] for finding in json.loads(result.out)["findings"]] == ["b.tar"]
    result = invoke("data", "index", damaged, "--skip-damaged")
    assert result.code == 0, result.err
    assert "left out: 1 shard, and 0 samples of the others" in result.out
    assert "2 shards were read before and are not read again" in result.out


def test_index_into_a_folder_of_ones_own(invoke, shapes, tmp_path):
    result = invoke("data", "index", f"{shapes}/train/train-00000{{0..1}}.tar", "--out", tmp_path / "mine", "--json")
    assert json.loads(result.out)["num_samples"] == 48
    assert load_index(str(tmp_path / "mine")).num_samples == 48


@pytest.mark.parametrize("verb", ["index", "verify"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pipe:cat x.tar"], "would run a shell command"),
        (["ftp://host/a.tar"], "is not supported; valid: s3"),
        (["/no/such/folder"], "no *.tar shards in /no/such/folder: it does not exist"),
        (["/no/such/{0..3.tar"], "the braces in"),
        (["/tmp/*/a.tar"], "stand in file names only"),
        (["/tmp", "--workers", 2, "--parallel"], "exclude each other"),
        (["/tmp", "--workers", 0], "--workers"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(invoke, verb, arguments, message):
    result = invoke("data", verb, *arguments)
    assert result.code == 2
    assert message in " ".join(result.err.split())
    assert "Traceback" not in result.err


def test_verify_without_shards_is_an_error(invoke, tmp_path):
    result = invoke("data", "verify", tmp_path)
    assert result.code == 2
    assert "no *.tar shards" in result.err


def test_the_next_command_for_other_pictures_is_not_the_digits_run(invoke, tmp_path):
    built = invoke("data", "build", "shapes:20", tmp_path / "shapes", "--image-size", "32")
    assert "--set recipe=shapes --set data.augment=random_resized_crop" in " ".join(built.out.split())


def test_equal_faults_are_grouped_with_their_fix_once_and_json_has_all(invoke, tmp_path):
    rows = [{"__key__": f"k{i:02d}", "png": PICTURE[:50], "cls": b"1"} for i in range(24)]
    (tmp_path / "a.tar").write_bytes(pack_shard(rows))
    lines = invoke("data", "verify", tmp_path).out.splitlines()
    assert lines[0].startswith("bad-image, 24 faults; replace the image")
    assert [line.split("'")[1] for line in lines[1:4]] == ["k00", "k01", "k02"]
    assert lines[4] == "  and 21 more; --json gives all of them"
    assert lines[5].startswith("24 faults in 24 samples of 1 shard, every image decoded")
    assert all(line == line.rstrip() for line in lines)
    assert len(json.loads(invoke("data", "verify", tmp_path, "--json").out)["findings"]) == 24


def test_shards_without_labels_name_the_fields_that_may_hold_them(invoke, tmp_path):
    rows = [{"__key__": f"k{i}", "png": PICTURE, "json": b'{"class_id": 1, "url": "u"}'} for i in range(2)]
    (tmp_path / "a.tar").write_bytes(pack_shard(rows))
    out = invoke("data", "index", tmp_path).out
    assert "2 images in 1 shard, no labels" in out
    assert "--label-field FIELD (fields seen: class_id, url)" in out
    assert "2 labelled, 2 classes" in invoke("data", "index", tmp_path, "--label-field", "class_id").out


@pytest.fixture
def terminal(monkeypatch):
    """What a terminal of 80 columns is sent on standard error."""
    sink = io.StringIO()
    monkeypatch.setattr(progress, "errors", Console(file=sink, force_terminal=True, width=80, _environ={"TERM": "xterm"}))
    return sink


def test_a_bar_begins_with_the_first_count(terminal):
    with pytest.raises(ValueError, match="refused"), progress.count_progress("images"):
        raise ValueError("refused")
    assert terminal.getvalue() == ""
    with progress.count_progress("images") as count:
        count(1, 2)
    assert "1/2" in terminal.getvalue()


def test_a_warning_below_a_bar_has_lines_of_its_own(terminal, monkeypatch):
    handler = logging.StreamHandler(sys.__stderr__)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    with progress.count_progress("shards") as count:
        count(1, 2)
        logging.getLogger("crate_ray.data").warning("a fault was found")
    assert handler.stream is sys.__stderr__
    assert "a fault was found\n" in terminal.getvalue()
