"""What the system itself costs: a sweep against its trials' own loops, one after the other in one process.

    python -m benchmarks.bench_sweep                   # one-worker and two-worker trials, rounds interleaved
    python -m benchmarks.bench_sweep --many 500        # growth of time and memory over many tiny trials

Every round runs in processes of its own: the plain loops (`plain`), and the same trials as a sweep with one trial at a time, of
one worker (`one`) and of two (`two`), so that what a trial takes longer in a sweep is overhead and not a neighbour. The
overhead of a trial is the time between the ends of two trials, less the median of the plain loops; the first trial
starts cluster and actors and stands apart. Trials of two workers are compared with the same plain loop, so their figure
holds what two processes that talk to each other lose on so small a model.
"""

import argparse
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from crate_ray.config import SweepConfig
from crate_ray.runs import RunFolder, TrialRow

TINY = {
    "model.image_size": 16,
    "model.patch_size": 4,
    "model.width": 32,
    "model.num_heads": 2,
    "model.encoder_depth": 1,
    "model.decoder_depth": 1,
    "data.test": None,
    "data.num_loaders": 1,
    "train.global_batch": 16,
    "train.precision": "float32",
    "schedule.warmup_steps": 1,
    "eval.max_images": 16,
    "eval.probe_every_steps": None,
    "eval.whitebox_every_steps": None,
}
CASES = ("plain", "one", "two")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    if options.case is not None:
        print(json.dumps(run_case(options.case, Path(options.folder), options.trials, options.steps)))
        return
    print(f"# bench_sweep, {time.strftime('%Y-%m-%d')}\n")
    print(f"- machine: {os.cpu_count()} cores, no GPU; load when started {os.getloadavg()[0]:.1f}")
    print(f"- command: `python -m benchmarks.bench_sweep {' '.join(sys.argv[1:] if arguments is None else arguments)}`\n")
    with tempfile.TemporaryDirectory(prefix="cr-bench-") as scratch:
        _build_data(Path(scratch) / "data")
        if options.many is not None:
            report = report_many(_in_a_process("many", Path(scratch), options.many, options.steps))
        else:
            rounds: dict[str, list[dict[str, Any]]] = {case: [] for case in options.cases}
            for _ in range(options.rounds):
                for case, results in rounds.items():
                    results.append(_in_a_process(case, Path(scratch), options.trials, options.steps))
            report = report_overhead(rounds)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def run_case(case: str, folder: Path, trials: int, steps: int) -> dict[str, Any]:
    """One measurement, in this process."""
    import torch

    torch.set_num_threads(1)
    sweep = _sweep(case, folder, trials, steps)
    return _plain(sweep, folder) if case == "plain" else _measured_sweep(sweep)


