"""`crate-ray time` on runs that exist, and on what does not."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from crate_ray.config import RunConfig, fingerprint
from crate_ray.runs import RunFolder, open_run
from crate_ray.runs.rows import read_run_row
from crate_ray.training import exclusive, quiet
from tests.cli.conftest import Invoke


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else this machine does."""
    monkeypatch.setattr(quiet, "QUIET_CORES", math.inf)
    monkeypatch.setattr(exclusive, "WAIT_S", 0.05)


@pytest.fixture
def make_digits(tmp_path: Path, digits: Path) -> Callable[..., RunFolder]:
    """Run folders of a tiny model on the digits, not trained."""

    def make(name: str, *overrides: str) -> RunFolder:
        small = (
            "model.width=16",
            "model.num_heads=2",
            "model.encoder_depth=1",
            "model.decoder_width=16",
            "model.decoder_depth=1",
        )
        data = (f"data.train={digits / 'train'}", f"data.eval={digits / 'validation'}", f"storage.path={tmp_path / 'out'}")
        config = RunConfig.load("digits_crate_mae", [*small, *data, f"name={name}", "train.global_batch=8", *overrides])
        return open_run(config, fingerprint(config, "0" * 64, "float32"))

    return make


def test_the_timing_lies_in_each_run_and_runs_of_equal_steps_share_it(
    invoke: Invoke, make_digits: Callable[..., RunFolder]
) -> None:
    first, again, wide = make_digits("a"), make_digits("b", "train.seed=1"), make_digits("c", "model.encoder_depth=2")
    done = invoke("time", first.uri, again.uri, wide.uri, first.uri, "--steps", 1, "--json")
    assert done.code == 0
    assert "2 kinds" in done.err
    printed = json.loads(done.out)
    assert list(printed) == [first.uri, again.uri, wide.uri]
    for folder in (first, again, wide):
        written = folder.read_json("timing.json")
        assert written is not None
        assert written.pop("schema_version")
        assert written == printed[folder.uri]
        assert written["exclusive"] is True
        assert written["hardware"].startswith("1 x ")
        assert written["low"] <= written["images_per_s"] <= written["high"]
    assert printed[first.uri] == printed[again.uri] != printed[wide.uri]


def test_a_second_timing_replaces_the_first_and_says_when_others_were_at_work(
    invoke: Invoke, make_digits: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_digits("a")
    folder.write_json("timing.json", {"images_per_s": 1.0, "exclusive": True, "left": "over"})
    monkeypatch.setattr(quiet, "QUIET_CORES", -1.0)
    monkeypatch.setattr(quiet, "QUIET_SHARE", -1.0)  # no machine is that quiet
    refused = invoke("time", folder.uri, "--steps", 1)
    assert refused.code == 2
    assert "this machine is busy" in refused.err
    assert (folder.read_json("timing.json") or {})["left"] == "over"
    done = invoke("time", folder.uri, "--steps", 1, "--busy")
    assert done.code == 0
    assert "comparisons leave these timings out" in done.err
    assert "`crate-ray tracking sync` sends these to MLflow" in done.out
    written = folder.read_json("timing.json") or {}
    assert written["exclusive"] is False
    assert "left" not in written


def test_what_is_no_run_or_has_no_data_is_refused_and_nothing_is_written(
    invoke: Invoke, make_digits: Callable[..., RunFolder], tmp_path: Path
) -> None:
    whole, broken = make_digits("a"), make_digits("b", f"data.train={tmp_path / 'nowhere'}")
    for wrong, says in ((str(tmp_path), "is not a run folder"), (broken.uri, "nowhere")):
        refused = invoke("time", whole.uri, wrong, "--steps", 1)
        assert refused.code == 2
        assert says in refused.err
    assert whole.read_json("timing.json") is None


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_verb_times_both_families_as_a_process_and_a_comparison_reads_what_it_wrote(tmp_path: Path, digits: Path) -> None:
    folders = []
    for recipe in ("digits_crate_mae", "digits_mae"):
        data = (f"data.train={digits / 'train'}", f"data.eval={digits / 'validation'}", f"storage.path={tmp_path / 'out'}")
        config = RunConfig.load(recipe, [*data, f"name={recipe}", "train.global_batch=64"])
        folders.append(open_run(config, fingerprint(config, "0" * 64, "float32")))
    command = [sys.executable, "-m", "crate_ray", "time", *(folder.uri for folder in folders), "--steps", "2", "--busy"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    assert "median over 6 rounds" in done.stdout
    for folder in folders:
        written = folder.read_json("timing.json") or {}
        assert len(written["rounds"]) >= 6
        assert written["low"] > 0
        row = read_run_row(folder)
        assert row is not None
        if written["exclusive"]:
            assert (row.timing, row.images_per_s, row.hardware) == ("exclusive", written["images_per_s"], written["hardware"])
        else:
            assert row.timing != "exclusive"
