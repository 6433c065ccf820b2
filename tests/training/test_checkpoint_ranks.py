"""Ranks in processes of their own: when the disk of one refuses its shards, all end alike and name that reason."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from full_disks import LIMIT, file_size_limit
from gloo_ranks import run_ranks
from torch import Tensor

from crate_ray.config import RunConfig
from crate_ray.runs import NullSink, RunFolder
from crate_ray.training.checkpoint import list_checkpoints
from crate_ray.training.saving import CheckpointError, CheckpointSaver


class GlooRanks:
    """Two ranks that hold one copy of the state between them."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size, self.num_shards = rank, world_size, world_size

    def sum_up(self, values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values


def save_until_it_ends(rank: int, world_size: int, out: str) -> None:
    """One checkpoint that is written, and then the disk of the last rank is full."""
    saver = CheckpointSaver(
        RunConfig.load("digits_crate_mae", ["checkpoint.keep_best=1", "eval.every_steps=1"]),
        RunFolder(f"{out}/run"),
        ranks=GlooRanks(rank, world_size),
        device=torch.device("cpu"),
        sink=NullSink(),
        attempt=1,
    )

    def save(step: int) -> None:
        files = {f"model.shard-{rank}.safetensors": ({"w": torch.ones(LIMIT)}, {})}
        state = {"cursor": step, "train_seconds": 0.0, "evaluation": {"eval/loss": 1.0 / step}}
        saver.save(step, files, state)

    save(1)
    saver.wait()
    said = {"whole": saver.finished()}
    with file_size_limit() if rank == world_size - 1 else nullcontext():
        try:
            for step in range(2, 9):
                save(step)
        except CheckpointError as error:
            said |= {"step": step, "error": str(error)}
    saver.close()
    Path(f"{out}/rank-{rank}.json").write_text(json.dumps(said))


@pytest.mark.slow
def test_a_disk_that_refuses_the_shards_of_one_rank_ends_all_ranks_alike(tmp_path: Path) -> None:
    run_ranks(2, save_until_it_ends, str(tmp_path), scratch=tmp_path / "meeting")
    first, last = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first == last
    assert (first["whole"], first["step"]) == ([1], 5), "three failures, and the fourth save tells of them"
    assert "3 checkpoints in a row, up to step 4, could not be written: [Errno 27] File too large" in first["error"]
    assert "goes on from step 1, " in first["error"]
    assert [checkpoint.step for checkpoint in list_checkpoints(RunFolder(str(tmp_path / "run")))] == [1]
