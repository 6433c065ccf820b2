"""What mirroring ten busy runs to one MLflow server costs their steps, and what an outage of that server loses.

    python -m benchmarks.bench_mirror steps --rounds 5 --seconds 20
    python -m benchmarks.bench_mirror outage --before 60 --outage 300 --after 60

Each run is a process of its own that computes, and writes ten values ten times a second with the writer of the training loop.
One process, the driver, mirrors all of them to a server on this machine. `steps` turns mirror and server on and off between
rounds, and compares what a step takes and how late it begins. `outage` kills the server while the runs go on, starts it again,
and then compares every point in MLflow, its time of measurement included, with every record.
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crate_ray.config import RunConfig, fingerprint
from crate_ray.runs import Lease, RecordTail, RecordWriter, RunFolder, open_run
from crate_ray.tracking import Mirror, Server, serve
from crate_ray.tracking.client import open_client
from crate_ray.tracking.server import free_port

EXPERIMENT = "crate-mae/bench"
KEYS = tuple(f"train/value{number}" for number in range(10))
STEPS_A_SECOND = 10
_ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 6.0  # for the processes to import, so that all begin together


@dataclass(frozen=True)
class Steps:
    """What the steps of one run took and how late they began, in milliseconds."""

    took_ms: list[float]
    late_ms: list[float]


@dataclass(frozen=True)
class Count:
    """What MLflow holds, compared with the records."""

    written: int
    equal: int
    missing: int
    foreign: int


def work(folder: str, start: float, seconds: float) -> Steps:
    """One run: at each tick of a tenth of a second it computes for some milliseconds and writes a record."""
    import numpy as np

    writer = RecordWriter(RunFolder(folder), 1)
    matrix = np.random.default_rng(0).standard_normal((192, 192))
    took_ms, late_ms = list[float](), list[float]()
    start = max(start, time.time())
    for step in range(1, round(seconds * STEPS_A_SECOND) + 1):
        due = start + step / STEPS_A_SECOND
        time.sleep(max(0.0, due - time.time()))
        begin = time.perf_counter()
        late_ms.append(1e3 * (time.time() - due))
        for _ in range(4):
            matrix = np.tanh(matrix @ matrix / 14)
        writer.write(step, {key: step + number / 16 for number, key in enumerate(KEYS)})
        took_ms.append(1e3 * (time.perf_counter() - begin))
    writer.close()
    return Steps([round(value, 3) for value in took_ms], [round(value, 3) for value in late_ms])


class Runs:
    """Run folders with a process each that writes them."""

    def __init__(self, scratch: Path, count: int) -> None:
        config = RunConfig.load("digits_crate_mae")
        prints = fingerprint(config, "data", "float32")
        self.folders = [open_run(config, prints, uri=str(scratch / f"run{number}")) for number in range(count)]
        self._steps = [scratch / f"steps{number}.json" for number in range(count)]
        self._leases = [Lease.take(folder) for folder in self.folders]

    def start(self, seconds: float) -> list["subprocess.Popen[bytes]"]:
        """Starts the processes; they begin together, and leave their steps in files: a pipe would fill up and hold them."""
        start = time.time() + START_SECONDS
        command = [sys.executable, "-m", "benchmarks.bench_mirror", "work", "--start", str(start), "--seconds", str(seconds)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        started = []
        for folder, path in zip(self.folders, self._steps, strict=True):
            with path.open("wb") as output:
                started.append(subprocess.Popen([*command, "--folder", folder.uri], stdout=output, env=environment, cwd=_ROOT))
        return started

    def wait(self, started: Sequence["subprocess.Popen[bytes]"], timeout_s: float) -> list[Steps]:
        """The steps of each process once all have ended, while their driver beats; the runs are FINISHED then."""
        deadline = time.monotonic() + timeout_s
        try:
            while any(process.poll() is None for process in started) and time.monotonic() < deadline:
                for lease in self._leases:
                    lease.beat()
                time.sleep(0.5)
        finally:
            for process in started:
                process.kill()
                process.wait()
        for lease in self._leases:
            lease.end("FINISHED")
        return [Steps(**json.loads(path.read_text())) for path in self._steps]


@contextmanager
def mirrored(url: str | None, folders: Sequence[RunFolder]) -> Iterator[Mirror | None]:
    """A mirror of these runs; none without a server."""
    if url is None:
        yield None
        return
    with Mirror(url, EXPERIMENT) as mirror:
        for folder in folders:
            mirror.follow(folder)
        yield mirror


def count(url: str, folders: Sequence[RunFolder]) -> Count:
    """Every point of these runs in MLflow against every record in their folders."""
    client = open_client(url, timeout_s=60)
    written = equal = missing = foreign = 0
    for folder in folders:
        expected = {
            (key, record.step, round(record.time * 1000), value)
            for record in RecordTail(folder).poll()
            for key, value in record.values.items()
        }
        held = [point for key in KEYS for point in history(client, folder, key)]
        written += len(expected)
        equal += len(expected & set(held))
        missing += len(expected - set(held))
        foreign += len(held) - len(expected & set(held))
    return Count(written, equal, missing, foreign)


def history(client: Any, folder: RunFolder, key: str) -> list[tuple[str, int, int, float]]:
    """The points of one curve."""
    marker = folder.read_json("tracking.json") or {}
    points = client.get_metric_history(marker["run_id"], key) if "run_id" in marker else []
    return [(point.key, point.step, point.timestamp, point.value) for point in points]


def steps_round(scratch: Path, url: str | None, runs: int, seconds: float) -> tuple[list[Steps], float, Count | None]:
    """One round: the steps of all runs, how long the mirror was behind at their end, and what MLflow then holds."""
    made = Runs(scratch, runs)
    with mirrored(url, made.folders) as mirror:
        steps = made.wait(made.start(seconds), seconds + 60)
        ended = time.monotonic()
        if mirror is None or url is None:
            return steps, 0.0, None
        mirror.close(timeout_s=60)
        return steps, time.monotonic() - ended, count(url, made.folders)


@dataclass(frozen=True)
class Outage:
    """What happened: the steps before, during and after, the time to catch up, and the count.

    Attributes:
        steps: Of each phase, all runs together.
        down_s: From the kill until the new server answered.
        behind_s: From the end of the last run until everything was sent.
        count: Of all points.
    """

    steps: dict[str, Steps]
    down_s: float
    behind_s: float
    count: Count


def outage_round(scratch: Path, runs: int, before_s: float, outage_s: float, after_s: float) -> Outage:
    """Kills the server while the runs go on, and starts it again after `outage_s`."""
    uri, port = f"sqlite:///{scratch}/mlflow.db", free_port()
    server = serve(uri, port=port)
    url, seconds = server.url, before_s + outage_s + after_s
    made = Runs(scratch, runs)
    try:
        with mirrored(url, made.folders) as mirror:
            assert mirror is not None
            started = made.start(seconds)
            try:
                time.sleep(START_SECONDS + before_s)
                killed = time.monotonic()
                kill(server)
                time.sleep(outage_s)
                server = serve(uri, port=port)
                down_s = time.monotonic() - killed
            finally:
                steps = made.wait(started, seconds + 120)
            ended = time.monotonic()
            mirror.close(timeout_s=600)
            behind_s = time.monotonic() - ended
        bounds = {"before": (0.0, before_s), "during": (before_s, before_s + down_s), "after": (before_s + down_s, seconds)}
        return Outage({name: part(steps, *bound) for name, bound in bounds.items()}, down_s, behind_s, count(url, made.folders))
    finally:
        server.close()


def kill(server: Server) -> None:
    """Ends the server as a lost machine would."""
    os.killpg(server.pid, signal.SIGKILL)
    server.close()


def part(steps: Sequence[Steps], start_s: float, end_s: float) -> Steps:
    """The steps of all runs that were due between two times."""
    first, last = (round(bound * STEPS_A_SECOND) for bound in (start_s, end_s))
    return Steps(
        [value for run in steps for value in run.took_ms[first:last]],
        [value for run in steps for value in run.late_ms[first:last]],
    )


def row(name: str, steps: Steps) -> str:
    """Quantiles of a set of steps as a line of a table."""
    cells = [f"{quantile(values, q):.2f}" for values in (steps.took_ms, steps.late_ms) for q in (0.5, 0.99)]
    return f"| {name} | {len(steps.took_ms)} | {' | '.join(cells)} | {max(steps.took_ms):.0f} |"


def quantile(values: Sequence[float], q: float) -> float:
    """The value below which a share q lies."""
    return sorted(values)[min(int(q * len(values)), len(values) - 1)]


COLUMNS = ("", "steps", "step, median ms", "step, p99 ms", "late, median ms", "late, p99 ms", "longest step, ms")
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def main_steps(options: argparse.Namespace) -> None:
    """Rounds with and without, in turn."""
    found: dict[str, list[list[Steps]]] = {"without": [], "mirrored": []}
    with tempfile.TemporaryDirectory() as scratch, serve(f"sqlite:///{scratch}/mlflow.db", port=free_port()) as server:
        print("round, case, load, behind at the end (s), points written, equal, missing, foreign")
        for number in range(options.rounds):
            cases = list(found) if number % 2 == 0 else list(reversed(found))
            for case in cases:
                place = Path(scratch) / f"{case}{number}"
                url = server.url if case == "mirrored" else None
                steps, behind_s, held = steps_round(place, url, options.runs, options.seconds)
                found[case].append(steps)
                counted = f"{held.written}, {held.equal}, {held.missing}, {held.foreign}" if held else "-"
                print(f"{number}, {case}, {os.getloadavg()[0]:.1f}, {behind_s:.1f}, {counted}", flush=True)
    print(HEADER)
    for case, rounds in found.items():
        print(row(case, part(list(itertools.chain(*rounds)), 0, options.seconds)))
    medians = {
        case: [statistics.median(part(steps, 0, options.seconds).took_ms) for steps in rounds] for case, rounds in found.items()
    }
    ratios = sorted(after / before for after, before in zip(medians["mirrored"], medians["without"], strict=True))
    print(f"ratio of the medians, round by round: {', '.join(f'{ratio:.3f}' for ratio in ratios)}")


def main_outage(options: argparse.Namespace) -> None:
    """One outage."""
    with tempfile.TemporaryDirectory() as scratch:
        found = outage_round(Path(scratch), options.runs, options.before, options.outage, options.after)
    print(HEADER)
    for name, steps in found.steps.items():
        if steps.took_ms:  # the server may need longer to start than the runs went on
            print(row(name, steps))
    print(f"the server was down for {found.down_s:.0f} s; everything was sent {found.behind_s:.1f} s after the last step")
    print(f"points written {found.count.written}, equal {found.count.equal}, missing {found.count.missing}, ", end="")
    print(f"foreign {found.count.foreign}")


def main() -> None:
    """Runs one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    steps, outage, worker = (verbs.add_parser(name) for name in ("steps", "outage", "work"))
    for verb in (steps, outage):
        verb.add_argument("--runs", type=int, default=10)
    steps.add_argument("--rounds", type=int, default=5)
    steps.add_argument("--seconds", type=float, default=20)
    for name, default in (("--before", 60), ("--outage", 300), ("--after", 60)):
        outage.add_argument(name, type=float, default=default)
    worker.add_argument("--folder", required=True)
    worker.add_argument("--start", type=float, required=True)
    worker.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    if options.verb == "work":
        print(json.dumps(vars(work(options.folder, options.start, options.seconds))))
        return
    values = STEPS_A_SECOND * len(KEYS)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {options.runs} runs of {values} values a second")
    (main_steps if options.verb == "steps" else main_outage)(options)
    print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
