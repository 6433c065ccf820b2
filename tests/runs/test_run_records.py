"""Records: what is written is read back, whatever ended the writer."""

import json
import math
from pathlib import Path

import pytest

from crate_ray.runs import Record, RecordTail, RecordWriter, RunFolder, merge_records, read_records


class SegmentedFolder(RunFolder):
    """A run folder that takes the object store's way (segments, no appending) on the local disk."""

    is_local = False


FOLDERS = pytest.mark.parametrize("kind", [RunFolder, SegmentedFolder], ids=["appending", "segments"])


def write(folder: RunFolder, attempt: int, values: dict[int, dict[str, float]]) -> None:
    writer = RecordWriter(folder, attempt)
    for step, numbers in values.items():
        writer.write(step, numbers)
    writer.close()


@FOLDERS
def test_numbers_of_every_kind_are_read_back_exactly(kind: type[RunFolder], tmp_path: Path) -> None:
    folder = kind(str(tmp_path / "run"))
    values = {"loss": 0.1 + 0.2, "tiny": 5e-324, "up": math.inf, "down": -math.inf, "nan": math.nan}
    write(folder, 1, {3: values})
    (record,) = read_records(folder)
    assert (record.step, record.attempt) == (3, 1)
    assert math.isnan(record.values["nan"])
    assert {**record.values, "nan": 0} == {**values, "nan": 0}


def test_every_line_is_plain_json_with_non_finite_numbers_by_name(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    write(folder, 2, {1: {"a": math.nan, "b": math.inf, "c": -math.inf}})

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    body = json.loads((tmp_path / "run" / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert body["values"] == {"a": "NaN", "b": "Infinity", "c": "-Infinity"}
    assert body.keys() == {"step", "time", "attempt", "values"}


@FOLDERS
def test_for_a_step_and_key_the_highest_attempt_wins(kind: type[RunFolder], tmp_path: Path) -> None:
    folder = kind(str(tmp_path / "run"))
    write(folder, 1, {10: {"loss": 1.0}, 20: {"loss": 2.0, "eval": 7.0}, 30: {"loss": 3.0}})
    write(folder, 2, {20: {"loss": 2.5}})
    assert [(r.step, r.attempt, dict(r.values)) for r in read_records(folder)] == [
        (10, 1, {"loss": 1.0}),
        (20, 2, {"loss": 2.5, "eval": 7.0}),
        (30, 1, {"loss": 3.0}),
    ]


def test_within_an_attempt_the_last_written_value_wins(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    writer = RecordWriter(folder, 1)
    writer.write(5, {"a": 1.0})
    writer.write(5, {"a": 2.0, "b": 3.0})
    writer.close()
    assert [dict(r.values) for r in read_records(folder)] == [{"a": 2.0, "b": 3.0}]


def test_a_torn_last_line_is_left_out_and_does_not_swallow_the_next_writers_first(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    write(folder, 1, {1: {"loss": 1.0}})
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step":2,"time":0,"atte')
    assert [r.step for r in read_records(folder)] == [1]
    write(folder, 2, {2: {"loss": 2.0}})
    assert [(r.step, r.attempt) for r in read_records(folder)] == [(1, 1), (2, 2)]


def test_a_line_cut_inside_a_character_is_left_out_too(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    write(folder, 1, {1: {"loss": 1.0}})
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step":2,"\xc3\n')
    assert [r.step for r in read_records(folder)] == [1]


@FOLDERS
def test_a_tail_gives_each_record_once_while_the_run_is_written(kind: type[RunFolder], tmp_path: Path) -> None:
    folder = kind(str(tmp_path / "run"))
    tail = RecordTail(folder)
    assert tail.poll() == []
    writer = RecordWriter(folder, 1)
    seen: list[int] = []
    for step in range(1, 6):
        writer.write(step, {"loss": float(step)})
        writer.flush()
        new = tail.poll()
        assert [record.step for record in new] == [step]
        seen += [record.step for record in new]
    writer.close()
    assert tail.poll() == []
    assert seen == [1, 2, 3, 4, 5]


def test_a_tail_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    line = Record(4, 1.5, 1, {"loss": 0.5}).to_line()
    tail = RecordTail(folder)
    with (tmp_path / "metrics.jsonl").open("w", buffering=1) as file:
        file.write(line[:20])
        file.flush()
        assert tail.poll() == []
        file.write(line[20:])
        file.flush()
        assert tail.poll() == [Record(4, 1.5, 1, {"loss": 0.5})]


@FOLDERS
@pytest.mark.parametrize("max_bytes", [1, 50, 1000])
def test_a_tail_that_reads_in_pieces_gives_the_same_records(kind: type[RunFolder], max_bytes: int, tmp_path: Path) -> None:
    folder = kind(str(tmp_path / "run"))
    for first in (1, 4):
        write(folder, 1, {step: {"loss": float(step)} for step in range(first, first + 3)})
    tail, pieces = RecordTail(folder), []
    while not pieces or tail.has_more:
        pieces.append([record.step for record in tail.poll(max_bytes)])
    assert [step for piece in pieces for step in piece] == [1, 2, 3, 4, 5, 6]
    assert len(pieces) > 1 or max_bytes == 1000
    assert tail.poll(max_bytes) == []


def test_a_tail_goes_on_from_a_saved_place(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    write(folder, 1, {1: {"a": 1.0}})
    first = RecordTail(folder)
    first.poll()
    write(folder, 1, {2: {"a": 2.0}})
    assert [record.step for record in RecordTail(folder, offset=first.offset).poll()] == [2]


def test_segments_are_never_rewritten_and_an_empty_flush_writes_none(tmp_path: Path) -> None:
    folder = SegmentedFolder(str(tmp_path / "run"))
    writer = RecordWriter(folder, 3)
    writer.write(7, {"a": 1.0})
    writer.write(8, {"a": 2.0})
    writer.flush()
    writer.flush()
    (first,) = (tmp_path / "run" / "metrics").iterdir()
    content = first.read_text()
    writer.write(9, {"a": 3.0})
    writer.close()
    names = sorted(path.name for path in (tmp_path / "run" / "metrics").iterdir())
    assert names[0].startswith("0003-00000007-")
    assert names[1].startswith("0003-00000009-")
    assert first.read_text() == content
    assert [record.step for record in read_records(folder)] == [7, 8, 9]


def test_a_run_without_records_has_an_empty_history(tmp_path: Path) -> None:
    assert read_records(RunFolder(str(tmp_path))) == []
    assert read_records(SegmentedFolder(str(tmp_path))) == []


def test_a_worker_group_that_went_back_in_the_same_attempt_wins_by_time() -> None:
    # Ray restarts a group from a checkpoint without a new attempt; segments of a store come in the order of their names.
    again = Record(200, time=20.0, attempt=1, values={"train/loss": 2.0})
    before = Record(200, time=10.0, attempt=1, values={"train/loss": 1.0})
    assert merge_records([again, before])[0].values == {"train/loss": 2.0}
