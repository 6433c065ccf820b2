"""Does the device wait for images? Real runs of the loop, a model slower than its loader and one faster.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_data_wait --work DIR

Trains on the 500 x 375 JPEGs of benchmarks/make_jpegs.py (written to DIR once), cropped to 224 pixels: CRATE-MAE-T, whose step
takes a CPU much longer than the images of its batch take a loader, and a model of one narrow layer, which is faster than any
loader. Prints the share of time spent waiting and what the run says of its loader.
"""

import argparse
import logging
import statistics
import tempfile
from pathlib import Path

from benchmarks.make_jpegs import KINDS, make

WIDTHS = ["width=16", "num_heads=1", "encoder_depth=1", "decoder_depth=1", "decoder_width=16", "decoder_num_heads=1"]
CASES = {
    "slow model, 1 loader": (["model.preset=crate_mae_tiny"], 16, 30, 1),
    "fast model, 1 loader": (
        ["model.preset=crate_mae_tiny", *(f"model.{key}" for key in [*WIDTHS, "patch_size=56"])],
        64,
        120,
        1,
    ),
}


def wait_fraction(shards: str, case: tuple[list[str], int, int, int]) -> float:
    """Trains and returns the median of the recorded windows after the first."""
    from crate_ray.config import RunConfig
    from crate_ray.runs import RunFolder, read_records
    from crate_ray.training.loop import LocalContext, run_training

    model, batch, steps, loaders = case
    settings = [f"train.global_batch={batch}", f"train.steps={steps}", f"data.train={shards}", f"data.num_loaders={loaders}"]
    settings += ["scale.use_gpu=auto", "train.epochs=null", "data.eval=null", "data.test=null", "eval.log_every_steps=10"]
    config = RunConfig.load("imagenet_crate_mae_base", [*model, *settings])
    with tempfile.TemporaryDirectory() as out:
        folder = RunFolder(out)
        run_training(config, folder, LocalContext())
        waits = [r.values["perf/data_wait_fraction"] for r in read_records(folder) if "perf/data_wait_fraction" in r.values]
    return statistics.median(waits[1:])


def main() -> None:
    """Runs both cases."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(1)
    kind = KINDS[0]
    make(options.work, kind)
    for name, case in CASES.items():
        print(f"{name}: waits {wait_fraction(str(options.work / kind.name / 'shards'), case):.2%} of the time", flush=True)


if __name__ == "__main__":
    main()
