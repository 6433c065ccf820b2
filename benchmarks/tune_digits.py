"""Which mask ratio, learning rate and length suit each family on the digits? Reads validation only.

    python -m benchmarks.tune_digits --data data/digits --out out/tune --steps 600

Every family gets the same grid. One configuration is one plain process with one thread, two at a time;
a finished one is not repeated. The table is appended to OUT/grid.jsonl.
"""

import argparse
import itertools
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

RECIPES = ("digits_crate_mae", "digits_mae", "digits_mae_small")
MASK_RATIOS = (0.5, 0.75)
LEARNING_RATES = (1.5e-4, 5e-4, 1.5e-3, 3e-3)


def run_point(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """Trains one configuration and probes it on validation beside its untrained control."""
    import torch

    from crate_ray.config import RunConfig
    from crate_ray.data import load_index, read_all
    from crate_ray.evaluation.features import extract_features
    from crate_ray.evaluation.probes import Rows, linear_probe
    from crate_ray.runs import Lease, is_finished, read_records
    from crate_ray.training.checkpoint import MODEL_FILE, latest_checkpoint
    from crate_ray.training.loop import LocalContext, run_training
    from crate_ray.training.prepare import prepare_run
    from crate_ray.training.probes import untrained

    torch.set_num_threads(1)
    config, folder = prepare_run(RunConfig.load(recipe, overrides), device_type="cpu")
    started = time.time()
    if not is_finished(folder):
        lease = Lease.take(folder)
        run_training(config, folder, LocalContext(lease.attempt))
        lease.end("FINISHED")

    def rows(model: Any, url: str | None) -> Rows:
        assert url is not None
        batches = read_all(url, batch_size=256, image_size=config.model.image_size, num_loaders=0)
        found = extract_features(model, batches, mean=config.data.mean, std=config.data.std)
        return Rows(found.mean_ND, found.labels_N, load_index(url).sources)

    def top1(model: Any) -> float:
        train, validation = rows(model, config.data.train), rows(model, config.data.eval)
        return linear_probe(train, validation, validation).top1.value

    model = untrained(config)
    control = top1(model)
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    model.load_state_dict(checkpoint.read(MODEL_FILE))
    values = {key: value for record in read_records(folder) for key, value in record.values.items()}
    return {
        "recipe": recipe,
        "overrides": overrides,
        "run": folder.name,
        "control_top1": control,
        "probe_top1": top1(model),
        "knn_top1": values.get("eval/knn_top1"),
        "eval_loss": values["final/eval_loss"],
        "images_per_s": values.get("final/images_per_s"),
        "seconds": time.time() - started,
    }


def main() -> None:
    """Runs the grid, the longest configurations first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/digits")
    parser.add_argument("--out", default="out/tune")
    parser.add_argument("--steps", type=int, nargs="+", default=[600])
    parser.add_argument("--lr", type=float, nargs="+", default=list(LEARNING_RATES))
    parser.add_argument("--mask-ratio", type=float, nargs="+", default=list(MASK_RATIOS))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--set", nargs="*", default=[], dest="overrides", help="applied to every point")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    paths = [
        f"data.{key}={options.data}/{split}" for key, split in (("train", "train"), ("eval", "validation"), ("test", "test"))
    ]
    common = [*paths, f"storage.path={out}", "data.num_loaders=1", "eval.every_steps=null", "eval.probe_every_steps=null"]
    grid = itertools.product(options.recipes, options.steps, options.mask_ratio, options.lr)
    with ProcessPoolExecutor(options.processes) as pool:
        futures = [
            pool.submit(
                run_point,
                recipe,
                [*common, f"train.steps={steps}", f"model.mask_ratio={mask}", f"optimizer.lr={lr}", *options.overrides],
            )
            for recipe, steps, mask, lr in grid
        ]
        for future in as_completed(futures):
            row = future.result()
            with (out / "grid.jsonl").open("a") as sink:
                sink.write(json.dumps(row) + "\n")
            point = " ".join(o for o in row["overrides"] if o.startswith(("train.", "model.", "optimizer.")))
            print(
                f"{row['recipe']:18} {point:55} control {row['control_top1']:.3f}  probe {row['probe_top1']:.3f}  "
                f"loss {row['eval_loss']:.4f}  {row['images_per_s'] or 0:.0f} images/s  {row['seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
