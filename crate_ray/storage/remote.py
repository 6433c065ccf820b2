"""One way to read a file of any remote store: by range, again after a fault, whole or an error.

In: URIs of object stores (pyarrow.fs) or the web (fsspec). Out: `RemoteFile`, whose reads may come from several threads.
A body that ends early is a fault like a reset, and so is one that is too long; neither ever passes as data.
"""

import io
import logging
import os
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

from crate_ray.config import ConfigError
from crate_ray.storage import web
from crate_ray.storage.retry import retrying
from crate_ray.storage.uris import is_local, is_web, local_path

CHUNK_BYTES = 8 << 20
_ROOTED = ("hdfs", "viewfs")  # whose paths start with a slash
_S3_ATTEMPTS = 3  # within one attempt of ours; from_uri's own default is 31 attempts or 99 seconds
_S3_FLAGS = ("allow_bucket_creation", "allow_bucket_deletion", "check_directory_existence_before_creation")
_S3_TEXTS = ("scheme", "endpoint_override", "tls_ca_file_path")

logger = logging.getLogger(__name__)
_warned_hosts: set[str] = set()


def open_store(uri: str) -> tuple[fs.FileSystem, str]:
    """The pyarrow file system of a URI and the path in it.

    Raises:
        ConfigError: The store cannot be opened, or is read only (http, https, hf).
    """
    if is_local(uri):
        return fs.LocalFileSystem(), str(local_path(uri))
    if is_web(uri):
        raise ConfigError(
            f"'{uri}' is read only: shards can be read from there, nothing written; use a path or an object store"
        )
    parts = urlsplit(uri)
    store, base = _store(f"{parts.scheme}://{parts.netloc}", parts.query, os.getpid())
    path = (base.rstrip("/") + unquote(parts.path)).rstrip("/")
    return store, path if parts.scheme in _ROOTED else path.lstrip("/")


@lru_cache(maxsize=32)
def _store(place: str, query: str, process: int) -> tuple[fs.FileSystem, str]:
    """The client of a bucket or container, and its path; kept, because opening one looks up credentials and region."""
    uri = f"{place}?{query}" if query else place
    try:
        store, base = fs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"cannot open '{uri}': {error}") from None
    if not isinstance(store, fs.S3FileSystem):
        return store, base
    given = dict(parse_qsl(query))
    options: dict[str, Any] = {key: given[key] for key in _S3_TEXTS if key in given}
    options |= {key: given[key].lower() in {"true", "1"} for key in _S3_FLAGS if key in given}
    if "force_virtual_addressing" in given:
        options["force_virtual_addressing"] = given["force_virtual_addressing"].lower() in {"true", "1"}
    retry = fs.AwsStandardS3RetryStrategy(max_attempts=_S3_ATTEMPTS)
    return fs.S3FileSystem(region=store.region, retry_strategy=retry, **options), base


class _StoreObject:
    """An object that pyarrow reads."""

    def __init__(self, uri: str) -> None:
        store, path = open_store(uri)
        self._file = store.open_input_file(path)
        self.size = int(self._file.size())
        fields = {key.decode().lower() if isinstance(key, bytes) else key.lower(): value for key, value in self._metadata()}
        etag = fields.get("etag")
        self.version = etag.decode() if isinstance(etag, bytes) else str(etag or store.get_file_info(path).mtime_ns)

    def _metadata(self) -> list[tuple[Any, Any]]:
        return list((self._file.metadata() or {}).items())

    def fetch(self, offset: int, size: int) -> bytes:
        return bytes(self._file.read_at(size, offset))


class _WebObject:
    """A file that fsspec reads."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        size, self.version = web.stat(uri)
        if size is None:
            raise web.unsized(uri)
        self.size = size

    def fetch(self, offset: int, size: int) -> bytes:
        return web.read(self._uri, offset, offset + size)


class RemoteFile(io.RawIOBase):
    """A remote file, read by range; every read is whole or an error. `read_at` may be called from several threads.

    Args:
        uri: Of any remote scheme.

    Raises:
        FileNotFoundError: No such file.
        StorageError: Refused, or still failing at the deadline.

    Attributes:
        size: Bytes.
        version: The etag, else the time of the last change; another one means other content.
    """

    def __init__(self, uri: str) -> None:
        super().__init__()
        self.uri = uri
        self._lock = threading.Lock()
        self._object: _StoreObject | _WebObject | None = None
        found = retrying(self._opened, f"open {uri}")
        self.size, self.version = found.size, found.version
        self._position = 0

    def _opened(self) -> _StoreObject | _WebObject:
        with self._lock:
            if self._object is None:
                self._object = _WebObject(self.uri) if is_web(self.uri) else _StoreObject(self.uri)
            return self._object

    def _fetch(self, offset: int, size: int) -> bytes:
        """The bytes asked for, or the whole file from a server that ignores ranges; opened afresh after a fault."""

        def attempt() -> bytes:
            try:
                data = self._opened().fetch(offset, size)
            except OSError:
                self._object = None
                raise
            if len(data) not in {size, self.size}:
                raise OSError(f"got {len(data)} of {size} bytes")
            return data

        return retrying(attempt, f"read bytes {offset} to {offset + size} of {self.uri}")

    def read_at(self, size: int, offset: int) -> bytes:
        """The bytes from an offset on; fewer only where the file ends."""
        size = max(0, min(size, self.size - offset))
        if size == 0:
            return b""
        data = self._fetch(offset, size)
        if len(data) == size:
            return data
        host = urlsplit(self.uri).netloc
        if host not in _warned_hosts:
            _warned_hosts.add(host)
            logger.warning("%s ignores ranges and sends whole files for every read; set data.cache_dir", host)
        return data[offset : offset + size]

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """The whole file in order. A server that ignores ranges is asked once, and its file is held in memory."""
        offset = 0
        while offset < self.size:
            asked = min(chunk_bytes, self.size - offset)
            data = self._fetch(offset, asked)
            if len(data) != asked:
                data = data[offset:]
            yield data
            offset += len(data)

    def readable(self) -> bool:
        """See io.RawIOBase."""
        return True

    def seekable(self) -> bool:
        """See io.RawIOBase."""
        return True

    def readinto(self, buffer: Any) -> int:
        """See io.RawIOBase."""
        data = self.read_at(len(buffer), self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See io.RawIOBase."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        """See io.RawIOBase."""
        return self._position
