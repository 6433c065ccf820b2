"""Shards on a web server: what is found, what is refused, and that no secret is ever shown."""

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_server import FaultServer

from crate_ray import storage
from crate_ray.config import ConfigError
from crate_ray.data import load_index, read_all
from crate_ray.storage import StorageError, retry, web

SECRET = "planted-9f2c71"


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer({"/a/file.txt": b"0123456789"}) as server:
        yield server


def test_a_file_on_the_web_is_found_measured_and_read(server: FaultServer) -> None:
    uri = f"{server.url}/a/file.txt"
    assert storage.exists(uri)
    assert not storage.is_dir(uri)
    assert storage.size(uri) == 10
    assert storage.read_bytes(uri) == b"0123456789"
    with storage.open_input(uri) as source:
        source.seek(4)
        assert source.read(3) == b"456"
        assert source.read() == b"789"
        assert source.size() == 10
    remote = storage.RemoteFile(uri)
    assert remote.read_at(5, 8) == b"89"
    assert remote.read_at(5, 10) == b""
    assert b"".join(remote.chunks(3)) == b"0123456789"


def test_a_file_of_unstated_length_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "stat", lambda uri: (None, ""))
    for ask in (storage.size, storage.RemoteFile):
        with pytest.raises(ConfigError, match=r"http://host/x\.tar: the server does not say how long it is"):
            ask("http://host/x.tar")


def test_what_is_missing_is_missing_at_once(server: FaultServer) -> None:
    uri = f"{server.url}/a/none"
    started = time.monotonic()
    assert not storage.exists(uri)
    for ask in (storage.read_bytes, storage.size, storage.open_input, storage.RemoteFile):
        with pytest.raises(FileNotFoundError):
            ask(uri)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_not_taken_for_a_missing_file(server: FaultServer, status: int) -> None:
    """fsspec's own `info` says "not found" for every fault."""
    server.fail(str(status), path="file.txt", methods="GET HEAD")
    for ask in (storage.exists, storage.read_bytes, storage.RemoteFile):
        with pytest.raises(StorageError, match=rf"cannot \w+ .*HTTP status {status}; check the credentials"):
            ask(f"{server.url}/a/file.txt")


def test_an_index_on_the_web_that_cannot_be_reached_is_no_missing_index(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "DEADLINE_S", 0.1)
    server.fail("503", path=".parquet", methods="GET HEAD")
    with pytest.raises(StorageError, match=r"look at http://.*shards\.parquet: \d attempts? in .*HTTP status 503"):
        load_index(f"{server.url}/train")


def test_a_web_server_is_read_only_and_lists_nothing(server: FaultServer) -> None:
    uri = f"{server.url}/a/file.txt"
    for change in (lambda: storage.write_atomic(uri, b""), lambda: storage.make_dir(uri), lambda: storage.open_store(uri)):
        with pytest.raises(ConfigError, match="is read only"):
            change()
    with pytest.raises(ConfigError, match=r"cannot list http://.*name the shards"):
        storage.list_dir(f"{server.url}/a")


def test_shards_and_their_index_are_read_from_the_web(shapes_folder: Path) -> None:
    folder = shapes_folder / "test"
    with FaultServer({f"/test/{path.name}": path.read_bytes() for path in folder.iterdir()}) as server:
        ours = [batch.images_BCHW for batch in read_all(f"{server.url}/test", batch_size=12, image_size=24)]
    local = [batch.images_BCHW for batch in read_all(str(folder), batch_size=12, image_size=24)]
    assert (ours[0] == local[0]).all()


@pytest.mark.parametrize(
    ("kind", "package", "blocked"),
    [("https://host/x", "aiohttp", "aiohttp"), ("hf://datasets/a/b/x.tar", "huggingface_hub", "huggingface_hub")],
)
def test_a_missing_package_is_one_error_with_the_command(kind: str, package: str, blocked: str) -> None:
    code = (
        f"import sys; sys.modules[{blocked!r}] = None\nfrom crate_ray import storage\n"
        f"try: storage.exists({kind!r})\nexcept ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert f"python -m pip install fsspec {package}" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "uri",
    [
        f"https://user:{SECRET}@host/data",
        f"s3://AKIA:{SECRET}@bucket/data",
        f"s3://bucket/data?access_key=AKIA&secret_key={SECRET}",
        f"s3://bucket/data?region=eu-west-1&session_token={SECRET}",
        f"https://host/train.tar?X-Amz-Signature={SECRET}",
        f"https://account.blob.core.windows.net/c/x.tar?sv=1&sig={SECRET}",
        f"gs://bucket/data?access_token={SECRET}",
        f"hdfs://user:{SECRET}@name-node:8020/data",
        f"https://host/x?api_key={SECRET}",
        f"https://{SECRET}@host/x",
        f"https://user:pa/{SECRET}@host/x",
        f"https://user:pa?{SECRET}@host/x?sig=a@{SECRET}",
        f"s3://AKIA:sec/{SECRET}@bucket/x",
        f"gs://{SECRET}@bucket/x",
        f"hf://{SECRET}@datasets/a/b",
        f"abfss://container:{SECRET}@account.dfs.core.windows.net/x",
        *(
            f"https://host/x?{name}={SECRET}"
            for name in (
                "pwd",
                "pass",
                "key",
                "auth",
                "auth_key",
                "authorization",
                "jwt",
                "sas",
                "code",
                "AWSAccessKeyId",
                "s%69g",
            )
        ),
        f"https://host/x#sig={SECRET}",
        f"https://host/x?a=1;sig={SECRET}",
        f"https://host/x;token={SECRET}?a=1",
    ],
)
def test_a_secret_in_a_uri_is_refused_and_not_repeated(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for ask in (storage.exists, storage.read_bytes, storage.list_dir, storage.absolute, storage.check_writable, load_index):
        with pytest.raises(ConfigError, match=r"holds (a password|the secret '\S+'): .* give it through") as caught:
            ask(uri)
        assert SECRET not in str(caught.value)
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    "uri",
    [
        "abfss://container@account.dfs.core.windows.net/x",
        "s3://b/k?region=eu",
        "hdfs://me@nn/x",
        "hf://datasets/user/repo@main/train.tar",
        "https://host:8443/package@1.2/x.tar?download=true",
        "http://[::1]:8080/a@b",
        "s3://b/keys/a@2x.tar?endpoint_override=127.0.0.1%3A9000&scheme=http&allow_bucket_creation=true",
        "https://host/x?encoding=utf-8&design=1&bypass=1&author=me&codec=png",
    ],
)
def test_a_uri_that_names_a_place_or_a_user_is_no_secret(uri: str) -> None:
    assert not storage.is_local(uri)


def test_a_secret_of_the_provider_chain_reaches_the_server_and_no_message(
    server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(retry, "DEADLINE_S", 0.1)
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login me password {SECRET}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    web._filesystem.cache_clear()
    uri = f"{server.url}/a/file.txt"
    assert storage.read_bytes(uri) == b"0123456789"
    assert server.headers[-1]["Authorization"].startswith("Basic ")
    messages = []
    for kind in ("403", "503", "reset", "cut"):
        server.rules.clear()
        server.fail(kind, path="file.txt", methods="GET HEAD")
        with pytest.raises(StorageError) as caught:
            storage.read_bytes(uri)
        messages.append(str(caught.value))
    web._filesystem.cache_clear()
    encoded = server.headers[-1]["Authorization"].split()[1]
    assert not any(hidden in text for hidden in (SECRET, encoded) for text in [*messages, caplog.text])
