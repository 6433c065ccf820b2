import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_ray.config import ConfigError, RunConfig
from crate_ray.data.order import SampleOrder, epoch_order, global_batch, rank_slice

shard_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)
lanes = st.integers(1, 70)
windows = st.integers(1, 50)
seeds = st.integers(0, 2**63)
fast = settings(max_examples=60, deadline=None)


@fast
@given(shard_sizes, lanes, windows, seeds, st.integers(0, 5))
def test_every_sample_comes_exactly_once_an_epoch(sizes, lanes, window, seed, epoch):
    ids = epoch_order(sizes, seed=seed, epoch=epoch, lanes=lanes, window=window)
    assert sorted(ids.tolist()) == list(range(sum(sizes)))


GRID = list(
    itertools.product(
        ([1], [3], [0, 5, 0], [1, 1, 1, 1], [7, 2, 9, 1], [64, 63, 65], [0, 0, 130, 1, 17]),  # uneven and empty shards
        (1, 3, 64, 200),  # lanes: also more than samples
        (1, 16, 2048),  # windows: also longer than a lane
        (1, 5, 64, 301),  # batches: also several epochs long
    )
)


def test_over_a_grid_of_sizes_every_epoch_is_whole_and_no_batch_is_cut():
    """What a run reads from its first to its last step, told from the epochs alone: no sample missing, none too many."""
    for sizes, lanes, window, size in GRID:
        order, num_samples = SampleOrder(sizes, seed=11, lanes=lanes, window=window), sum(sizes)
        steps = -(-2 * num_samples // size)
        batches = [global_batch(order, cursor=step * size, size=size) for step in range(steps)]
        assert {len(batch.sample_ids) for batch in batches} == {size}
        epochs = np.concatenate([batch.epochs for batch in batches])
        ids = np.concatenate([batch.sample_ids for batch in batches])
        for epoch in range(steps * size // num_samples):
            assert sorted(ids[epochs == epoch].tolist()) == list(range(num_samples)), (sizes, lanes, window, size)


@fast
@given(shard_sizes, lanes, windows, st.integers(1, 60), st.integers(0, 300), st.data())
def test_the_global_batch_is_the_same_for_any_number_of_ranks(sizes, lanes, window, size, cursor, data):
    order = SampleOrder(sizes, seed=1, lanes=lanes, window=window)
    batch = global_batch(order, cursor=cursor, size=size)
    world_size = data.draw(st.integers(1, size))
    slices = [rank_slice(rank, world_size, size) for rank in range(world_size)]
    rejoined = np.concatenate([batch.sample_ids[part.start : part.stop] for part in slices])
    assert rejoined.tolist() == batch.sample_ids.tolist()
    assert {part.padded for part in slices} == {-(-size // world_size)}
    assert all(1 <= part.stop - part.start <= part.padded for part in slices)


@fast
@given(shard_sizes, lanes, windows, st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_batches_of_any_sizes_spell_the_same_endless_sequence(sizes, lanes, window, batch_sizes):
    """The multiset of rows between two cursors depends on these only, also over epoch ends and for N < B."""
    order = SampleOrder(sizes, seed=3, lanes=lanes, window=window)
    total = sum(batch_sizes)
    num_samples = sum(sizes)
    expected = np.concatenate(
        [epoch_order(sizes, seed=3, epoch=epoch, lanes=lanes, window=window) for epoch in range(total // num_samples + 1)]
    )[:total]
    cursor, found = 0, []
    for size in batch_sizes:
        batch = global_batch(order, cursor=cursor, size=size)
        assert sorted(batch.sample_ids.tolist()) == sorted(expected[cursor : cursor + size].tolist())
        assert np.all(np.diff(batch.lanes) >= 0)
        found += [(int(e), int(s)) for e, s in zip(batch.epochs, batch.sample_ids, strict=True)]
        cursor += size
    assert len(set(found)) == total


def test_a_bare_cursor_resumes_exactly():
    kept = SampleOrder([30, 41, 7], seed=5, lanes=8, window=4)
    for cursor in range(0, 500, 24):
        fresh = SampleOrder([30, 41, 7], seed=5, lanes=8, window=4)
        np.testing.assert_array_equal(
            global_batch(kept, cursor=cursor, size=24).sample_ids, global_batch(fresh, cursor=cursor, size=24).sample_ids
        )


@fast
@given(shard_sizes, st.integers(1, 12), st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_the_number_of_workers_may_change_at_any_step(sizes, size, world_sizes):
    """Every attempt starts from nothing but the cursor, on another number of ranks; one undisturbed rank reads the same."""
    undisturbed = SampleOrder(sizes, seed=2, lanes=8, window=4)
    for step, world_size in enumerate(min(size, wanted) for wanted in world_sizes):
        parts = []
        for rank in range(world_size):
            batch = global_batch(SampleOrder(sizes, seed=2, lanes=8, window=4), cursor=step * size, size=size)
            share = rank_slice(rank, world_size, size)
            parts += batch.sample_ids[share.start : share.stop].tolist()
        assert parts == global_batch(undisturbed, cursor=step * size, size=size).sample_ids.tolist()


def test_no_seed_and_epoch_repeats_the_order_of_another():
    """Neither seed + 1 the next epoch of seed, nor the largest seed that of another; asked in turns, each stays itself."""
    seeds = [0, 1, 2, 2**32, 2**63 - 1]
    orders = {seed: SampleOrder([40, 23], seed=seed, lanes=4, window=8) for seed in seeds}
    found = {(seed, epoch): tuple(orders[seed].epoch(epoch).tolist()) for epoch in range(6) for seed in seeds}
    assert len(set(found.values())) == len(found)
    for (seed, epoch), ids in reversed(found.items()):  # epochs that were dropped from memory come back the same
        assert tuple(orders[seed].epoch(epoch).tolist()) == ids


def test_threads_that_ask_for_epochs_at_once_get_their_own():
    order = SampleOrder([300, 211], seed=4, lanes=8, window=16)
    asked = [epoch % 5 for epoch in range(60)]
    with ThreadPoolExecutor(8) as threads:
        for epoch, ids in zip(asked, threads.map(order.epoch, asked), strict=True):
            np.testing.assert_array_equal(ids, epoch_order([300, 211], seed=4, epoch=epoch, lanes=8, window=16))


def test_epochs_and_seeds_differ_and_windows_hold_their_samples():
    def order(seed=0, epoch=0, window=16):
        return epoch_order([100] * 5, seed=seed, epoch=epoch, lanes=4, window=window)

    assert order(epoch=0).tolist() != order(epoch=1).tolist() != order(seed=1).tolist()
    plain, shuffled = order(window=1), order(window=16)
    for lane in range(4):
        in_lane, mixed = plain[lane::4], shuffled[lane::4]
        for start in range(0, len(in_lane), 16):
            assert sorted(in_lane[start : start + 16]) == sorted(mixed[start : start + 16])
        assert in_lane.tolist() != mixed.tolist()


def reference_order(sizes, *, seed, epoch, lanes, window):
    """docs/data_format.md word by word, in plain Python."""

    def philox(purpose, item=0):
        return np.random.Generator(np.random.Philox(key=seed + 2**64 * epoch, counter=2**128 * item + 2**192 * purpose))

    first_ids = [sum(sizes[:i]) for i in range(len(sizes))]
    draws = philox(0)
    ids = [first_ids[shard] + i for shard in draws.permutation(len(sizes)) for i in range(sizes[shard])]
    offset = int(draws.integers(len(ids)))
    ids = ids[offset:] + ids[:offset]
    lane_samples, begin = [], 0
    for lane in range(lanes):
        length = len(ids) // lanes + (lane < len(ids) % lanes)
        in_lane, begin = ids[begin : begin + length], begin + length
        keys = philox(1, lane).random(length)
        mixed = []
        for start in range(0, length, window):
            rows = range(start, min(start + window, length))
            mixed += [in_lane[row] for row in (sorted(rows, key=lambda row: keys[row]) if window > 1 else rows)]
        lane_samples.append(mixed)
    return [lane_samples[p % lanes][p // lanes] for p in range(len(ids))]


@fast
@given(shard_sizes, lanes, windows, seeds, st.integers(0, 5))
def test_the_order_is_the_one_that_the_documentation_describes(sizes, lanes, window, seed, epoch):
    arguments = {"seed": seed, "epoch": epoch, "lanes": lanes, "window": window}
    assert epoch_order(sizes, **arguments).tolist() == reference_order(sizes, **arguments)


def test_the_order_of_this_format_never_changes():
    """Recorded from the first release; a change here breaks the resumption of every run: raise the schema version."""
    ids = epoch_order([3, 4, 5], seed=7, epoch=2, lanes=5, window=2)
    assert ids.tolist() == [7, 9, 1, 3, 4, 6, 10, 0, 2, 5, 8, 11]


def test_more_workers_than_samples_in_a_batch_is_refused():
    with pytest.raises(ConfigError, match="9 workers cannot share a global batch of 8"):
        rank_slice(0, 9, 8)


def test_an_epoch_of_imagenet_takes_well_below_a_microsecond_a_sample():
    """Measured 0.06; the bound leaves room for a slow or busy machine."""
    start = time.process_time()
    epoch_order([1251] * 1024, seed=0, epoch=0, lanes=64, window=2048)
    assert (time.process_time() - start) / (1251 * 1024) < 0.5e-6


def test_a_ready_epoch_is_handed_out_while_another_is_being_sorted(monkeypatch):
    order = SampleOrder([30], seed=0, lanes=2, window=4)
    ready, sorting, going_on = order.epoch(0), threading.Event(), threading.Event()

    def slow(*arguments, **options):
        sorting.set()
        going_on.wait(10)
        return epoch_order(*arguments, **options)

    monkeypatch.setattr("crate_ray.data.order.epoch_order", slow)
    with ThreadPoolExecutor(2) as threads:
        threads.submit(order.epoch, 1)
        sorting.wait(10)
        found = threads.submit(order.epoch, 0)
        try:
            assert found.result(timeout=5) is ready
        finally:
            going_on.set()


@pytest.mark.parametrize("key", ["data.lanes", "data.window"])
def test_lanes_and_windows_past_32_bits_are_refused_by_name(key):
    with pytest.raises(ConfigError, match=rf"{key}.*2147483647"):
        RunConfig.load("digits_crate_mae", [f"{key}={2**31}"])
