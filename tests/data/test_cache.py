"""The shard cache: one download a node, nothing evicted under a reader, and no process blocked by a dead one."""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fault_server import FaultServer
from xxhash import xxh3_128_hexdigest

from crate_ray.config import ConfigError, RunConfig
from crate_ray.data import build_index, load_index, open_reader
from crate_ray.data.cache import CacheClosedError, ShardCache
from crate_ray.data.index import ShardIndex, read_shard
from crate_ray.data.loaders import Prefetcher
from crate_ray.data.samples import SampleLoader, Transform
from crate_ray.data.shards import pack_shard
from crate_ray.storage import RemoteFile, StorageError, retry

SHARD_BYTES = 100_000
CONTENTS = {f"/shard-{number}.tar": bytes([number]) * SHARD_BYTES for number in range(6)}


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer(dict(CONTENTS)) as server:
        yield server


def fetch(cache: ShardCache, server: FaultServer, number: int) -> memoryview | None:
    path = f"/shard-{number}.tar"
    return cache.open(server.url + path, num_bytes=SHARD_BYTES, checksum=xxh3_128_hexdigest(CONTENTS[path]))


def files_in(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir() if path.suffix)


CHILD = """
import sys
from crate_ray.data.cache import ShardCache
folder, uri, num_bytes, checksum = sys.argv[1:]
print("ready", flush=True)
data = ShardCache(folder, max_bytes=10**9).open(uri, num_bytes=int(num_bytes), checksum=checksum)
print(len(data), flush=True)
"""


def child(folder: Path, server: FaultServer, number: int) -> "subprocess.Popen[str]":
    path = f"/shard-{number}.tar"
    arguments = [str(folder), server.url + path, str(SHARD_BYTES), xxh3_128_hexdigest(CONTENTS[path])]
    return subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True)


