"""Records of one stream on their way to MLflow: read in pieces, sent in order, dropped once they are there.

In: a run folder. Out: points of an MLflow run. What waits stays on the disk: memory holds about a megabyte of
text at a time, however far behind the mirror is, and a process that starts again reads past what its
predecessor had sent without keeping it. Delivery is at least once: a point is (key, step, time of
measurement, value), which the server stores once however often it comes.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from crate_ray.runs import Record, RecordTail, RunFolder
from crate_ray.runs.records import METRICS
from crate_ray.tracking.describe import to_ms
from crate_ray.tracking.limits import MAX_POINTS, log_points, point

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

CHUNK_BYTES = 2**20
_JUDGED = ("final/", "emergence/")  # measured of a finished run, and again when its judge changes


class Backlog:
    """What of one stream is read and not sent.

    Args:
        folder: The run; it need not have been created yet.
        stream: Name of the records.

    Attributes:
        points: Values in memory.
        sent: Records sent by this object.
        last_step: Of each key, the newest step read.
    """

    def __init__(self, folder: RunFolder, *, stream: str = METRICS) -> None:
        self._folder = folder
        self._stream = stream
        self._tail = RecordTail(folder, stream=stream)
        self._queue: deque[Record] = deque()
        self._was_read = False
        self._passed = 0  # records before the queue, sent now or earlier
        self._skip = 0  # records at the beginning that an earlier process has sent
        self._last: dict[str, Any] | None = None
        self.points = 0
        self.sent = 0
        self.last_step: dict[str, int] = {}

    def __len__(self) -> int:
        """Records in memory."""
        return len(self._queue)

    @property
    def has_more(self) -> bool:
        """Whether the folder may hold records that were not read yet."""
        return self._tail.has_more or not self._was_read

    @property
    def is_behind(self) -> bool:
        """Whether something waits, in memory or, as far as was seen, in the folder."""
        return bool(self._queue) or self.has_more

    def poll(self) -> list[Record]:
        """Reads about a megabyte on, and further through what an earlier process has sent; gives what was read."""
        found = list[Record]()
        self._was_read = True
        while True:
            records = [self._without_repeats(record) for record in self._tail.poll(CHUNK_BYTES)]
            self._queue.extend(records)
            self.points += sum(len(record.values) for record in records)
            found.extend(records)
            self._drop_sent()
            if self._passed >= self._skip or not self._tail.has_more:
                return found

    def push(self, client: "MlflowClient", run_id: str, *, expired: Callable[[], bool]) -> None:
        """Sends what was read, in batches, until done or `expired`.

        Raises:
            mlflow.exceptions.MlflowException: The store does not answer, or refuses.
        """
        for count, points in self._batches():
            if points:
                log_points(client, run_id, points)
            for _ in range(count):
                self._drop()
            self.sent += count
            if expired():
                return

    def marker(self) -> dict[str, Any]:
        """How many records are sent, with the last of them to recognise the stream by."""
        return {"records": self._passed, "last": self._last}

    def resume(self, marker: Mapping[str, Any]) -> None:
        """Passes over what a marker says is sent, where it agrees with the records; a wrong one costs time only."""
        count = marker.get("records", 0)
        if self._passed == 0 and count > 0 and _stamp_at(self._folder, self._stream, count) == marker.get("last"):
            self._skip = count
            self._drop_sent()

    def _drop_sent(self) -> None:
        while self._queue and self._passed < self._skip:
            self._drop()

    def _drop(self) -> None:
        record = self._queue.popleft()
        self.points -= len(record.values)
        self._passed += 1
        self._last = _stamp(record)

    def _batches(self) -> Iterator[tuple[int, list["Metric"]]]:
        """The queue as (number of records, their points); more points than a batch only where one record has them."""
        while self._queue:
            count, points = 0, list["Metric"]()
            for record in self._queue:
                if points and len(points) + len(record.values) > MAX_POINTS:
                    break
                time_ms = to_ms(record.time)
                points.extend(point(key, value, time_ms, record.step) for key, value in record.values.items())
                count += 1
            yield count, points

    def _without_repeats(self, record: Record) -> Record:
        """The record without the steps of a key that an earlier attempt had measured.

        What is measured of a finished run is exempt: judged again, the newer value is the one to show.
        """
        values = {k: v for k, v in record.values.items() if k.startswith(_JUDGED) or record.step > self.last_step.get(k, -1)}
        self.last_step.update(dict.fromkeys(values, record.step))
        return replace(record, values=values)


def _stamp(record: Record) -> dict[str, Any]:
    return {"step": record.step, "time": record.time, "attempt": record.attempt}


def _stamp_at(folder: RunFolder, stream: str, count: int) -> dict[str, Any] | None:
    """The stamp of the count-th record of a stream; None when it has fewer."""
    tail, left = RecordTail(folder, stream=stream), count
    while True:
        records = tail.poll(CHUNK_BYTES)
        if left <= len(records):
            return _stamp(records[left - 1])
        left -= len(records)
        if not tail.has_more:
            return None
