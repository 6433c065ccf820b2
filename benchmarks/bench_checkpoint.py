"""What does a checkpoint cost the training: written beside it by a thread, or by the step itself?

    OMP_NUM_THREADS=1 python -m benchmarks.bench_checkpoint --work DIR

DIR is where checkpoints go, as storage.path would. A window is a fixed number of optimizer steps of one model, with one
checkpoint at its start (async: by the saver of the loop; sync: the same, and the step waits for it), with none, or with one
after every few steps. A round is one window of each kind, so that a slower minute of the machine hits all alike. Printed as
Markdown, medians over rounds with the smallest and the largest:

  cost of a checkpoint   seconds of a window more than those of the window without one in the same round; in wall time, and in
                         CPU time of the process, which other work on the machine disturbs less
  pause                  of the step that saves: what `save` takes
  until whole            from `save` to the manifest
  overhead               cost / cadence, for cadences in minutes; that of a checkpoint every few steps is measured as such. On a
                         machine whose cores are all taken the thread's CPU time is taken from the training, and wall time is
                         CPU time divided by the share that this process gets
  lock                   longest time that another thread of the interpreter did not run while a file was laid out: ours, and
                         by safetensors.torch.save

Steps read no images, so that nothing else varies. The model is small on pixels and large in parameters: the more a step
computes for each parameter, the smaller the share of a checkpoint.
"""

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch

from benchmarks.bench_step import describe_machine
from benchmarks.bench_whitebox import draw_batch
from crate_ray.config import RunConfig
from crate_ray.models import create_model
from crate_ray.runs import NullSink, RunFolder
from crate_ray.storage import bytes_in_words
from crate_ray.training.checkpoint import MODEL_FILE, OPTIMIZER_FILE, latest_checkpoint
from crate_ray.training.optimizer import create_optimizer, optimizer_tensors
from crate_ray.training.parallel import Parallel
from crate_ray.training.precision import choose_device, resolve_precision
from crate_ray.training.saving import CheckpointSaver
from crate_ray.training.step import TrainStep
from crate_ray.training.tensor_files import HostCopy, file_pieces

CADENCES_MIN = (10.0, 5.0, 1.0)
KINDS = ("none", "async", "sync", "often, async", "often, sync")


@dataclass
class Window:
    """Seconds of one window, and of the checkpoints in it."""

    wall_s: float
    cpu_s: float
    pauses_s: list[float]
    whole_s: list[float]


