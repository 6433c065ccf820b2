"""Plans as arrays: rows of ranks, turns of epochs and sums, against counts made one by one."""

from itertools import pairwise

import numpy as np
import pytest

from crate_ray.config import ConfigError
from crate_ray.data.order import SampleOrder, epoch_order
from crate_ray.data.plan import epoch_starts, measure_coverage, measure_rank, plan_steps

SIZES = [11, 0, 4, 26, 1]
NUM_SAMPLES = sum(SIZES)


def make_plan(world_size=3, batch=8, steps=9, cursor=5):
    order = SampleOrder(SIZES, seed=6, lanes=5, window=3)
    return plan_steps(order, world_size=world_size, global_batch_size=batch, steps=steps, cursor=cursor)


@pytest.mark.parametrize("world_size", range(1, 9))
def test_the_ranks_of_any_world_share_the_rows_of_every_step(world_size):
    plan = make_plan(world_size)
    parts = [plan.of_rank(rank) for rank in range(world_size)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), plan.sample_ids_SB)
    np.testing.assert_array_equal(plan.sample_ids_SB, make_plan(1).sample_ids_SB)
    assert max(part.shape[1] for part in parts) - min(part.shape[1] for part in parts) <= 1


def test_the_steps_read_the_epochs_from_the_cursor_on():
    plan = make_plan(steps=9, cursor=5)
    endless = np.concatenate([epoch_order(SIZES, seed=6, epoch=epoch, lanes=5, window=3) for epoch in range(3)])
    for cursor, ids in zip(plan.cursors, plan.sample_ids_SB, strict=True):
        assert sorted(ids.tolist()) == sorted(endless[cursor : cursor + 8].tolist())


@pytest.mark.parametrize("batch", [1, 8, 42, 100])
@pytest.mark.parametrize("cursor", [0, 5, 42, 80])
def test_an_epoch_begins_where_its_first_position_is(cursor, batch):
    plan = make_plan(1, batch, steps=7, cursor=cursor)
    counted = [divmod(at - cursor, batch) for at in range(cursor, cursor + 7 * batch) if at % NUM_SAMPLES == 0]
    starts = epoch_starts(plan, num_samples=NUM_SAMPLES)
    assert [(start.step, start.rows_before) for start in starts] == counted
    assert all(later.epoch == earlier.epoch + 1 for earlier, later in pairwise(starts))


def test_coverage_and_reads_of_a_rank_are_what_counting_one_by_one_finds():
    plan = make_plan(steps=9, cursor=30)
    reads = list(zip(plan.epochs_SB.ravel().tolist(), plan.sample_ids_SB.ravel().tolist(), strict=True))
    coverage = measure_coverage(plan, num_samples=NUM_SAMPLES)
    assert coverage.reads == len(reads) == 72
    assert coverage.distinct_samples == len({sample for _, sample in reads}) == 42
    assert coverage.duplicates_within_an_epoch == len(reads) - len(set(reads)) == 0
    assert coverage.epochs == (0, 1, 2)
    shard_of, num_bytes_of = np.repeat(np.arange(5), SIZES), np.arange(NUM_SAMPLES) * 7
    for rank, padding in enumerate((1, 0, 0)):  # rows 0-1, 2-4 and 5-7 of eight
        found = measure_rank(plan, rank, shard_of=shard_of, num_bytes_of=num_bytes_of)
        ids = plan.of_rank(rank).ravel().tolist()
        assert found.images == len(ids)
        assert found.shards.tolist() == sorted({int(shard_of[i]) for i in ids})
        assert found.num_bytes == sum(7 * i for i in ids)
        assert found.padding == 9 * padding


def test_a_sample_that_comes_twice_would_be_counted():
    plan = make_plan(1, batch=6, steps=2, cursor=0)
    plan.sample_ids_SB[1, 3] = plan.sample_ids_SB[0, 0]
    assert measure_coverage(plan, num_samples=NUM_SAMPLES).duplicates_within_an_epoch == 1
    zeros = np.zeros(NUM_SAMPLES, dtype=np.int64)
    assert measure_rank(plan, 0, shard_of=zeros, num_bytes_of=zeros).duplicates_within_an_epoch == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world_size": 9}, "9 workers cannot share a global batch of 8"),
        ({"steps": 0}, "steps 0: it is at least 1"),
        ({"batch": 0}, "global batch 0: it is at least 1"),
        ({"cursor": -1}, "cursor -1: it is at least 0"),
        ({"steps": 10**10}, "show at most 6,250,000 steps"),
        ({"cursor": 2**63 - 10}, "beyond any run"),
    ],
)
def test_plans_that_cannot_be_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(**change)
