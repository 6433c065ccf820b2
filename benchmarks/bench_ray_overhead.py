"""What Ray Train adds to a step: the same recipe under torchrun with 2 processes and under Ray Train with 2 workers.

    python -m benchmarks.bench_ray_overhead --rounds 3 --steps 300

Rounds are interleaved and each launcher is a process tree of its own, one thread a worker. Wall time of a step comes from the
times of rank 0's records. CPU time is sampled over the whole tree several times a second and split: the two processes that
train, and all others (Ray's daemons, controller and driver; torchrun's agent). Steps before --warmup are left out. Start-up is
from the start of the command to the first record. On shared cores compare CPU time; wall time holds the neighbours too.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from crate_ray.config import RunConfig
from crate_ray.data import build_source
from crate_ray.runs import RunFolder, read_records

SAMPLE_S = 0.25
WORKERS = 2
HARD_END_S = 600


@dataclass(frozen=True)
class Measured:
    """One run; all of a step after the warm-up, in milliseconds, but for the start."""

    start_s: float
    wall_ms: float
    training_cpu_ms: float
    other_cpu_ms: float


def configuration(work: Path, name: str, steps: int) -> RunConfig:
    """The recipe of both launchers."""
    paths = [f"data.{key}={work}/data/{split}" for key, split in (("train", "train"), ("eval", "validation"), ("test", "test"))]
    keys = [f"train.steps={steps}", "eval.log_every_steps=1", "eval.every_steps=null", "eval.probe_every_steps=null"]
    keys += ["eval.whitebox_every_steps=null", "checkpoint.every_minutes=60", "data.num_loaders=1", "train.compile=false"]
    keys += [f"scale.num_workers={WORKERS}", "scale.use_gpu=false", f"storage.path={work}/out", f"name={name}"]
    return RunConfig.load("digits_crate_mae", [*paths, *keys])


def train_under_torchrun(work: Path, name: str, steps: int) -> None:
    """One of the processes of torchrun."""
    import torch
    import torch.distributed as dist

    from crate_ray.training.loop import LocalContext, run_training
    from crate_ray.training.prepare import prepare_run

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    context = LocalContext()
    context.rank, context.local_rank, context.world_size = dist.get_rank(), dist.get_rank(), dist.get_world_size()
    if context.rank == 0:
        prepare_run(configuration(work, name, steps), device_type="cpu")
    dist.barrier()
    config, folder = prepare_run(configuration(work, name, steps), device_type="cpu")
    run_training(config, folder, context)
    dist.destroy_process_group()


def train_under_ray(work: Path, name: str, steps: int) -> None:
    """The driver of Ray Train, with a cluster of its own."""
    import ray

    from crate_ray.launch.train import launch_training

    with tempfile.TemporaryDirectory(prefix="cr-") as scratch:
        ray.init(num_cpus=WORKERS, _temp_dir=scratch, log_to_driver=False, include_dashboard=True)
        outcome = launch_training(configuration(work, name, steps))
        ray.shutdown()
    assert outcome.state == "FINISHED", outcome.reason


LAUNCHERS: dict[str, tuple[list[str], Callable[[Path, str, int], None]]] = {
    "torchrun": (["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORKERS}"], train_under_torchrun),
    "ray": ([], train_under_ray),
}


def measure(launcher: str, work: Path, name: str, *, steps: int, warmup: int) -> Measured:
    """Runs one launcher to its end, watching its processes."""
    before = LAUNCHERS[launcher][0]
    command = [sys.executable, *before, "-m", "benchmarks.bench_ray_overhead"]
    command += ["--launcher", launcher, "--work", str(work), "--name", name, "--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    started, folder = time.time(), RunFolder(f"{work}/out/{name}")
    with (work / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            samples = _watch(process, folder)
        finally:
            _end(process)
    if process.returncode != 0:
        raise RuntimeError(f"{launcher} ended with {process.returncode}:\n{(work / f'{name}.log').read_text()[-2000:]}")
    times = {record.step: record.time for record in read_records(folder) if "train/loss" in record.values}
    first, last = (min(samples, key=lambda sample: abs(sample[0] - step)) for step in (warmup, steps - 1))
    between = last[0] - first[0]
    wall_ms = 1e3 * (times[steps] - times[warmup]) / (steps - warmup)
    training, other = (1e3 * (last[part] - first[part]) / between for part in (1, 2))
    return Measured(times[min(times)] - started, wall_ms, training, other)


def _watch(process: "subprocess.Popen[bytes]", folder: RunFolder) -> list[tuple[int, float, float]]:
    """(step, CPU seconds of the training processes, CPU seconds of all others), sampled until the end."""
    samples: list[tuple[int, float, float]] = []
    cpu_s: dict[psutil.Process, float] = {}
    trains: set[psutil.Process] = set()
    deadline = time.monotonic() + HARD_END_S
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise RuntimeError(f"no end within {HARD_END_S} s")
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(process.pid)
            for child in (root, *root.children(recursive=True)):
                _sample(child, cpu_s, trains)
        step = max((record.step for record in read_records(folder)), default=0)
        training = sum(seconds for child, seconds in cpu_s.items() if child in trains)
        samples.append((step, training, sum(cpu_s.values()) - training))
        time.sleep(SAMPLE_S)
    return [sample for sample in samples if sample[0] > 0]


def _sample(child: psutil.Process, cpu_s: dict[psutil.Process, float], trains: set[psutil.Process]) -> None:
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        times = child.cpu_times()
        cpu_s[child] = times.user + times.system
        words = " ".join(child.cmdline())
        if "RayTrainWorker" in words or ("bench_ray_overhead" in words and "LOCAL_RANK" in child.environ()):
            trains.add(child)


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        for child in (*children, process):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait(30)


def main() -> None:
    """Runs all rounds, or is one of their processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--launcher", choices=sorted(LAUNCHERS), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.launcher is not None:
        LAUNCHERS[options.launcher][1](options.work, options.name, options.steps)
        return
    load = os.getloadavg()[0]
    found: dict[str, list[Measured]] = {name: [] for name in LAUNCHERS}
    with tempfile.TemporaryDirectory(prefix="cr-bench-") as scratch:
        work = Path(scratch)
        build_source("digits", str(work / "data"))
        for number in range(options.rounds):
            for name in list(LAUNCHERS)[:: 1 if number % 2 == 0 else -1]:
                found[name].append(measure(name, work, f"{name}-{number}", steps=options.steps, warmup=options.warmup))
                print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
    _report(found, options.rounds, options.steps, load)


def _report(found: dict[str, list[Measured]], rounds: int, steps: int, load: float) -> None:
    print(f"{os.cpu_count()} cores, load {load:.1f} at the start; {rounds} rounds of {steps} steps, {WORKERS} workers\n")
    print("| launcher | wall, ms a step | CPU of the training processes, ms a step | CPU of all others | start-up, s |")
    print("|---|---|---|---|---|")
    for name, runs in found.items():
        columns = [[getattr(run, key) for run in runs] for key in ("wall_ms", "training_cpu_ms", "other_cpu_ms", "start_s")]
        cells = " | ".join(f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})" for values in columns)
        print(f"| {name} | {cells} |")
    for key, label in (("wall_ms", "wall"), ("training_cpu_ms", "CPU of the training processes")):
        ratios = [
            getattr(ours, key) / getattr(theirs, key) for ours, theirs in zip(found["ray"], found["torchrun"], strict=True)
        ]
        print(
            f"\n{label}, Ray Train / torchrun: median {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
