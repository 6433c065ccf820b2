"""Faults of remote stores: every one ends in the right bytes, or in an error that names shard, key and offset.

A web server and a proxy before an S3 server make the faults; the reader meets them by range and through the cache.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fault_server import FaultServer

from crate_ray import storage
from crate_ray.config import ConfigError
from crate_ray.data import build_index, load_index, open_reader, read_all
from crate_ray.data.reader import LoaderTimeoutError
from crate_ray.storage import StorageError, retry, web
from crate_ray.storage import remote as remote_files

WAYS = [(store, cached) for store in ("http", "s3") for cached in (False, True)]
WAY_NAMES = [f"{store}-{'cache' if cached else 'ranges'}" for store, cached in WAYS]
PLACE = r"sample 'train-\d+' at byte \d+ of shard \w+://.*train-00000\d\.tar\S*"

Open = Callable[..., list[torch.Tensor]]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(remote_files, "_S3_ATTEMPTS", 1)  # the store's own retries take seconds
    remote_files._store.cache_clear()
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(retry, "DEADLINE_S", 8.0)
    monkeypatch.setattr("crate_ray.data.loaders._CLOSE_S", 0.5)
    yield
    remote_files._store.cache_clear()


@pytest.fixture(scope="module")
def proxied(bucket: str, shapes_folder: Path) -> Iterator[tuple[FaultServer, str]]:
    """A proxy before the S3 server, and the URL of the training shards through it."""
    base, _, query = bucket.partition("?")
    upstream = re.search(r"endpoint_override=([\d.]+)%3A(\d+)", query)
    assert upstream is not None
    for path in (shapes_folder / "train").iterdir():
        storage.write_atomic(storage.join(bucket, "faults", path.name), path.read_bytes())
    with FaultServer(upstream=f"{upstream[1]}:{upstream[2]}") as server:
        host, port = server.host.split(":")
        yield server, f"{base}/faults?endpoint_override={host}%3A{port}&scheme=http&region=us-east-1"


@pytest.fixture(params=WAYS, ids=WAY_NAMES)
def remote(
    request: pytest.FixtureRequest, shapes_folder: Path, tmp_path: Path
) -> Iterator[tuple[FaultServer, str, dict[str, object]]]:
    """A server, the URL of the shards on it, and how the reader is to read them."""
    store, cached = request.param
    options: dict[str, object] = {"cache_dir": str(tmp_path / "cache")} if cached else {}
    if store == "s3":
        server, url = request.getfixturevalue("proxied")
        server.rules.clear()
        server.requests.clear()
        yield server, url, options
        server.rules.clear()
        return
    files = {f"/train/{path.name}": path.read_bytes() for path in (shapes_folder / "train").iterdir()}
    with FaultServer(files) as server:
        yield server, f"{server.url}/train", options


def read_epoch(url: str, **options: object) -> torch.Tensor:
    """The first images of the order, from both shards, by two threads."""
    with open_reader(url, global_batch=16, image_size=24, num_loaders=2, prefetch=1, **options) as reader:
        return next(reader).images_BCHW


def middle_of_a_member(folder: Path) -> int:
    row = load_index(str(folder / "train")).samples.slice(3, 1).to_pylist()[0]
    return int(row["offset"] + row["size"] // 2)


@pytest.mark.parametrize(
    "fault",
    [
        *("none", "503", "reset", "cut in a member", "cut at a boundary", "slow"),
        *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("500", "429", "cut to nothing")),
    ],
)
def test_a_fault_that_passes_costs_time_and_no_bytes(remote, shapes_folder, fault):
    server, url, options = remote
    kind, number = fault.split()[0], 0
    if kind == "cut":
        number = {"cut in a member": middle_of_a_member(shapes_folder), "cut at a boundary": 1024, "cut to nothing": 0}[fault]
        number = number if options else min(number, 100)
    if kind != "none":
        server.fail(kind, times=8 if url.startswith("s3") else 3, number=2_000_000 if kind == "slow" else number)
    assert torch.equal(read_epoch(url, **options), read_epoch(str(shapes_folder / "train")))
    assert server.count() > 0


@pytest.mark.parametrize("remote", WAYS[:2], ids=WAY_NAMES[:2], indirect=True)
def test_a_body_of_unstated_length_that_ends_at_a_member_boundary_is_noticed(remote, shapes_folder):
    """The case in which tar readers over a pipe lose the rest of the shard without a word."""
    server, url, options = remote
    server.fail("short", times=2, number=1024 if options else 10)
    assert torch.equal(read_epoch(url, **options), read_epoch(str(shapes_folder / "train")))


@pytest.mark.parametrize("fault", ["503", "cut", pytest.param("reset", marks=pytest.mark.slow)])
def test_a_fault_that_stays_names_the_sample_and_the_last_fault(remote, fault, monkeypatch):
    monkeypatch.setattr(retry, "DEADLINE_S", 0.3)
    server, url, options = remote
    server.fail(fault, number=10)
    with pytest.raises(StorageError, match=PLACE + r": cannot (open|read) .* attempts? in [\d.]+ s, the last fault: "):
        read_epoch(url, **options)


@pytest.mark.parametrize("status", ["403", "404"])
def test_a_refusal_is_one_error_at_once(remote, status):
    server, url, options = remote
    server.fail(status, methods="GET HEAD")
    started = time.monotonic()
    with pytest.raises((StorageError, ConfigError), match=r"train-00000\d\.tar") as caught:
        read_epoch(url, **options)
    assert time.monotonic() - started < 5
    assert server.count("HEAD") + server.count("GET") <= 12  # two threads and two prefetching ones; no retry
    expected = "check the credentials" if status == "403" else "is in the index but not there"
    assert expected in str(caught.value)
    assert re.match(PLACE, str(caught.value))


def test_a_server_that_ignores_ranges_gives_the_right_bytes_or_an_error(remote, shapes_folder, caplog, monkeypatch):
    monkeypatch.setattr(retry, "DEADLINE_S", 0.3)
    server, url, options = remote
    server.fail("whole")
    if url.startswith("s3") and not options:
        with pytest.raises(StorageError, match=PLACE):
            read_epoch(url)
        return
    assert torch.equal(read_epoch(url, **options), read_epoch(str(shapes_folder / "train")))
    if options:
        assert server.count() == 2  # one for each shard
    else:
        assert caplog.text.count("ignores ranges") == 1


def test_a_stalled_server_is_named_with_its_thread_after_the_timeout(remote):
    server, url, options = remote
    server.fail("stall")
    reader = open_reader(url, global_batch=48, image_size=24, num_loaders=2, loader_timeout_s=0.5, **options)
    started = time.monotonic()
    expected = r"no batch within data\.loader_timeout_s=0\.5: crate-ray-loader-\d has been on " + PLACE + r" for \d\.\d s"
    with pytest.raises(LoaderTimeoutError, match=expected):
        next(reader)
    assert reader.state_dict() == {"cursor": 0}
    reader.close()
    assert time.monotonic() - started < 5
    server.release()


def test_an_evaluation_pass_is_bounded_in_time_too(shapes_folder):
    files = {f"/train/{path.name}": path.read_bytes() for path in (shapes_folder / "train").iterdir()}
    with FaultServer(files) as server:
        server.fail("stall")
        with pytest.raises(LoaderTimeoutError, match=PLACE):
            next(read_all(f"{server.url}/train", batch_size=8, image_size=24, loader_timeout_s=0.3))


@pytest.mark.parametrize("remote", WAYS[:2], ids=WAY_NAMES[:2], indirect=True)
def test_a_silent_web_server_is_a_fault_that_is_tried_again(remote, shapes_folder, monkeypatch):
    monkeypatch.setattr(web, "READ_TIMEOUT_S", 0.3)
    web._filesystem.cache_clear()
    server, url, options = remote
    server.fail("stall", times=2)
    assert torch.equal(read_epoch(url, **options), read_epoch(str(shapes_folder / "train")))
    web._filesystem.cache_clear()


def test_a_shard_of_another_size_is_refused_by_name(remote, shapes_folder):
    server, url, options = remote
    if url.startswith("s3"):
        url = url.replace("/faults", "/longer")
        for path in (shapes_folder / "train").iterdir():
            storage.write_atomic(storage.join(url, path.name), path.read_bytes() + bytes(512 if path.suffix == ".tar" else 0))
    else:
        server.files = {at: data + bytes(512 if at.endswith(".tar") else 0) for at, data in server.files.items()}
    with pytest.raises(ConfigError, match=PLACE + r": shard \S+train-00000\d\.tar\S* has .*its index says"):
        read_epoch(url, **options)


@pytest.mark.parametrize("fault", ["503", "reset", "cut in a member", "cut at a boundary"])
def test_indexing_a_bucket_survives_faults(proxied, shapes_folder, fault):
    server, url = proxied
    server.rules.clear()
    kind = fault.split()[0]
    server.fail(kind, times=4, number=1024 if "boundary" in fault else middle_of_a_member(shapes_folder))
    assert build_index(url, num_classes=10).digest == load_index(str(shapes_folder / "train")).digest
    server.rules.clear()


@pytest.mark.parametrize("kind", ["503", pytest.param("reset", marks=pytest.mark.slow)])
def test_a_write_that_meets_faults_is_whole_in_the_end_or_not_there(proxied, kind, monkeypatch):
    server, url = proxied
    server.rules.clear()
    uri = storage.join(url, f"written-{kind}.bin")
    content = bytes(range(256)) * 4_000
    for method in ("POST", "PUT"):
        server.fail(kind, times=4, path=".bin", methods=method)
    storage.write_atomic(uri, content)
    assert storage.read_bytes(uri) == content
    monkeypatch.setattr(retry, "DEADLINE_S", 0.3)
    never = storage.join(url, f"never-{kind}.bin")
    server.fail(kind, path=".bin", methods="PUT")
    with pytest.raises(StorageError, match=r"cannot write s3://.*never-.* attempts? in"):
        storage.write_atomic(never, content)
    server.rules.clear()
    assert not storage.exists(never)


def test_no_thread_of_a_reader_outlives_its_stalled_server(shapes_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "DEADLINE_S", 0.3)
    before = set(threading.enumerate())
    files = {f"/train/{path.name}": path.read_bytes() for path in (shapes_folder / "train").iterdir()}
    with FaultServer(files) as server:
        server.fail("stall")
        with (
            open_reader(
                f"{server.url}/train", global_batch=8, image_size=24, loader_timeout_s=0.2, cache_dir=str(tmp_path)
            ) as reader,
            pytest.raises(LoaderTimeoutError),
        ):
            next(reader)
    deadline = time.monotonic() + 10
    ours = set()
    while time.monotonic() < deadline:
        ours = {thread for thread in set(threading.enumerate()) - before if thread.name.startswith("crate-ray")}
        if not ours:
            break
        time.sleep(0.05)
    assert not ours
