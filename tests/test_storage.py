"""Files by URI: whole or not there, and no scheme that runs anything."""

import re
import resource
from pathlib import Path

import pytest
from pyarrow import fs

from crate_ray import storage
from crate_ray.config import ConfigError
from crate_ray.storage import retry


def test_what_is_written_is_read_back_and_folders_come_by_themselves(tmp_path: Path) -> None:
    uri = storage.join(str(tmp_path), "a", "b", "file.txt")
    storage.write_atomic(uri, "première\n")
    assert storage.read_text(uri) == "première\n"
    assert storage.size(uri) == len("première\n".encode())
    with storage.open_input(f"file://{uri}") as source:
        source.seek(5)
        assert source.read(2) == "è".encode()


def test_a_write_that_fails_half_way_leaves_the_old_content_and_no_debris(tmp_path: Path) -> None:
    uri = str(tmp_path / "status.json")
    storage.write_atomic(uri, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))  # the kernel refuses what goes past it, as a full disk does
    try:
        with pytest.raises(OSError, match="File too large"):
            storage.write_atomic(uri, b"new" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert storage.read_bytes(uri) == b"old"
    assert storage.list_dir(str(tmp_path)) == ["status.json"]


@pytest.mark.parametrize(
    ("uri", "parts", "joined"),
    [
        ("/runs", ("a", "b.txt"), "/runs/a/b.txt"),
        ("/runs/", ("/a/", "b"), "/runs/a/b"),
        ("/", ("a",), "/a"),
        ("s3://bucket/runs/", ("a",), "s3://bucket/runs/a"),
        ("relative", ("a",), "relative/a"),
    ],
)
def test_join_puts_single_slashes(uri: str, parts: tuple[str, ...], joined: str) -> None:
    assert storage.join(uri, *parts) == joined


def test_a_local_uri_is_made_absolute_and_a_remote_one_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/../x") == str(tmp_path / "x")
    assert storage.absolute("s3://bucket/runs/") == "s3://bucket/runs"


@pytest.mark.parametrize("uri", ["/a", "a", "file:///a"])
def test_paths_are_local(uri: str) -> None:
    assert storage.is_local(uri)


def test_an_object_store_is_not_local_and_has_no_path() -> None:
    assert not storage.is_local("s3://bucket/key")
    with pytest.raises(ValueError, match="not on the local disk"):
        storage.local_path("s3://bucket/key")


@pytest.mark.parametrize("uri", ["pipe:cat shard.tar", "pipe:curl http://x | tar x", "pipe://cat", "ftp://x/y"])
def test_a_scheme_that_is_not_a_store_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"never done|not supported"):
        storage.read_bytes(uri)


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("s3://bucket/a%20b/c?region=us-east-1&endpoint_override=127.0.0.1%3A1", "bucket/a b/c"),
        ("s3://bucket?region=us-east-1&endpoint_override=127.0.0.1%3A1", "bucket"),
        ("abfss://container@account.dfs.core.windows.net/a/b/", "container/a/b"),
        ("abfs://account.blob.core.windows.net/container/a", "container/a"),
        ("gs://bucket/a", "bucket/a"),
    ],
)
def test_paths_in_a_store_are_those_of_pyarrow(uri: str, path: str) -> None:
    assert storage.open_store(uri)[1] == path == fs.FileSystem.from_uri(uri)[1].rstrip("/")
    assert storage.open_store(uri)[0] is storage.open_store(uri)[0]


