"""Several data sets in one run: who gets which position, and that every promise of the single order holds for the mix."""

import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_ray.config import MAX_PERIOD, ConfigError, MixPart, RunConfig, digest, resume_parts, whole_weights
from crate_ray.data import build_index, build_source, load_index, load_source, open_reader, read_all
from crate_ray.data.mix import MixedOrder, fair_pattern
from crate_ray.data.order import SampleOrder, global_batch
from crate_ray.data.shards import pack_shard
from crate_ray.training.prepare import absolute_paths, check_labels, data_digest

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")

CROPS = {"image_size": 16, "augment": "random_resized_crop", "noise_size": 9, "seed": 4, "lanes": 8, "window": 16}
all_counts = st.lists(st.integers(1, 60), min_size=1, max_size=9)
fast = settings(max_examples=60, deadline=None)


def mixed(sizes: list[list[int]], counts: list[int], *, seed: int = 3, lanes: int = 4, window: int = 8) -> MixedOrder:
    return MixedOrder([SampleOrder(shards, seed=seed, lanes=lanes, window=window) for shards in sizes], counts)


@fast
@given(all_counts, st.integers(1, 4))
def test_after_any_position_each_data_set_is_within_one_sample_of_its_share(counts: list[int], periods: int) -> None:
    period = sum(counts)
    given_k = [0] * len(counts)
    pattern = fair_pattern(counts).tolist()
    for position in range(periods * period):
        given_k[pattern[position % period]] += 1
        for k, count in enumerate(counts):
            assert abs(given_k[k] - Fraction(count, period) * (position + 1)) < 1
    assert given_k == [periods * count for count in counts]


@pytest.mark.parametrize("counts", [[1], [9_999, 1], [3_333, 3_333, 3_334], [1] * 40, [1, 10, 100, 1_000, 8_889]])
def test_shares_are_held_at_the_finest_grading_too(counts: list[int]) -> None:
    pattern, period = fair_pattern(counts), sum(counts)
    positions = np.arange(1, period + 1)
    for k, count in enumerate(counts):
        assert np.abs(np.cumsum(pattern == k) * period - count * positions).max() < period


def test_the_patterns_of_this_format_never_change() -> None:
    """Worked out by hand from the windows in docs/data_format.md; a change breaks the resumption of every mix."""
    assert fair_pattern([2, 1]).tolist() == [0, 0, 1]
    assert fair_pattern([1, 1, 1]).tolist() == [0, 1, 2]
    assert fair_pattern([3, 2]).tolist() == [0, 1, 0, 0, 1]
    assert fair_pattern([5, 1, 1]).tolist() == [0, 0, 0, 1, 0, 0, 2]


@fast
@given(
    st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(st.integers(1, 9), min_size=4, max_size=4),
    st.lists(st.integers(1, 60), min_size=1, max_size=6),
)
def test_a_mix_is_its_data_sets_read_alone_and_dealt_by_the_pattern(sizes, counts, batch_sizes) -> None:
    """From the first position on, in plain Python; batches of any sizes cut the same sequence."""
    counts = counts[: len(sizes)]
    order, pattern = mixed(sizes, counts), fair_pattern(counts)
    alone = [SampleOrder(shards, seed=3, lanes=4, window=8) for shards in sizes]
    first_id = [sum(map(sum, sizes[:k])) for k in range(len(sizes))]
    given_k, cursor = [0] * len(sizes), 0
    for size in batch_sizes:
        expected = []
        for position in range(cursor, cursor + size):
            k = pattern[position % sum(counts)]
            epoch, within = divmod(given_k[k], alone[k].num_samples)
            expected.append((first_id[k] + alone[k].epoch(epoch)[within], epoch, within % 4))
            given_k[k] += 1
        rows = order.rows(cursor, size)
        assert list(zip(rows.sample_ids, rows.epochs, rows.lanes, strict=True)) == expected
        batch = global_batch(order, cursor=cursor, size=size)
        in_lane_order = sorted(expected, key=lambda row: row[2])
        assert list(zip(batch.sample_ids, batch.epochs, batch.lanes, strict=True)) == in_lane_order
        cursor += size
        assert order.progress(cursor) == tuple(n / part.num_samples for n, part in zip(given_k, alone, strict=True))


