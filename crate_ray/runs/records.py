"""Metric records: what a run measured, in the order it was measured.

A record is one line {"step", "time", "attempt", "values": {key: number}}; non-finite numbers are the
strings "NaN", "Infinity", "-Infinity", so that every line is JSON. On a local disk the writer appends
to metrics.jsonl. An object store cannot append: there a thread writes immutable segments
metrics/<attempt>-<first_step>.jsonl, every ten seconds and whenever it is flushed.
What a machine does meanwhile is another stream of the same form, system/rank<N>.jsonl: one a node, its steps seconds.
What the store does not take is kept in memory and tried again, so a full disk or a bucket that answers 503 does not end a step;
only `flush`, which a checkpoint and the end of a run call, is an error then.
The trade-off: a reader parses text, and in return any tool can read a run while it is written.
"""

import json
import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from crate_ray import storage
from crate_ray.runs.folder import RunFolder
from crate_ray.runs.status import read_status

log = logging.getLogger(__name__)

SEGMENT_SECONDS = 10.0
METRICS = "metrics"
_SYSTEM = "system"
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True)
class Record:
    """Values measured at one step, `time` in unix seconds."""

    step: int
    time: float
    attempt: int
    values: Mapping[str, float] = field(default_factory=dict)

    def to_line(self) -> str:
        """The JSON line, with its newline."""
        values = {key: encode_number(value) for key, value in self.values.items()}
        body = {"step": self.step, "time": round(self.time, 3), "attempt": self.attempt, "values": values}
        return json.dumps(body, separators=(",", ":")) + "\n"

    @classmethod
    def from_line(cls, line: str) -> "Record":
        """Parses one line; ValueError for anything else."""
        body = json.loads(line)
        values = {key: decode_number(value) for key, value in body["values"].items()}
        return cls(int(body["step"]), float(body["time"]), int(body["attempt"]), values)


