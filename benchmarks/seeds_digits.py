"""Do CRATE-MAE and MAE beat their untrained encoders on the digits? Frozen recipes, fresh seeds, test read once.

    python -m benchmarks.seeds_digits --data data/digits --out out/seeds

One run is one plain process with one thread, two at a time; a finished one is not repeated. Prints the mean of
each recipe with t intervals over seeds, and the paired differences between recipes, equal in size or not; OUT/comparison
holds the report.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations
from pathlib import Path

RECIPES = ("digits_crate_mae", "digits_mae", "digits_mae_small")
SEEDS = (11, 12, 13, 14, 15)  # the grid used seed 0


def run_seed(recipe: str, overrides: list[str]) -> str:
    """Trains and judges one run; returns its folder."""
    import torch

    from crate_ray.config import RunConfig
    from crate_ray.runs import Lease, is_finished
    from crate_ray.training.loop import LocalContext, run_training
    from crate_ray.training.prepare import prepare_run
    from crate_ray.training.probes import ProbeRequest, probe_run

    torch.set_num_threads(1)
    config, folder = prepare_run(RunConfig.load(recipe, overrides), device_type="cpu")
    if not is_finished(folder):
        lease = Lease.take(folder)
        run_training(config, folder, LocalContext(lease.attempt))
        lease.end("FINISHED")
    if folder.read_json("probe_test.json") is None:
        probe_run(folder, ProbeRequest("test"))
    print("done", folder.name, flush=True)
    return folder.uri


def main() -> None:
    """Runs all seeds and prints the table."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is imported here: the pool's processes inherit its threads
    from crate_ray.analysis.comparison.compare import compare
    from crate_ray.analysis.comparison.wording import metric_measure, with_interval
    from crate_ray.analysis.comparison.write import write_comparison
    from crate_ray.analysis.statistics import paired_t_interval
    from crate_ray.runs import RunFolder
    from crate_ray.runs.rows import read_run_rows

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/digits")
    parser.add_argument("--out", default="out/seeds")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    splits = {"train": "train", "eval": "validation", "test": "test"}
    common = [*(f"data.{key}={options.data}/{split}" for key, split in splits.items()), f"storage.path={options.out}"]
    common += ["data.num_loaders=1", "eval.probe_every_steps=null"]
    points = [(recipe, seed) for seed in SEEDS for recipe in RECIPES]
    with ProcessPoolExecutor(options.processes) as pool:
        futures = [pool.submit(run_seed, recipe, [*common, f"train.seed={seed}"]) for recipe, seed in points]
        folders = [RunFolder(future.result()) for future in futures]
    rows = read_run_rows(folders, split="test").rows
    found = compare(rows, name="digits", commands=(" ".join(["python -m benchmarks.seeds_digits", *sys.argv[1:]]),))
    measure = metric_measure(found)
    for item in found.configurations:
        print(f"{item.label}: {with_interval(measure, item.metric)}, untrained {measure.text(item.control)}")
    for first, second in combinations(found.configurations, 2):
        by_seed = [{row.seed: row.values[found.metric] for row in item.rows} for item in (first, second)]
        interval = paired_t_interval([by_seed[0][seed] - by_seed[1][seed] for seed in SEEDS])
        mean, low, high = (measure.difference_text(number) for number in (interval.mean, interval.low, interval.high))
        print(f"{first.label} - {second.label}: {mean} [{low}, {high}]")
    print(found.headline)
    print(write_comparison(found, Path(options.out, "comparison")))


if __name__ == "__main__":
    main()