@fast
@given(all_counts, st.integers(0, 500), st.integers(1, 80))
def test_a_bare_cursor_resumes_exactly(counts: list[int], cursor: int, size: int) -> None:
    sizes = [[5 + k, 3] for k in range(len(counts))]
    read_on, fresh = mixed(sizes, counts), mixed(sizes, counts)
    read_on.rows(0, cursor + 1)
    for part, other in zip(_arrays(read_on.rows(cursor, size)), _arrays(fresh.rows(cursor, size)), strict=True):
        np.testing.assert_array_equal(part, other)


def _arrays(rows):
    return rows.sample_ids, rows.epochs, rows.lanes


def test_each_epoch_of_each_data_set_holds_every_sample_of_it_once() -> None:
    order = mixed([[30, 41], [9], [2, 2, 1]], [5, 2, 1])
    rows = order.rows(0, 8 * 71)
    for first, num_samples in ((0, 71), (71, 9), (80, 5)):
        mine = (rows.sample_ids >= first) & (rows.sample_ids < first + num_samples)
        epochs = rows.epochs[mine]
        for epoch in range(int(epochs.max())):
            found = sorted(rows.sample_ids[mine][epochs == epoch].tolist())
            assert found == list(range(first, first + num_samples)), (first, epoch)


def test_a_mix_of_one_data_set_is_that_data_set() -> None:
    alone, mix = SampleOrder([30, 41, 7], seed=3, lanes=4, window=8), mixed([[30, 41, 7]], [1])
    for cursor in (0, 70, 1_000):
        for ours, expected in zip(_arrays(mix.rows(cursor, 24)), _arrays(alone.rows(cursor, 24)), strict=True):
            np.testing.assert_array_equal(ours, expected)


def test_a_position_a_hundred_billion_samples_in_takes_no_longer_than_the_first() -> None:
    order = mixed([[40, 23], [17]], [3, 2])
    started = time.process_time()
    rows = order.rows(10**11, 64)
    assert time.process_time() - started < 0.05
    assert sum(order.progress(10**11)) == pytest.approx(0.6e11 / 63 + 0.4e11 / 17)
    assert rows.epochs[rows.sample_ids < 63].min() == 6 * 10**10 // 63


def test_the_finest_mix_is_dealt_in_a_fraction_of_a_second() -> None:
    started = time.process_time()
    fair_pattern([2_500] * 4)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("weights", "expected"),
    [((2.0, 1.0), (2, 1)), ((0.5, 0.3), (5, 3)), ((1e-3, 1.0), (1, 1000)), ((0.1, 0.7, 0.2), (1, 7, 2)), ((6.0,), (1,))],
)
def test_weights_are_taken_as_they_are_written(weights: tuple[float, ...], expected: tuple[int, ...]) -> None:
    assert whole_weights(weights) == expected


# -- through the reader ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(shapes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[MixPart, ...]:
    """96 shapes with weight 2, 12 others with weight 1; their shards have the same names."""
    other = tmp_path_factory.mktemp("other")
    build_source("shapes:15", str(other), image_size=24, seed=1)
    return MixPart(train=str(shapes_folder / "train"), weight=2.0), MixPart(train=str(other / "train"))


def take(reader, count):
    with reader:
        return [next(reader) for _ in range(count)]


def real_rows(batch):
    kept = batch.weights_B > 0
    return [rows[kept] for rows in (batch.images_BCHW, batch.labels_B, batch.noise_BN, batch.sample_ids_B, batch.epochs_B)]


def test_the_combined_index_locates_every_image_of_every_data_set(parts) -> None:
    first, second = (load_index(part.train) for part in parts)
    index = load_source(parts)
    assert index.num_samples == 96 + 12
    assert index.labels.tolist() == [*first.labels, *second.labels]
    assert index.column("xxh3").tolist() == [*first.column("xxh3"), *second.column("xxh3")]
    for sample_id, (own, own_id) in {5: (first, 5), 95: (first, 95), 96: (second, 0), 107: (second, 11)}.items():
        assert index.locate(sample_id) == own.locate(own_id)
    assert len(set(index.sources)) == len(set(first.sources)) + len(set(second.sources))


