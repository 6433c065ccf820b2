"""1, 2 or 3 workers that share the global batch train the same run, and stop at the same step."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gloo_ranks import GlooContext, run_ranks

from crate_ray.config import RunConfig
from crate_ray.data import open_reader
from crate_ray.runs import RunFolder, read_records
from crate_ray.training.checkpoint import MODEL_FILE, latest_checkpoint
from crate_ray.training.loop import LocalContext, run_training

LoadTiny = Callable[..., RunConfig]
GLOBAL_BATCH = 7  # shared by 2 or 3 workers, the last rows of some of them are padding


def work(rank: int, world_size: int, config: RunConfig, out: str) -> None:
    """Trains one run to its end, then one that only the last rank wants to stop after step 4."""
    run_training(config, RunFolder(f"{out}/whole"), GlooContext(rank, world_size))
    stop_after = 4 if rank == world_size - 1 else None
    result = run_training(config, RunFolder(f"{out}/stopped"), GlooContext(rank, world_size, stop_after))
    Path(out, f"result-{rank}.json").write_text(json.dumps([result.state, result.step]))


def losses(folder: RunFolder, key: str) -> list[float]:
    return [record.values[key] for record in read_records(folder) if key in record.values]


def weights(folder: RunFolder) -> torch.Tensor:
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    tensors = checkpoint.read(MODEL_FILE)  # in no particular order
    return torch.cat([tensors[key].flatten() for key in sorted(tensors)])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_workers_that_share_a_batch_train_the_run_of_one_worker(world_size: int, load_tiny: LoadTiny, tmp_path: Path) -> None:
    config = load_tiny(
        f"train.global_batch={GLOBAL_BATCH}", "train.steps=10", "eval.every_steps=5", "eval.whitebox_every_steps=4"
    )
    alone = RunFolder(str(tmp_path / "alone"))
    run_training(config, alone, LocalContext())
    run_ranks(world_size, work, config, str(tmp_path / "shared"), scratch=tmp_path / "shared")
    shared = RunFolder(str(tmp_path / "shared" / "whole"))
    # float32: the same sums in another order, through ten updates of AdamW.
    assert losses(shared, "train/loss") == pytest.approx(losses(alone, "train/loss"), rel=1e-5)
    assert losses(shared, "train/grad_norm") == pytest.approx(losses(alone, "train/grad_norm"), rel=1e-4)
    assert losses(shared, "eval/loss") == pytest.approx(losses(alone, "eval/loss"), rel=1e-5)
    assert len(losses(shared, "train/loss")) == 10
    assert len(losses(shared, "whitebox/layer01/coding_rate_pre_nats")) == 4, "rank 0 measures; the others do not wait forever"
    torch.testing.assert_close(weights(shared), weights(alone), rtol=1e-3, atol=1e-4)

    results = [json.loads((tmp_path / "shared" / f"result-{rank}.json").read_text()) for rank in range(world_size)]
    assert results == [["KILLED", 5]] * world_size, "one rank's wish stops all of them after the same step"
    stopped = latest_checkpoint(RunFolder(str(tmp_path / "shared" / "stopped")))
    assert stopped is not None
    assert (stopped.step, stopped.cursor) == (5, 5 * GLOBAL_BATCH)


@pytest.mark.parametrize("world_size", [1, 2, 3, GLOBAL_BATCH])
def test_the_rows_of_all_workers_are_the_global_batch(world_size: int, shards: Path) -> None:
    def read(rank: int, size: int) -> list[list[tuple[int, float]]]:
        options = {"global_batch": GLOBAL_BATCH, "image_size": 16, "noise_size": 16, "num_loaders": 0, "lanes": 4, "window": 8}
        with open_reader(str(shards / "train"), rank=rank, world_size=size, **options) as reader:  # type: ignore[arg-type]
            batches = [next(reader) for _ in range(10)]  # 70 of 48 samples: into the second epoch
        for batch in batches:
            assert len(batch.weights_B) == -(-GLOBAL_BATCH // size)
        counted = [np.flatnonzero(batch.weights_B) for batch in batches]
        return [
            [(int(b.sample_ids_B[i]), float(b.noise_BN[i].sum())) for i in rows]  # type: ignore[index]
            for b, rows in zip(batches, counted, strict=True)
        ]

    shares = [read(rank, world_size) for rank in range(world_size)]
    together = [[row for share in step for row in share] for step in zip(*shares, strict=True)]
    assert together == read(0, 1)
