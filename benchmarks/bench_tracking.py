"""What a tracking server in trouble costs a step: the loop beside a mirror, in one process.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_tracking --rounds 5

Trains the same tiny run without a mirror, with one into sqlite, one whose server refuses, and one whose server accepts and
never answers; rounds interleaved, in an order that turns. A driver's mirror lives in another process than the loop, so this is
the harshest case: they share the interpreter. Prints the mean and the median step of each case, and the mean's difference to
the run without a mirror, with its 95% interval over the rounds.
"""

import argparse
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from crate_ray.analysis.statistics import paired_t_interval
from crate_ray.config import RunConfig
from crate_ray.data import build_source
from crate_ray.tracking import Mirror, initialise
from crate_ray.tracking.server import free_port
from crate_ray.training.loop import LocalContext, run_training
from crate_ray.training.prepare import prepare_run

CASES = ("none", "sqlite", "refused", "silent")
WARMUP_STEPS = 20


class StepTimes(LocalContext):
    """Keeps the time at each step's end."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def heartbeat(self, step: int) -> None:
        """See WorkerContext."""
        self.times.append(time.perf_counter())

    @property
    def steps_ms(self) -> list[float]:
        """Duration of each step after the first."""
        pairs = zip(self.times[WARMUP_STEPS:], self.times[WARMUP_STEPS + 1 :], strict=False)
        return [1e3 * (after - before) for before, after in pairs]


@contextmanager
def tracking_uri(case: str, scratch: Path) -> Iterator[str]:
    """A tracking store in that state."""
    if case == "silent":
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(64)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    elif case == "refused":
        yield f"http://127.0.0.1:{free_port()}"
    else:
        yield f"sqlite:///{scratch}/mlflow.db"


def run_case(case: str, data: Path, steps: int) -> list[float]:
    """Milliseconds of each step."""
    tiny = ["model.width=32", "model.num_heads=2", "model.encoder_depth=1", "model.decoder_depth=1", "model.patch_size=8"]
    tiny += ["train.global_batch=32", f"train.steps={steps}", "eval.every_steps=null", "eval.probe_every_steps=null"]
    tiny += ["eval.whitebox_every_steps=null", "eval.max_images=32", "eval.log_every_steps=1", "data.num_loaders=1"]
    paths = [f"data.{key}={data}/{split}" for key, split in (("train", "train"), ("eval", "validation"), ("test", "test"))]
    with tempfile.TemporaryDirectory() as scratch, tracking_uri(case, Path(scratch)) as uri:
        if case == "sqlite":
            initialise(uri, "crate-mae/bench")
        config = RunConfig.load("digits_crate_mae", [*tiny, *paths, f"storage.path={scratch}"])
        config, folder = prepare_run(config, device_type="cpu")
        context = StepTimes()
        with nullcontext() if case == "none" else Mirror(uri, "crate-mae/bench") as mirror:
            if mirror is not None:
                mirror.follow(folder)
            run_training(config, folder, context)
            if mirror is not None:
                mirror.close(timeout_s=1)
        return context.steps_ms


def main() -> None:
    """Runs all rounds."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {options.rounds} rounds of {options.steps} steps")
    found: dict[str, list[list[float]]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as data:
        build_source("digits", data)
        run_case("sqlite", Path(data), 50)  # imports, once
        for number in range(options.rounds):
            for case in (*CASES[number % len(CASES) :], *CASES[: number % len(CASES)]):
                found[case].append(run_case(case, Path(data), options.steps))
    print("| mirror | mean step, ms | median step, ms | mean less the mean without, ms |\n|---|---|---|---|")
    for case, rounds in found.items():
        means = [statistics.mean(steps) for steps in rounds]
        more = [mean - statistics.mean(alone) for mean, alone in zip(means, found["none"], strict=True)]
        interval = paired_t_interval(more) if case != "none" and len(more) > 1 else None
        shown = f"{interval.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]" if interval else ""
        median = statistics.median(step for steps in rounds for step in steps)
        print(f"| {case} | {statistics.mean(means):.2f} | {median:.2f} | {shown} |")
    print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