def test_a_listing_is_sorted_and_that_of_a_missing_folder_is_empty(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        storage.write_atomic(str(tmp_path / name), b"")
    assert storage.list_dir(str(tmp_path)) == ["a", "b", "c"]
    assert storage.list_dir(str(tmp_path / "missing")) == []


def test_deleting_takes_files_and_whole_folders_and_forgives_missing_ones(tmp_path: Path) -> None:
    storage.write_atomic(str(tmp_path / "folder" / "deep" / "file"), b"x")
    storage.write_atomic(str(tmp_path / "file"), b"x")
    for name in ("folder", "file", "missing"):
        storage.delete(str(tmp_path / name))
    assert storage.list_dir(str(tmp_path)) == []


def test_missing_files_are_missing_in_every_way_of_asking(tmp_path: Path) -> None:
    uri = str(tmp_path / "missing")
    assert not storage.exists(uri)
    for ask in (storage.read_bytes, storage.size, storage.open_input):
        with pytest.raises(FileNotFoundError):
            ask(uri)


def test_a_folder_that_can_be_written_passes_the_check_and_stays_clean(tmp_path: Path) -> None:
    storage.check_writable(str(tmp_path / "new"))
    assert storage.list_dir(str(tmp_path / "new")) == []


def test_a_folder_that_cannot_be_written_is_refused_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file where a folder is needed")
    with pytest.raises(ConfigError, match=r"storage\.path = .*file/runs' cannot be written"):
        storage.check_writable(str(tmp_path / "file" / "runs"))


def test_a_query_stays_behind_the_path() -> None:
    assert storage.join("s3://bucket/runs?region=eu-west-1", "a", "b") == "s3://bucket/runs/a/b?region=eu-west-1"
    assert storage.join("/what?/runs", "a") == "/what?/runs/a"


class Flaky:
    """An action that fails a number of times; it counts its calls."""

    def __init__(self, error: OSError, times: int) -> None:
        self.error, self.times, self.calls = error, times, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return "done"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, taken in no time: the clock goes on by as much as was asked for."""
    taken: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", taken.append)
    monkeypatch.setattr(retry.time, "monotonic", lambda: sum(taken))
    return taken


def test_waits_double_within_their_jitter_up_to_the_longest(waits: list[float]) -> None:
    assert retry.retrying(Flaky(OSError("reset by peer"), 9), "read x") == "done"
    for attempt, wait in enumerate(waits):
        whole = min(15.0, 0.25 * 2**attempt)
        assert whole / 2 <= wait <= whole
    assert len(waits) == 9


def test_the_deadline_ends_it_with_uri_attempts_seconds_and_the_last_fault(waits: list[float]) -> None:
    flaky = Flaky(OSError("AWS Error SLOW_DOWN (HTTP status 503) during GetObject"), 10**6)
    with pytest.raises(
        storage.StorageError, match=r"cannot read s3://b/k: \d+ attempts in [\d.]+ s, the last fault: AWS .*503"
    ):
        retry.retrying(flaky, "read s3://b/k")
    assert 120 - 15 <= sum(waits) <= 120
    with storage.retry_deadline(0), pytest.raises(storage.StorageError, match=r": 1 attempt in 0\.0 s"):
        retry.retrying(flaky, "read s3://b/k")


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("k"),
        PermissionError("k"),
        OSError("AWS Error ACCESS_DENIED during HeadObject operation: No response body."),
        OSError("AWS Error NO_SUCH_BUCKET during CreateMultipartUpload operation"),
        OSError("Bucket 'b' not found. To create buckets, enable the allow_bucket_creation option."),
        OSError("google::cloud::Status(PERMISSION_DENIED: denied)"),
        OSError("ClientConnectorCertificateError: certificate verify failed"),
        OSError("curlCode: 60, SSL peer certificate or SSH remote key was not OK"),
        OSError("InvalidUrlClientError: http://"),
        *(OSError(f"HTTP status {status}") for status in (301, 400, 401, 403, 404, 410, 412, 416, 501)),
    ],
    ids=str,
)
def test_what_cannot_pass_is_raised_at_once(error: OSError, waits: list[float]) -> None:
    flaky = Flaky(error, 10**6)
    with pytest.raises(OSError, match=re.escape(str(error))):
        retry.retrying(flaky, "read x")
    assert flaky.calls == 1
    assert waits == []


@pytest.mark.parametrize(
    "text",
    [
        *(f"HTTP status {code}" for code in (408, 425, 429, 500, 502, 503, 504)),
        "curlCode: 28",
        "AWS Error UNKNOWN (HTTP status 400) during GetObject operation: Unable to parse ExceptionName: RequestTimeout",
        "AWS Error THROTTLING (HTTP status 400) during GetObject operation",
        "AWS Error UNKNOWN (HTTP status 409) during PutObject operation: OperationAborted",
    ],
)
def test_what_may_pass_is_tried_again(text: str, waits: list[float]) -> None:
    assert retry.retrying(Flaky(OSError(text), 3), "read x") == "done"
    assert len(waits) == 3