def test_many_readers_at_once_download_a_shard_once(tmp_path: Path, server: FaultServer) -> None:
    server.fail("slow", times=1, number=500_000)
    caches = [ShardCache(str(tmp_path), max_bytes=10**6) for _ in range(8)]
    found: list[memoryview | None] = [None] * len(caches)

    def run(position: int) -> None:
        found[position] = fetch(caches[position], server, 3)

    threads = [threading.Thread(target=run, args=(position,)) for position in range(len(caches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert all(data == CONTENTS["/shard-3.tar"] for data in found)
    assert server.count() == 1
    assert files_in(tmp_path) == [".tar"]


@pytest.mark.slow
def test_many_processes_at_once_download_a_shard_once(tmp_path: Path, server: FaultServer) -> None:
    server.fail("slow", times=1, number=20_000)
    children = [child(tmp_path, server, 2) for _ in range(4)]
    assert [process.communicate(timeout=60)[0].split() for process in children] == [["ready", str(SHARD_BYTES)]] * 4
    assert server.count() == 1


def test_a_killed_downloader_blocks_nobody(tmp_path: Path, server: FaultServer) -> None:
    server.fail("stall", times=1)
    process = child(tmp_path, server, 1)
    deadline = time.monotonic() + 60
    while not server.count() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert files_in(tmp_path) == [".part"]
    found: list[memoryview | None] = []
    waiter = threading.Thread(target=lambda: found.append(fetch(ShardCache(str(tmp_path), max_bytes=10**6), server, 1)))
    waiter.start()
    waiter.join(0.3)
    assert waiter.is_alive()
    assert not found
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)
    waiter.join(10)
    assert found == [CONTENTS["/shard-1.tar"]]
    assert files_in(tmp_path) == [".tar"]


def test_the_least_recently_opened_leave_first(tmp_path: Path, server: FaultServer) -> None:
    cache = ShardCache(str(tmp_path), max_bytes=3 * SHARD_BYTES)
    for number in (0, 1, 2, 0, 3):  # 1 is the oldest when 3 comes
        assert fetch(cache, server, number) == CONTENTS[f"/shard-{number}.tar"]
    assert server.count() == 4
    for number, downloads in ((0, 4), (2, 4), (3, 4), (1, 5)):
        fetch(cache, server, number)
        assert server.count() == downloads
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3 * SHARD_BYTES


def test_a_mapped_shard_is_never_evicted_and_counts(tmp_path: Path, server: FaultServer) -> None:
    cache = ShardCache(str(tmp_path), max_bytes=2 * SHARD_BYTES)
    first, second = fetch(cache, server, 0), fetch(cache, server, 1)
    assert fetch(ShardCache(str(tmp_path), max_bytes=2 * SHARD_BYTES), server, 2) is None
    assert files_in(tmp_path) == [".tar", ".tar"]
    assert first is not None
    piece = first[10:20]
    first.release()
    assert fetch(cache, server, 2) is None  # a slice keeps the map
    piece.release()
    del first, piece
    third = fetch(cache, server, 2)
    assert third == CONTENTS["/shard-2.tar"]
    assert second == CONTENTS["/shard-1.tar"]


def test_a_shard_larger_than_the_cache_has_no_room(tmp_path: Path, server: FaultServer) -> None:
    assert fetch(ShardCache(str(tmp_path), max_bytes=SHARD_BYTES - 1), server, 0) is None
    assert files_in(tmp_path) == []


def test_a_changed_shard_is_not_mistaken_for_the_old_one(tmp_path: Path, server: FaultServer) -> None:
    cache = ShardCache(str(tmp_path), max_bytes=10**6)
    fetch(cache, server, 0)
    server.etag_salt = "the same bytes, put there again"
    assert fetch(cache, server, 0) == CONTENTS["/shard-0.tar"]
    assert server.count() == 2
    server.files["/shard-0.tar"] = b"other" * (SHARD_BYTES // 5)
    with pytest.raises(ConfigError, match=r"shard http://\S+/shard-0\.tar has changed .*its checksum is \w+, its index says"):
        fetch(cache, server, 0)
    server.files["/shard-0.tar"] = bytes(SHARD_BYTES + 1)
    with pytest.raises(ConfigError, match=r"shard-0\.tar has changed .*it has 100001 bytes, its index says 100000"):
        fetch(cache, server, 0)
    assert files_in(tmp_path) == [".tar", ".tar"]


def test_a_cached_file_that_lost_bytes_is_fetched_again(tmp_path: Path, server: FaultServer) -> None:
    cache = ShardCache(str(tmp_path), max_bytes=10**6)
    fetch(cache, server, 0)
    next(tmp_path.glob("*.tar")).write_bytes(b"cut")
    assert fetch(cache, server, 0) == CONTENTS["/shard-0.tar"]


def test_what_a_dead_process_left_behind_is_cleared_away(tmp_path: Path, server: FaultServer) -> None:
    (tmp_path / "dead.part").write_bytes(bytes(5 * SHARD_BYTES))
    assert fetch(ShardCache(str(tmp_path), max_bytes=SHARD_BYTES), server, 0) == CONTENTS["/shard-0.tar"]
    assert files_in(tmp_path) == [".tar"]


def test_a_download_that_fails_leaves_nothing(tmp_path: Path, server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "DEADLINE_S", 0.1)
    server.fail("cut", number=50_000)
    with pytest.raises(StorageError, match=r"cannot read bytes 0 to 100000 of http://\S+/shard-0\.tar"):
        fetch(ShardCache(str(tmp_path), max_bytes=10**6), server, 0)
    assert files_in(tmp_path) == []


def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path: Path, server: FaultServer) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SHARD_BYTES // 2, hard))  # the kernel refuses what goes past it
    try:
        with pytest.raises(
            ConfigError, match=r"data\.cache_dir=\S+ cannot hold http://\S+ \(.*File too large.*lower data\.cache_b"
        ):
            fetch(ShardCache(str(tmp_path), max_bytes=10**6), server, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files_in(tmp_path) == []


def test_closing_ends_the_wait_for_another_process(tmp_path: Path, server: FaultServer) -> None:
    server.fail("stall", times=1)
    first, second = ShardCache(str(tmp_path), max_bytes=10**6), ShardCache(str(tmp_path), max_bytes=10**6)
    downloader = threading.Thread(target=lambda: fetch(first, server, 0))
    downloader.start()
    while not server.count():
        time.sleep(0.01)
    threading.Timer(0.1, second.close).start()
    with pytest.raises(CacheClosedError):
        fetch(second, server, 0)
    server.release()
    downloader.join(10)
    assert not downloader.is_alive()


def test_a_cache_on_another_machine_or_in_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.cache_dir=s3://bucket/x is not on this machine"):
        ShardCache("s3://bucket/x", max_bytes=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache_dir=.*/file cannot be made"):
        ShardCache(str(tmp_path / "file"), max_bytes=1)


def test_the_cache_of_a_run_is_named_absolutely() -> None:
    with pytest.raises(ConfigError, match=r"data\.cache_dir.*absolute"):
        RunConfig.load("digits_crate_mae", ["data.cache_dir=cache"])
    assert RunConfig.load("digits_crate_mae", ["data.cache_dir=/scratch/x"]).data.cache_bytes == 64 * 2**30


@pytest.fixture
def served_shapes(shapes_folder: Path) -> Iterator[tuple[FaultServer, str]]:
    with FaultServer({f"/train/{path.name}": path.read_bytes() for path in (shapes_folder / "train").iterdir()}) as server:
        yield server, f"{server.url}/train"


def read(url: str, *, batches: int = 6, **options: object) -> torch.Tensor:
    with open_reader(url, global_batch=16, image_size=24, window=8, lanes=2, **options) as reader:
        return torch.cat([next(reader).images_BCHW for _ in range(batches)])


def test_two_epochs_of_four_ranks_cost_one_download_of_each_shard(shapes_folder, served_shapes, tmp_path):
    server, url = served_shapes
    options = {"batches": 12, "world_size": 4, "cache_dir": str(tmp_path)}
    for rank in range(4):
        local = read(str(shapes_folder / "train"), batches=12, world_size=4, rank=rank)
        assert torch.equal(read(url, rank=rank, **options), local)
    assert server.count() == 2


def test_shards_are_fetched_before_their_samples_are_asked_for(served_shapes, tmp_path):
    server, url = served_shapes
    with open_reader(url, global_batch=16, image_size=24, cache_dir=str(tmp_path), num_loaders=0) as reader:
        next(reader)
        deadline = time.monotonic() + 10
        while server.count() < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
    assert server.count() == 2


@pytest.mark.parametrize("shards_that_fit", [0, 1])
def test_a_cache_too_small_for_what_is_read_warns_once_and_reads_by_range(
    shapes_folder, served_shapes, tmp_path, caplog, shards_that_fit
):
    server, url = served_shapes
    size = max(len(data) for path, data in server.files.items() if path.endswith(".tar"))
    cache_bytes = shards_that_fit * size + 1
    images = read(url, cache_dir=str(tmp_path), cache_bytes=cache_bytes)
    assert torch.equal(images, read(str(shapes_folder / "train")))
    assert caplog.text.count("data.cache_bytes") == 1
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= cache_bytes
    assert any(made[2] is not None and made[2] != f"bytes=0-{size - 1}" for made in server.requests)


def test_a_chunk_of_which_the_disk_takes_a_part_at_a_time_is_written_whole(tmp_path, server, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:30_000], offset))
    server.files["/shard-0.tar"] = data = bytes(range(250)) * (SHARD_BYTES // 250)
    cache = ShardCache(str(tmp_path), max_bytes=10**6)
    uri = f"{server.url}/shard-0.tar"
    assert cache.open(uri, num_bytes=SHARD_BYTES, checksum=xxh3_128_hexdigest(data)) == data


def test_a_store_that_denies_is_not_taken_for_a_disk_that_is_full(tmp_path, server, monkeypatch):
    def denied(_: RemoteFile) -> Iterator[bytes]:
        raise PermissionError(errno.EACCES, "denied by the store")

    monkeypatch.setattr(RemoteFile, "chunks", denied)
    with pytest.raises(PermissionError, match="denied by the store"):
        fetch(ShardCache(str(tmp_path), max_bytes=10**6), server, 0)
    assert files_in(tmp_path) == []


def test_a_shard_waits_once_for_room_however_often_it_is_announced():
    asked, closing = [], threading.Event()

    def fetch_one(number: int) -> bool:
        asked.append(number)
        closing.wait(10)
        return True

    prefetcher = Prefetcher(fetch_one)
    prefetcher.add([0, 1])
    while len(asked) < 2:  # both threads are at work, so what follows stays queued
        time.sleep(0.01)
    for _ in range(3):
        prefetcher.add([2, 3])
    closing.set()
    deadline = time.monotonic() + 5
    while len(asked) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    prefetcher.close()
    assert sorted(asked) == [0, 1, 2, 3]


def test_a_damaged_cache_file_is_dropped_and_the_store_is_not_blamed(shapes_folder, served_shapes, tmp_path, caplog):
    server, url = served_shapes
    expected = read(str(shapes_folder / "train"))
    assert torch.equal(read(url, cache_dir=str(tmp_path)), expected)
    files = sorted(tmp_path.glob("*.tar"))
    for file in files:
        data = bytearray(file.read_bytes())
        for row in load_index(str(shapes_folder / "train")).samples.to_pylist():
            data[row["offset"] + row["size"] // 2] ^= 1
        file.write_bytes(data)
    assert torch.equal(read(url, cache_dir=str(tmp_path), on_error="raise"), expected)
    assert all(f"the cached shard {file} is damaged at byte" in caplog.text for file in files)
    assert torch.equal(read(url, cache_dir=str(tmp_path)), expected)
    assert {xxh3_128_hexdigest(file.read_bytes()) for file in tmp_path.glob("*.tar")} == {
        xxh3_128_hexdigest(data) for path, data in server.files.items() if path.endswith(".tar")
    }


@pytest.fixture
def nine_shards(shapes_folder: Path, tmp_path: Path) -> Iterator[tuple[FaultServer, ShardIndex]]:
    """A server of nine shards of one sample each, and their index."""
    image = read_shard(str(shapes_folder / "train" / "train-000000.tar"))
    row = load_index(str(shapes_folder / "train")).samples.slice(0, 1).to_pylist()[0]
    member = {row["extension"]: bytes(image[row["offset"] : row["offset"] + row["size"]])}
    folder = tmp_path / "nine"
    folder.mkdir()
    for number in range(9):
        (folder / f"{number}.tar").write_bytes(pack_shard([{"__key__": str(number), **member}]))
    build_index(str(folder))
    with FaultServer({f"/nine/{path.name}": path.read_bytes() for path in folder.iterdir()}) as server:
        yield server, load_index(f"{server.url}/nine")


def open_maps(folder: Path) -> int:
    """Shards of a folder that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(str(folder) in line and line.endswith(".tar") for line in lines)


def test_open_shards_are_bounded_and_those_that_are_announced_stay(nine_shards, tmp_path, monkeypatch):
    server, index = nine_shards
    monkeypatch.setattr(resource, "getrlimit", lambda _: (16, 16))  # a quarter of them for shards
    folder = tmp_path / "cache"
    cache = ShardCache(str(folder), max_bytes=10**9)
    loader = SampleLoader(index, Transform(24), replace=False, cache=cache)
    loader.expect(np.arange(9))
    deadline = time.monotonic() + 10
    while open_maps(folder) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert 4 <= open_maps(folder) <= 5  # both threads may have found room for one
    for sample_id in range(9):
        loader.read(sample_id)
        loader.done(np.asarray([sample_id]))
        assert open_maps(folder) <= 6
    loader.expect(np.arange(3))
    for sample_id in range(3):
        loader.read(sample_id)
    for sample_id in range(3, 9):
        loader.read(sample_id)
    opened = server.count("HEAD")
    for sample_id in range(3):
        loader.read(sample_id)
    assert server.count("HEAD") == opened
    loader.close()


def test_a_reader_that_is_repositioned_for_every_batch_fetches_what_it_reads(served_shapes, shapes_folder, tmp_path):
    server, url = served_shapes
    options = {"global_batch": 16, "image_size": 24, "num_loaders": 0, "lanes": 1, "window": 8}
    with (
        open_reader(url, **options, cache_dir=str(tmp_path), fetch_ahead=False) as reader,
        open_reader(str(shapes_folder / "train"), **options) as local,
    ):
        for cursor in (16, 0, 32, 16):
            for each in (reader, local):
                each.load_state_dict({"cursor": cursor})
            assert torch.equal(next(reader).images_BCHW, next(local).images_BCHW)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("crate-ray-prefetch")]
    assert server.count() <= 2
