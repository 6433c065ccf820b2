"""kNN on validation is one number, whoever and however many encode the images."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gloo_ranks import run_ranks

from crate_ray.config import RunConfig
from crate_ray.data import load_index
from crate_ray.models import create_model
from crate_ray.training import evaluate
from crate_ray.training.evaluate import EVAL_BATCH, Evaluator, batch_rows

LoadTiny = Callable[..., RunConfig]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("num_rows", [1, EVAL_BATCH, EVAL_BATCH + 1, 10 * EVAL_BATCH + 7])
def test_ranks_share_all_rows_in_whole_batches(num_rows: int, world_size: int) -> None:
    shares = [batch_rows(num_rows, rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(num_rows))
    for share in shares:
        batches = [share[start : start + EVAL_BATCH] for start in range(0, len(share), EVAL_BATCH)]
        for rows in batches:  # the reader cuts a share in the same places as the whole
            assert rows[0] % EVAL_BATCH == 0
            assert rows.tolist() == list(range(rows[0], min(rows[0] + EVAL_BATCH, num_rows)))


def measure(config: RunConfig, rank: int, world_size: int) -> dict[str, Any]:
    """The number and the features that a rank sees."""
    torch.manual_seed(3)
    model = create_model(config.model)
    evaluator = Evaluator(config, rank=rank, world_size=world_size, precision="float32")
    bank = evaluator._features(model, config.data.source, np.arange(48))
    return {"knn": evaluator.knn(model), "mean": bank.mean_ND.tolist(), "labels": bank.labels_N.tolist()}


def measure_in_rank(rank: int, world_size: int, config: RunConfig, out: str) -> None:
    """Batches of 5 give every rank some of 48 images, and the last of three none of 6."""
    evaluate.EVAL_BATCH = 5
    Path(out, f"rank-{rank}.json").write_text(json.dumps(measure(config, rank, world_size)))


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("world_size", [2, 3])
def test_knn_and_its_features_are_those_of_one_worker_bit_by_bit(
    world_size: int, load_tiny: LoadTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_tiny()
    run_ranks(world_size, measure_in_rank, config, str(tmp_path), scratch=tmp_path / "ranks")
    monkeypatch.setattr(evaluate, "EVAL_BATCH", 5)
    alone = measure(config, 0, 1)
    assert [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(world_size)] == [alone] * world_size
    assert sorted(alone["labels"]) != alone["labels"] == load_index(config.data.train or "").labels.tolist()