def test_a_batch_holds_the_images_of_its_sample_ids_in_the_ratio_of_the_weights(parts) -> None:
    whole = torch.cat([batch.images_BCHW for part in parts for batch in read_all(part.train, batch_size=64, image_size=24)])
    for batch in take(open_reader(parts, global_batch=12, image_size=24, num_loaders=2), 5):
        assert int((batch.sample_ids_B < 96).sum()) == 8
        assert torch.equal(batch.images_BCHW, whole[batch.sample_ids_B])


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_the_ranks_together_read_the_global_batch_whatever_their_number(parts, world_size: int) -> None:
    alone = take(open_reader(parts, global_batch=10, num_loaders=0, **CROPS), 6)
    ranks = [
        take(open_reader(parts, global_batch=10, rank=rank, world_size=world_size, num_loaders=rank % 3, **CROPS), 6)
        for rank in range(world_size)
    ]
    for step, whole in enumerate(alone):
        rejoined = zip(*(real_rows(rank[step]) for rank in ranks), strict=True)
        for pieces, expected in zip(rejoined, real_rows(whole), strict=True):
            assert torch.equal(torch.cat(pieces), expected)


def test_a_resumed_reader_of_a_mix_continues_exactly(parts) -> None:
    whole = take(open_reader(parts, global_batch=20, num_loaders=2, **CROPS), 9)
    with open_reader(parts, global_batch=20, num_loaders=1, **CROPS) as reader:
        for _ in range(4):
            next(reader)
        state = reader.state_dict()
        assert state == {"cursor": 80}
        assert reader.epochs == (54 / 96, 26 / 12)
    for ours, expected in zip(take(open_reader(parts, global_batch=20, **state, **CROPS), 5), whole[4:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(real_rows(ours), real_rows(expected), strict=True))


# -- configuration, identity and a run --------------------------------------------------------------------------------------


def loaded(mix: str) -> RunConfig:
    return RunConfig.load("digits_crate_mae", [f"data.mix={mix}"])


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("[]", "a mix needs at least one data set"),
        ("[{train: a, weight: 0}]", r"data\.mix\.0\.weight = 0: input should be greater than 0"),
        ("[{train: a}, {train: b, weight: -1}]", r"data\.mix\.1\.weight = -1: input should be greater than 0"),
        (
            "[{train: a, wight: 2}]",
            r"data\.mix\.0\.wight: unknown key \(did you mean 'weight'\?\); valid keys here: train, weight",
        ),
        ("[{weight: 2}]", r"data\.mix\.0\.train: required"),
        (
            "[{train: a}, {train: b, weight: 1.0e+308}]",
            r"data\.mix\.1\.weight = 1e\+308: input should be less than or equal to",
        ),
        ("[{train: x/train}, {train: x/train/../train}]", "x/train is named twice"),
        ("[{train: s3://b/x}, {train: s3://b//y/../x/}]", "s3://b/x is named twice"),
        ("[{train: /x}, {train: file:///x}]", "/x is named twice"),
        ("[{train: a}, {train: a/}]", "a is named twice; name it once, with the sum of the weights"),
        (
            "[{train: a, weight: 1281167}, {train: b, weight: 13153500}]",
            r"add up to 14,434,667, and 10,000 is the most; use 89, 911",
        ),
    ],
)
def test_a_mix_that_has_no_order_is_refused_with_one_message(mix: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        loaded(mix)
    assert str(caught.value).count("\n") == 1


def test_a_mix_takes_the_place_of_the_recipes_data_and_both_in_one_file_are_refused(tmp_path: Path) -> None:
    config = loaded("[{train: a, weight: 2.0}, {train: s3://b/c}]")
    assert config.data.train is None
    assert config.data.train_urls == ("a", "s3://b/c")
    assert RunConfig.load("digits_crate_mae", ["data.mix=[{train: a}]", "data.train=b"]).data.mix is None
    for value in ("both: [{train: a}]", "neither"):
        recipe = tmp_path / "mine.yaml"
        data = "{train: b, mix: [{train: a}]}" if value != "neither" else "{}"
        recipe.write_text(
            f"model: {{preset: mae_small}}\ndata: {data}\noptimizer: {{lr: 1}}\ntrain: {{steps: 1, global_batch: 1}}"
        )
        with pytest.raises(ConfigError, match=r"data: give exactly one of data\.train .* and data\.mix"):
            RunConfig.load(str(recipe))


def test_the_suggested_weights_are_accepted() -> None:
    for weights in ((1e-9, 1.0), (1281167, 13153500, 7), tuple(1 / n for n in range(1, 40))):
        with pytest.raises(ConfigError, match="graded too finely") as caught:
            loaded("[" + ", ".join(f"{{train: d{k}, weight: {weight}}}" for k, weight in enumerate(weights)) + "]")
        near = [int(word) for word in str(caught.value).rsplit("use ", 1)[1].split(",")]
        assert len(near) == len(weights)
        assert sum(whole_weights(near)) <= MAX_PERIOD


def test_a_mix_is_known_by_what_it_holds_and_the_ratio_of_the_weights(parts, tmp_path: Path) -> None:
    a, b = (part.train for part in parts)

    def identity(*mix: tuple[str, float]) -> str:
        config = loaded("[" + ", ".join(f"{{train: {url}, weight: {weight}}}" for url, weight in mix) + "]")
        config = config.model_copy(update={"data": config.data.model_copy(update={"eval": None})})
        return digest(resume_parts(config, data_digest(config)))

    moved = tmp_path / "moved"
    moved.symlink_to(b)
    held = identity((a, 2), (b, 1))
    assert identity((a, 4), (str(moved), 2)) == held
    assert len({held, identity((a, 1), (b, 1)), identity((b, 1), (a, 2)), identity((a, 1)), identity((a, 2), (b, 3))}) == 5


def test_paths_of_a_mix_hold_in_any_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_paths(loaded("[{train: a}, {train: s3://b/c}]")).data.train_urls == (f"{tmp_path}/a", "s3://b/c")


def test_a_classifier_takes_data_sets_of_the_same_classes_only(parts, tmp_path: Path) -> None:
    classify = ["task=classify", "model.num_classes=10", "data.eval=null", "data.test=null"]

    def check(*urls: str) -> None:
        mix = ", ".join(f"{{train: {url}}}" for url in urls)
        check_labels(RunConfig.load("digits_crate_mae", [*classify, f"data.mix=[{mix}]"]))

    check(*(part.train for part in parts))
    (tmp_path / "a.tar").write_bytes(pack_shard([{"__key__": "k", "jpg": b"1", "cls": b"3"}]))
    build_index(str(tmp_path))
    with pytest.raises(ConfigError, match=r"has 10, '.*' has 4 classes.*crate-ray data index URL --num-classes"):
        check(parts[0].train, str(tmp_path))
    build_index(str(tmp_path), num_classes=10)
    check(parts[0].train, str(tmp_path))


def test_a_run_on_a_mix_stops_resumes_and_measures_like_any_other(parts, tmp_path: Path, shapes_folder: Path) -> None:
    from crate_ray.runs import RunFolder, read_records
    from crate_ray.training.loop import LocalContext, run_training

    class StopAfter(LocalContext):
        def heartbeat(self, step: int) -> None:
            if step == 5:
                self.stop()

    mix = ", ".join(f"{{train: {part.train}, weight: {part.weight}}}" for part in parts)
    small = ["model.image_size=24", "model.width=16", "model.num_heads=2", "model.encoder_depth=1", "model.decoder_depth=1"]
    config = RunConfig.load(
        "digits_crate_mae",
        [
            *(
                *small,
                f"data.mix=[{mix}]",
                f"data.eval={shapes_folder / 'validation'}",
                "train.steps=9",
                "train.global_batch=12",
            ),
            *("schedule.warmup_steps=2", "train.precision=float32", "scale.use_gpu=false", "data.augment=random_resized_crop"),
            *("eval.every_steps=null", "eval.probe_every_steps=9", "eval.whitebox_every_steps=null", "eval.log_every_steps=1"),
        ],
    )
    whole, in_parts = RunFolder(str(tmp_path / "whole")), RunFolder(str(tmp_path / "parts"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run_training(config, whole, LocalContext())
        assert run_training(config, in_parts, StopAfter()).state == "KILLED"
        assert run_training(config, in_parts, LocalContext(2)).state == "FINISHED"
    finally:
        torch.set_num_threads(threads)
    values = _series(read_records, whole)
    assert values == _series(read_records, in_parts)
    assert {key: values[9, key] for key in ("data/epoch", "data/epoch_0", "data/epoch_1")} == {
        "data/epoch": 108 / 108,
        "data/epoch_0": 72 / 96,
        "data/epoch_1": 36 / 12,
    }
    assert (9, "eval/knn_top1") in values


def _series(read_records: Callable, folder) -> dict[tuple[int, str], float]:
    keys = ("train/loss", "data/epoch", "eval/")
    return {(r.step, key): value for r in read_records(folder) for key, value in r.values.items() if key.startswith(keys)}
