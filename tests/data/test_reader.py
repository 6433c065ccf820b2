import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from fault_server import FaultServer

from crate_ray import storage
from crate_ray.config import ConfigError, MixPart
from crate_ray.data import build_index, load_index, open_reader, read_all, read_masks
from crate_ray.data.shards import pack_shard
from crate_ray.data.sources.shapes import draw

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")

CROPS = {"image_size": 16, "augment": "random_resized_crop", "noise_size": 9, "seed": 4, "lanes": 8, "window": 16}


def take(reader, count):
    with reader:
        return [next(reader) for _ in range(count)]


def real_rows(batch):
    kept = batch.weights_B > 0
    return batch.images_BCHW[kept], batch.labels_B[kept], batch.noise_BN[kept], batch.sample_ids_B[kept], batch.epochs_B[kept]


@pytest.fixture
def damaged(shapes_folder: Path, tmp_path: Path) -> Path:
    """The training shards, with one byte of sample 5 changed after they were indexed."""
    folder = tmp_path / "train"
    shutil.copytree(shapes_folder / "train", folder)
    row = load_index(str(folder)).samples.slice(5, 1).to_pylist()[0]
    shard = folder / row["shard"]
    data = bytearray(shard.read_bytes())
    data[row["offset"] + row["size"] // 2] ^= 1
    shard.write_bytes(data)
    return folder


@pytest.mark.parametrize("world_size", [2, 3, 7, 10])
def test_the_ranks_together_read_the_global_batch_whatever_their_number(shapes_folder, world_size):
    url = str(shapes_folder / "train")
    alone = take(open_reader(url, global_batch=10, num_loaders=0, **CROPS), 12)
    ranks = [
        take(open_reader(url, global_batch=10, rank=rank, world_size=world_size, num_loaders=rank % 3, **CROPS), 12)
        for rank in range(world_size)
    ]
    for step, whole in enumerate(alone):
        parts = [real_rows(rank[step]) for rank in ranks]
        for rejoined, expected in zip(zip(*parts, strict=True), real_rows(whole), strict=True):
            assert torch.equal(torch.cat(rejoined), expected)
        assert {len(rank[step].labels_B) for rank in ranks} == {-(-10 // world_size)}
        assert sum(float(rank[step].weights_B.sum()) for rank in ranks) == 10
        assert {rank[step].cursor_after for rank in ranks} == {10 * (step + 1)}


def test_a_resumed_reader_continues_exactly_also_with_other_ranks_and_threads(shapes_folder):
    url = str(shapes_folder / "train")
    whole = take(open_reader(url, global_batch=20, num_loaders=2, **CROPS), 9)
    with open_reader(url, global_batch=20, num_loaders=1, **CROPS) as reader:
        for _ in range(4):
            next(reader)
        state = reader.state_dict()
        assert state == {"cursor": 80}
        next(reader)
        reader.load_state_dict(state)
        assert torch.equal(next(reader).images_BCHW, whole[4].images_BCHW)
    resumed = take(open_reader(url, global_batch=20, cursor=state["cursor"], num_loaders=0, **CROPS), 5)
    for ours, expected in zip(resumed, whole[4:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(real_rows(ours), real_rows(expected), strict=True))


def test_every_epoch_holds_every_sample_once_with_fresh_crops_and_noise(shapes_folder):
    batches = take(open_reader(str(shapes_folder / "test"), global_batch=4, num_loaders=2, **CROPS), 6)
    ids = torch.cat([batch.sample_ids_B for batch in batches])
    epochs = torch.cat([batch.epochs_B for batch in batches])
    for epoch in (0, 1):
        assert sorted(ids[epochs == epoch].tolist()) == list(range(12))
    first, second = (
        next(
            (b.images_BCHW[row], b.noise_BN[row])
            for b in batches
            for row in range(4)
            if (b.sample_ids_B[row], b.epochs_B[row]) == (3, e)
        )
        for e in (0, 1)
    )
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_a_batch_may_be_larger_than_the_data_set(shapes_folder):
    (batch,) = take(open_reader(str(shapes_folder / "test"), global_batch=30, num_loaders=2, **CROPS), 1)
    assert np.bincount(batch.epochs_B).tolist() == [12, 12, 6]


def test_padding_repeats_a_row_without_weight(shapes_folder):
    (batch,) = take(open_reader(str(shapes_folder / "train"), global_batch=10, rank=0, world_size=3, num_loaders=0, **CROPS), 1)
    assert batch.weights_B.tolist() == [1, 1, 1, 0]
    assert torch.equal(batch.images_BCHW[3], batch.images_BCHW[0])
    assert torch.equal(batch.noise_BN[3], batch.noise_BN[0])


def test_a_plain_pass_reads_the_stored_pixels_in_index_order(shapes_folder):
    from torchvision.io import decode_png

    url = shapes_folder / "validation"
    index = load_index(str(url))
    batches = list(read_all(str(url), batch_size=5, image_size=24, num_loaders=2, noise_size=4))
    assert [len(batch.labels_B) for batch in batches] == [5, 5, 2]
    assert torch.cat([batch.sample_ids_B for batch in batches]).tolist() == list(range(12))
    assert torch.cat([batch.labels_B for batch in batches]).tolist() == index.labels.tolist()
    images = torch.cat([batch.images_BCHW for batch in batches])
    for row, image in zip(index.samples.to_pylist(), images, strict=True):
        data = (url / row["shard"]).read_bytes()[row["offset"] : row["offset"] + row["size"]]
        assert torch.equal(image, decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8)))
    (some,) = read_all(str(url), batch_size=9, image_size=24, sample_ids=[7, 2], num_loaders=0, noise_size=4)
    assert torch.equal(some.images_BCHW, images[[7, 2]])
    assert torch.equal(some.noise_BN, torch.cat([batch.noise_BN for batch in batches])[[7, 2]])


def test_a_damaged_sample_is_replaced_by_its_neighbour_and_nothing_else_moves(shapes_folder, damaged):
    options = {"global_batch": 12, "image_size": 24, "num_loaders": 2}
    whole = take(open_reader(str(shapes_folder / "train"), **options), 8)
    reader = open_reader(str(damaged), **options)
    found = take(reader, 8)
    assert reader.replaced_samples == 1
    for ours, expected in zip(found, whole, strict=True):
        same = expected.sample_ids_B != 5
        assert torch.equal(ours.sample_ids_B[same], expected.sample_ids_B[same])
        assert torch.equal(ours.images_BCHW[same], expected.images_BCHW[same])
        assert (ours.sample_ids_B[~same] == 6).all()
        assert (ours.labels_B[~same] == 6 % 10).all()


@pytest.mark.parametrize("num_loaders", [0, 2])
def test_a_damaged_sample_raises_in_the_consumer_with_its_place_when_asked_to(damaged, num_loaders):
    place = r"sample 'train-00000005' at byte \d+ of shard .*train-000000\.tar: its bytes do not have the hash"
    with (
        open_reader(str(damaged), global_batch=48, image_size=24, on_error="raise", num_loaders=num_loaders) as reader,
        pytest.raises(ConfigError, match=place),
    ):
        for _ in range(3):
            next(reader)
    with pytest.raises(ConfigError, match=place):
        list(read_all(str(damaged), batch_size=50, image_size=24, num_loaders=num_loaders))


def test_too_many_replacements_stop_the_run(shapes_folder, damaged):
    with (
        open_reader(str(damaged), global_batch=96, image_size=24, max_replaced_fraction=0) as reader,
        pytest.raises(ConfigError, match="1 of 96 samples could not be read"),
    ):
        next(reader)
    with open_reader(str(damaged), global_batch=96, image_size=24, max_replaced_fraction=0.001) as reader:
        for _ in range(8):
            next(reader)
        with pytest.raises(ConfigError, match="9 of 864 samples"):
            next(reader)


def test_bytes_that_no_decoder_takes_end_in_an_error_not_in_a_loop(tmp_path):
    (tmp_path / "a.tar").write_bytes(pack_shard([{"__key__": f"k{i}", "jpg": b"no image"} for i in range(30)]))
    build_index(str(tmp_path))
    with (
        open_reader(str(tmp_path), global_batch=2, image_size=8, num_loaders=1) as reader,
        pytest.raises(ConfigError, match="and the 15 samples after it cannot be read"),
    ):
        next(reader)


def test_a_shard_that_was_replaced_or_lost_is_refused(shapes_folder, tmp_path):
    folder = tmp_path / "train"
    shutil.copytree(shapes_folder / "train", folder)
    shard = folder / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with (
        open_reader(str(folder), global_batch=96, image_size=24) as reader,
        pytest.raises(ConfigError, match=r"train-000001\.tar has \d+ bytes, its index says"),
    ):
        next(reader)
    shard.unlink()
    with (
        open_reader(str(folder), global_batch=96, image_size=24) as reader,
        pytest.raises(ConfigError, match=r"train-000001\.tar is in the index but not there"),
    ):
        next(reader)


def test_remote_shards_are_indexed_and_read_by_range(shapes_folder, tmp_path, monkeypatch):
    """A path that is declared remote takes the code of an object store: pyarrow's file system opens both."""
    url = tmp_path / "train"
    shutil.copytree(shapes_folder / "train", url)
    local = take(open_reader(str(url), global_batch=96, num_loaders=0, **CROPS), 1)
    monkeypatch.setattr(storage, "is_local", lambda uri: False)
    assert build_index(str(url), num_classes=10).digest == load_index(str(shapes_folder / "train")).digest
    remote = take(open_reader(str(url), global_batch=96, num_loaders=3, **CROPS), 1)
    assert torch.equal(local[0].images_BCHW, remote[0].images_BCHW)
    (url / "train-000000.tar").unlink()
    with (
        open_reader(str(url), global_batch=96, image_size=24) as reader,
        pytest.raises(ConfigError, match="is in the index but not there"),
    ):
        next(reader)


@pytest.mark.parametrize("num_loaders", [0, 2])
def test_after_an_error_the_same_batch_is_tried_again(shapes_folder, damaged, num_loaders):
    whole = take(open_reader(str(shapes_folder / "train"), global_batch=96, image_size=24), 1)
    with open_reader(str(damaged), global_batch=96, image_size=24, on_error="raise", num_loaders=num_loaders) as reader:
        with pytest.raises(ConfigError, match="hash in the index"):
            next(reader)
        assert reader.state_dict() == {"cursor": 0}
        for shard in damaged.glob("*.tar"):
            with shard.open("r+b") as file:  # repaired in place, where the open map sees it
                file.write((shapes_folder / "train" / shard.name).read_bytes())
        assert torch.equal(next(reader).images_BCHW, whole[0].images_BCHW)


def test_a_stand_in_comes_from_the_data_set_of_the_sample(shapes_folder, tmp_path):
    parts = []
    for name in ("first", "second"):
        shutil.copytree(shapes_folder / "train", tmp_path / name)
        parts.append(MixPart(train=str(tmp_path / name)))
    last = load_index(parts[0].train).num_samples - 1
    row = load_index(parts[0].train).samples.slice(last, 1).to_pylist()[0]
    with (tmp_path / "first" / row["shard"]).open("r+b") as file:
        file.seek(row["offset"])
        file.write(b"damaged")
    (batch,) = read_all(parts, batch_size=1, image_size=24, sample_ids=[last], on_error="replace")
    assert batch.sample_ids_B.tolist() == [0]


def test_masks_are_cut_as_the_images_are(shapes_folder):
    url = str(shapes_folder / "train")
    masks = read_masks(url, [0, 11, 40], image_size=24)
    for mask, index in zip(masks, (0, 11, 40), strict=True):
        np.testing.assert_array_equal(mask, draw(index, seed=0, image_size=24, num_classes=10)[1] > 0)
    assert read_masks(url, [3], image_size=12).shape == (1, 12, 12)


def test_masks_of_data_without_any_are_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(pack_shard([{"__key__": "k", "jpg": b"1"}]))
    build_index(str(tmp_path))
    with pytest.raises(ConfigError, match="has no mask"):
        read_masks(str(tmp_path), [0], image_size=8)


def test_closing_leaves_no_thread_behind(shapes_folder):
    before = set(threading.enumerate())
    with open_reader(str(shapes_folder / "train"), global_batch=8, image_size=24, num_loaders=4) as reader:
        next(reader)
    passes = read_all(str(shapes_folder / "train"), batch_size=8, image_size=24, num_loaders=3)
    next(passes)
    passes.close()
    assert set(threading.enumerate()) == before


def test_values_out_of_range_are_refused_by_name(shapes_folder):
    url = str(shapes_folder / "train")
    with pytest.raises(ConfigError, match="global_batch=0"):
        open_reader(url, global_batch=0, image_size=24)
    with pytest.raises(ConfigError, match="9 workers cannot share a global batch of 8"):
        open_reader(url, global_batch=8, image_size=24, world_size=9)


def resident_mib() -> float:
    """Memory of this process that is in RAM and no page of a mapped file, MiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1024


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("cached", [False, True])
def test_memory_stays_flat_over_a_hundred_thousand_samples(shapes_folder, tmp_path, cached):
    """A thousand epochs; a kilobyte lost a batch of 64 would be 1.5 MiB, one lost a sample 88 MiB."""
    folder = shapes_folder / "train"
    with FaultServer({f"/train/{path.name}": path.read_bytes() for path in folder.iterdir()}) as server:
        url, options = (f"{server.url}/train", {"cache_dir": str(tmp_path)}) if cached else (str(folder), {})
        resident = []
        with open_reader(url, global_batch=64, num_loaders=2, **CROPS, **options) as reader:
            for batch in reader:
                if batch.cursor_after % 10_048 == 0:
                    resident.append(resident_mib())
                if batch.cursor_after >= 100_480:
                    break
    print(f"cached={cached}: MiB after every 10,048 samples: {[round(value, 1) for value in resident]}")
    assert len(resident) == 10
    assert resident[-1] - resident[1] < 8
