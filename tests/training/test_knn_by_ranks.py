"""kNN on validation is one number, whoever and however many encode the images."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gloo_ranks import run_ranks

from crate_ray.config import RunConfig
from crate_ray.data import read_all
from crate_ray.evaluation.features import extract_features
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


def knn_of_rank(rank: int, world_size: int, config: RunConfig, out: str) -> None:
    """Writes the number and the bank that this rank has seen; batches of 5 give every rank some."""
    evaluate.EVAL_BATCH = 5
    torch.manual_seed(3)
    model = create_model(config.model)
    evaluator = Evaluator(config, rank=rank, world_size=world_size, precision="float32")
    bank = evaluator._features(model, config.data.source, np.arange(48))
    found = {"knn": evaluator.knn(model), "mean": bank.mean_ND.tolist(), "labels": bank.labels_N.tolist()}
    Path(out, f"{world_size}-{rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_knn_and_its_features_are_equal_bit_by_bit_for_one_two_and_three_ranks(load_tiny: LoadTiny, tmp_path: Path) -> None:
    config = load_tiny()
    for world_size in (1, 2, 3):
        run_ranks(world_size, knn_of_rank, config, str(tmp_path), scratch=tmp_path / "ranks")
    found = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*-*.json"))]
    assert len(found) == 6
    assert all(other == found[0] for other in found)
    torch.manual_seed(3)
    model = create_model(config.model)
    batches = read_all(config.data.train or "", batch_size=5, image_size=16)
    expected = extract_features(model, batches, mean=config.data.mean, std=config.data.std)
    assert found[0]["mean"] == expected.mean_ND.tolist()
    assert found[0]["labels"] == expected.labels_N.tolist()
