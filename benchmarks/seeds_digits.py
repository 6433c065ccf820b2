"""Do CRATE-MAE and MAE beat their untrained encoders on the digits? Frozen recipes, fresh seeds, test read once.

    python -m benchmarks.seeds_digits --data data/digits --out out/seeds

One run is one plain process with one thread, two at a time; a finished one is not repeated. Prints the mean of
each recipe with t intervals over seeds, and the paired differences between recipes; OUT/seeds.json keeps all.
"""

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
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
    from crate_ray.analysis import aggregate_seeds, format_table, headline, read_row
    from crate_ray.runs import RunFolder

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
    rows = {seed: [read_row(f) for f, (_, s) in zip(folders, points, strict=True) if s == seed] for seed in SEEDS}
    summary = aggregate_seeds(rows)
    for cells in format_table(summary.rows):
        print(" | ".join(cells))
    for difference in summary.differences:
        top1 = difference.top1
        print(
            f"{difference.first} - {difference.second}: {100 * top1.mean:+.2f} [{100 * top1.low:+.2f}, {100 * top1.high:+.2f}]"
        )
    print(headline(summary.rows, summary.differences))
    content = {"rows": [asdict(row) for row in summary.rows], "differences": [asdict(item) for item in summary.differences]}
    content["runs"] = [asdict(row) for seed_rows in rows.values() for row in seed_rows]
    Path(options.out, "seeds.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