def report_overhead(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Prints the table; the plain loops of all rounds are one sample."""
    plain_s = [s for result in rounds["plain"] for s in result["trial_s"][1:]]
    plain = statistics.median(plain_s)
    print("| trials | s a trial after the first | overhead, s | share of the time | s to the first start | s to its end |")
    print("|" + "---|" * 6)
    print(f"| plain loops | {_spread(plain_s)} | | | | {_spread([result['trial_s'][0] for result in rounds['plain']])} |")
    names = {"one": "a sweep, one worker", "two": "a sweep, two workers"}
    found: dict[str, Any] = {"rounds": rounds, "plain_s": plain}
    for case, results in rounds.items():
        if case == "plain":
            continue
        gaps = [gap for result in results for gap in result["gaps_s"]]
        over = [gap - plain for gap in gaps]
        share = statistics.median(over) / statistics.median(gaps)
        starts = [result["first_start_s"] for result in results]
        print(
            f"| {names[case]} | {_spread(gaps)} | {_spread(over)} | {share:.0%} | {_spread(starts)} "
            f"| {_spread([result['first_end_s'] for result in results])} |"
        )
        found[case] = {"overhead_s": statistics.median(over), "share": share}
    print(f"\nLoad at the end {os.getloadavg()[0]:.1f}.")
    return found


def report_many(result: dict[str, Any]) -> dict[str, Any]:
    """Prints time and memory by hundreds of trials."""
    gaps, memory = result["gaps_s"], result["rss_mib"]
    size = max(1, min(100, len(memory) // 5))
    print("| trials | median s between two ends | largest | driver's memory at the end, MiB |\n|---|---|---|---|")
    for start in range(0, len(gaps), size):
        part = gaps[start : start + size]
        last = min(start + len(part), len(memory) - 1)
        print(f"| to {last + 1} | {statistics.median(part):.2f} | {max(part):.2f} | {memory[last]:.0f} |")
    print(f"\n{len(memory)} trials ended ({result['counts']}), {result['wall_s']:.0f} s in all; load {os.getloadavg()[0]:.1f}.")
    return result


def _plain(sweep: SweepConfig, folder: Path) -> dict[str, Any]:
    """The loops alone."""
    from crate_ray.space import make_plan, point_config
    from crate_ray.training.loop import LocalContext, run_training

    trial_s = []
    for number, points in enumerate(make_plan(sweep).points.values()):
        for index, point in enumerate(points):
            config = point_config(sweep, point)
            run = RunFolder(str(folder / f"plain-{time.monotonic_ns()}" / f"{number}-{index}"))
            started = time.perf_counter()
            run_training(config, run, LocalContext())
            trial_s.append(time.perf_counter() - started)
    return {"trial_s": trial_s}


class _Stopwatch:
    """Notes when trials begin and end, and what memory the driver has then."""

    def __init__(self) -> None:
        self.started_at: list[float] = []
        self.ended_at: list[float] = []
        self.rss_mib: list[float] = []
        self._process = psutil.Process()

    def known(self, rows: list[TrialRow], *, total: int | None, refused: int = 0) -> None: ...

    def stage(self, name: str, total: int) -> None: ...

    def notes(self, *parts: str) -> None: ...

    def trial_started(self, row: TrialRow, folder: RunFolder) -> None:
        self.started_at.append(time.perf_counter())

    def trial_ended(self, row: TrialRow) -> None:
        self.ended_at.append(time.perf_counter())
        self.rss_mib.append(self._process.memory_info().rss / 2**20)


def _measured_sweep(sweep: SweepConfig) -> dict[str, Any]:
    from crate_ray.launch.sweeps.driver import run_sweep

    logging.disable(logging.WARNING)
    watch, begin = _Stopwatch(), time.perf_counter()
    outcome = run_sweep(sweep, events=watch)
    wall_s = time.perf_counter() - begin
    assert outcome.state == "FINISHED", outcome.reason
    ends = watch.ended_at
    return {
        "first_start_s": watch.started_at[0] - begin,
        "first_end_s": ends[0] - begin,
        "gaps_s": [after - before for before, after in itertools.pairwise(ends)],
        "rss_mib": watch.rss_mib,
        "wall_s": wall_s,
        "counts": outcome.counts,
    }


def _sweep(case: str, folder: Path, trials: int, steps: int) -> SweepConfig:
    every = {**TINY, "train.steps": steps, "storage.path": str(folder / "runs")}
    every |= {"data.train": str(folder / "data" / "train"), "data.eval": str(folder / "data" / "validation")}
    rates = [1e-4 * (1 + index / trials) for index in range(trials)]
    return SweepConfig.parse(
        {
            "name": f"{case}-{time.monotonic_ns()}",
            "base": "digits_crate_mae",
            "set": every,
            "space": {"optimizer.lr": {"grid": rates}},
            "report_every_steps": steps,
            "resources_per_trial": {"num_workers": 2 if case == "two" else 1},
            "max_concurrent": None if case == "many" else 1,
        }
    )


def _build_data(folder: Path) -> None:
    from crate_ray.data import build_source

    build_source("shapes:60", str(folder), image_size=16)


def _in_a_process(case: str, folder: Path, trials: int, steps: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.bench_sweep", "--case", case, "--folder", str(folder)]
    command += ["--trials", str(trials), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_sweep", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--trials", type=int, default=6, help="of each sweep and of the plain loops")
    parser.add_argument("--steps", type=int, default=10, help="of a trial")
    parser.add_argument("--rounds", type=int, default=2, help="of every case in turn")
    parser.add_argument(
        "--cases", type=lambda text: text.split(","), default=list(CASES), help="of plain, one and two, by commas"
    )
    parser.add_argument("--many", type=int, metavar="N", help="instead: N trials in one sweep, as many at a time as fit")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every time measured")
    parser.add_argument("--case", choices=(*CASES, "many"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.case is None and "plain" not in options.cases:
        parser.error("--cases needs plain: overhead is what a sweep takes longer than the plain loops")
    return options


if __name__ == "__main__":
    main()