def encode_number(value: float) -> float | str:
    """A number that JSON can hold: non-finite ones by name."""
    value = float(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def decode_number(value: Any) -> float:
    """The inverse of `encode_number`."""
    return _NON_FINITE[value] if isinstance(value, str) else float(value)


class RecordWriter:
    """Appends the records of one attempt; used by rank 0 alone, and after training by the driver.

    `write` never fails and, on an object store, never waits. `flush` may be called from another thread than `write`.

    Args:
        folder: The run.
        attempt: Number of this start of the run, from 1; the highest wins where steps repeat.
        stream: Name of the file or folder of records; each has one writer.
        segment_s: Seconds between two segments on an object store.
    """

    def __init__(self, folder: RunFolder, attempt: int, *, stream: str = METRICS, segment_s: float = SEGMENT_SECONDS) -> None:
        self._folder = folder
        self._attempt = attempt
        self._stream = stream
        self._segment_s = segment_s
        self._pending: list[Record] = []
        self._count = 0
        self._is_refused = False
        self._storing = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        if folder.is_local:
            path = storage.local_path(folder.path(f"{stream}.jsonl"))
            storage.make_dir(str(path.parent))
            # Unbuffered: what a full disk did not take must not come out of a buffer behind what is written next.
            self._file = path.open("a+b", buffering=0)
            _end_last_line(self._file)
        else:
            self._thread = threading.Thread(target=self._flush_regularly, name="records", daemon=True)
            self._thread.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records values measured now."""
        self._pending.append(Record(step, time.time(), self._attempt, dict(values)))
        self._count += 1
        if self._folder.is_local:
            self._try_flush()

    def position(self) -> dict[str, int]:
        """How far this attempt has come: its number and the records it has written."""
        return {"attempt": self._attempt, "count": self._count}

    def flush(self) -> None:
        """Hands everything to the store; called before each manifest of a checkpoint and at the end.

        Raises:
            OSError: The store refuses; the records are kept, and tried again with the next ones.
        """
        with self._storing:
            records = list(self._pending)
            if records:
                self._store("".join(record.to_line() for record in records).encode(), records[0].step)
                del self._pending[: len(records)]

    def _store(self, lines: bytes, first_step: int) -> None:
        if not self._folder.is_local:
            segment = f"{self._attempt:04d}-{first_step:08d}-{time.time_ns()}.jsonl"
            storage.write_atomic(self._folder.path(self._stream, segment), lines)
            return
        end, written = self._file.seek(0, 2), 0
        try:
            while written < len(lines):
                written += self._file.write(lines[written:]) or 0
        except OSError:
            self._file.truncate(end)
            raise

    def _try_flush(self) -> None:
        try:
            self.flush()
            self._is_refused = False
        except OSError as error:
            if not self._is_refused:
                log.warning("records of %s wait in memory until it takes them: %s", self._folder.uri, error)
            self._is_refused = True

    def _flush_regularly(self) -> None:
        while not self._closing.wait(self._segment_s):
            self._try_flush()

    def close(self) -> None:
        """Flushes and closes; says how many records a store that still refuses has cost."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        self._try_flush()
        if self._pending:
            log.error("%d records of %s are lost: the store did not take them", len(self._pending), self._folder.uri)
        if self._folder.is_local:
            self._file.close()


def system_stream(rank: int) -> str:
    """The stream of what the node of a rank does."""
    return f"{_SYSTEM}/rank{rank}"


def system_streams(folder: RunFolder) -> list[str]:
    """The streams of all nodes that have worked on a run."""
    return [f"{_SYSTEM}/{name.removesuffix('.jsonl')}" for name in storage.list_dir(folder.path(_SYSTEM))]


@contextmanager
def later_records(folder: RunFolder) -> Iterator[RecordWriter]:
    """A writer for what is measured after a run has ended, under its last attempt."""
    status = read_status(folder)
    writer = RecordWriter(folder, status.attempt if status else 1)
    try:
        yield writer
    finally:
        writer.close()


def _end_last_line(file: Any) -> None:
    """A writer killed in the middle of a line must not swallow the next writer's first one."""
    if file.seek(0, 2) > 0:
        file.seek(-1, 2)
        if file.read(1) != b"\n":
            file.write(b"\n")
            file.flush()


class RecordTail:
    """Follows a run's records of one stream while they are written, from the beginning or from a saved place."""

    def __init__(self, folder: RunFolder, *, offset: int = 0, stream: str = METRICS) -> None:
        self._folder = folder
        self._stream = stream
        self.offset = offset
        self.has_more = False
        self._seen: set[str] = set()

    def poll(self, max_bytes: int | None = None) -> list[Record]:
        """The records that came since the last call, as they were written; torn lines are left out.

        Args:
            max_bytes: Stop after about so much text; `has_more` then says whether there may be more. None reads all.
        """
        return self._poll_file(max_bytes) if self._folder.is_local else self._poll_segments(max_bytes)

    def _poll_file(self, max_bytes: int | None) -> list[Record]:
        path = storage.local_path(self._folder.path(f"{self._stream}.jsonl"))
        try:
            with path.open("rb") as source:
                source.seek(self.offset)
                data = source.read() if max_bytes is None else source.read(max_bytes) + source.readline()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        self.has_more = max_bytes is not None and len(whole) >= max_bytes
        return _parse(whole.decode(errors="replace"))

    def _poll_segments(self, max_bytes: int | None) -> list[Record]:
        records: list[Record] = []
        names = [name for name in storage.list_dir(self._folder.path(self._stream)) if name.endswith(".jsonl")]
        size = 0
        for name in names:
            if name not in self._seen and (max_bytes is None or size < max_bytes):
                text = storage.read_text(self._folder.path(self._stream, name))
                records.extend(_parse(text))
                self._seen.add(name)
                size += len(text)
        self.has_more = len(self._seen) < len(names)
        return records


def _parse(text: str) -> list[Record]:
    records = []
    for line in text.splitlines():
        try:
            records.append(Record.from_line(line))
        except (ValueError, KeyError, TypeError):
            continue  # the torn last line of a writer that was killed
    return records


def merge_records(records: list[Record]) -> list[Record]:
    """One record for each step, sorted: for a (key, step) the highest attempt wins, and in it the latest."""
    newest: dict[tuple[int, str], Record] = {}
    for record in records:
        for key in record.values:
            held = newest.get((record.step, key))
            if held is None or (record.attempt, record.time) >= (held.attempt, held.time):
                newest[(record.step, key)] = record
    by_step: dict[int, list[tuple[str, Record]]] = {}
    for (step, key), record in newest.items():
        by_step.setdefault(step, []).append((key, record))
    merged = []
    for step in sorted(by_step):
        pairs = by_step[step]
        values = {key: record.values[key] for key, record in pairs}
        merged.append(Record(step, max(r.time for _, r in pairs), max(r.attempt for _, r in pairs), values))
    return merged


def read_records(folder: RunFolder) -> list[Record]:
    """The run's history: one record a step, repeated steps resolved to the highest attempt."""
    return merge_records(RecordTail(folder).poll())