class Training:
    """Steps of one model, and its saver."""

    def __init__(self, model: str, image_size: int, batch: int, work: Path) -> None:
        overrides = [f"model.preset={model}", f"model.image_size={image_size}", f"train.global_batch={batch}"]
        config = RunConfig.load("imagenet_crate_mae_base", [*overrides, "eval.every_steps=null", "scale.num_workers=1"])
        self.device = choose_device("auto", local_rank=0)
        precision = resolve_precision("auto", self.device.type)
        self.model = create_model(config.model).to(self.device)
        self.optimizer = create_optimizer(self.model, config.optimizer, lr=1e-4)
        self.train_step = TrainStep(self.model, self.optimizer, config, precision=precision)
        self.batch = draw_batch(config)
        self.folder = RunFolder(str(work / "run"))
        self.saver = CheckpointSaver(config, self.folder, ranks=Parallel(), device=self.device, sink=NullSink(), attempt=1)
        self.step = 0

    def window(self, steps: int, *, every: int | None, is_sync: bool) -> Window:
        """So many steps; saved before the first, and every so many, where wanted."""
        found = Window(0.0, 0.0, [], [])
        wall, cpu, saved = time.perf_counter(), time.process_time(), 0.0
        for number in range(steps):
            self.train_step(self.batch, lr=1e-4).read()
            self.step += 1
            if every is not None and number % every == 0:
                saved = time.perf_counter()
                self._save(is_sync=is_sync)
                found.pauses_s.append(time.perf_counter() - saved)
            self.saver.settle(self.saver.written)
            found.whole_s += [time.perf_counter() - saved for _ in self.saver.finished()]
        self.saver.wait()
        found.whole_s += [time.perf_counter() - saved for _ in self.saver.finished()]
        found.wall_s, found.cpu_s = time.perf_counter() - wall, time.process_time() - cpu
        return found

    def _save(self, *, is_sync: bool) -> None:
        files = {
            MODEL_FILE: (self.model.state_dict(), {}),
            OPTIMIZER_FILE: (optimizer_tensors(self.model, self.optimizer), {}),
        }
        self.saver.save(self.step, files, {"cursor": self.step, "train_seconds": 0.0})
        if is_sync:
            self.saver.wait()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for."""
    options = _parse(arguments)
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        training = Training(options.model, options.image_size, options.batch, Path(work))
        ways: dict[str, Callable[[], Window]] = {
            kind: lambda every=every, is_sync=is_sync: training.window(options.steps, every=every, is_sync=is_sync)  # type: ignore[misc]
            for kind, every, is_sync in zip(
                KINDS,
                (None, options.steps, options.steps, options.often, options.often),
                (False, False, True, False, True),
                strict=True,
            )
        }
        training.window(3, every=1, is_sync=True)
        rounds: dict[str, list[Window]] = defaultdict(list)
        for _ in range(options.rounds):
            for kind, run in ways.items():
                rounds[kind].append(run())
        newest = latest_checkpoint(training.folder)
        assert newest is not None
        size = sum(int(entry["bytes"]) for entry in newest.files.values())
        locks = {name: longest_wait_s(run) for name, run in layouts(training).items()}
        training.saver.close()
    _print(options, training, size, rounds, locks)


def layouts(training: Training) -> dict[str, Callable[[], object]]:
    """Laying out the file of the optimizer, ours and as safetensors does."""
    tensors = HostCopy().take({OPTIMIZER_FILE: optimizer_tensors(training.model, training.optimizer)})[OPTIMIZER_FILE]
    return {"ours": lambda: file_pieces(tensors, {}), "safetensors.torch.save": lambda: safetensors.torch.save(tensors)}


def longest_wait_s(run: Callable[[], object]) -> float:
    """For how long a call keeps another thread from running, beyond the millisecond that it sleeps."""
    gaps, done = [0.0], threading.Event()

    def tick() -> None:
        last = time.perf_counter()
        while not done.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    thread = threading.Thread(target=tick)
    thread.start()
    time.sleep(0.05)
    run()
    done.set()
    thread.join()
    return max(gaps)


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Median, smallest and largest."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _print(
    options: argparse.Namespace, training: Training, size: int, rounds: dict[str, list[Window]], locks: dict[str, float]
) -> None:
    millions = sum(p.numel() for p in training.model.parameters()) / 1e6
    print(f"# bench_checkpoint, {time.strftime('%Y-%m-%d')}\n")
    print("\n".join(f"- {key}: {value}" for key, value in describe_machine(training.device).items()))
    print(f"- command: `python -m benchmarks.bench_checkpoint {' '.join(sys.argv[1:])}`")
    print(f"- {options.model}, {millions:.1f}M parameters; a checkpoint is {bytes_in_words(size)}; {options.rounds} rounds")
    step_s = spread([window.wall_s / options.steps for window in rounds["none"]], ".3f")
    print(f"- windows of {options.steps} steps of {step_s} s\n")
    print("| | async | sync |\n|---|---|---|")
    plain, ways = rounds["none"], [rounds[kind] for kind in KINDS[1:3]]
    costs_s = [[a.wall_s - b.wall_s for a, b in zip(way, plain, strict=True)] for way in ways]
    cpu_costs_s = [[a.cpu_s - b.cpu_s for a, b in zip(way, plain, strict=True)] for way in ways]
    rows = {
        "pause of the step that saves, ms": [spread([1e3 * s for w in way for s in w.pauses_s], ".0f") for way in ways],
        "until whole, s": [spread([s for w in way for s in w.whole_s]) for way in ways],
        "cost of a checkpoint, s of wall time": [spread(costs) for costs in costs_s],
        "cost of a checkpoint, s of CPU time": [spread(costs) for costs in cpu_costs_s],
    }
    for minutes in CADENCES_MIN:
        for of, costs_of in (("wall", costs_s), ("CPU", cpu_costs_s)):
            shares = [[cost / (60 * minutes) for cost in costs] for costs in costs_of]
            rows[f"overhead at {minutes:g} minutes, {of} time"] = [spread(share, ".2%") for share in shares]
    often = [[a.wall_s / b.wall_s - 1 for a, b in zip(rounds[kind], plain, strict=True)] for kind in KINDS[3:]]
    rows[f"overhead at every {options.often} steps, measured"] = [spread(share, ".0%") for share in often]
    print("\n".join(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()))
    print("\nLongest time that another thread waited for the interpreter while the optimizer's file was laid out, ms: ", end="")
    print(", ".join(f"{name} {1e3 * seconds:.0f}" for name, seconds in locks.items()))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default=None, help="folder for checkpoints; default: that of temporary files")
    parser.add_argument("--model", default="crate_mae_base")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30, help="of a window; it must outlast the writing")
    parser.add_argument("--often", type=int, default=5, help="steps between checkpoints in the windows with many")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
