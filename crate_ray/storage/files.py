"""Whole files and folders by URI.

In: URIs. Out: bytes, listings, atomic writes. A local write is a temporary file, fsync and a rename; an object store has no
rename and needs none, its PUT is atomic. What is asked of a remote store is asked again until the deadline (see `retry`).
"""

import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs

from crate_ray.config import ConfigError
from crate_ray.storage import web
from crate_ray.storage.remote import RemoteFile, open_store
from crate_ray.storage.retry import retrying
from crate_ray.storage.uris import is_local, is_web, join, local_path

T = TypeVar("T")


def _repeat(uri: str, verb: str, action: Callable[[], T]) -> T:
    """An action that is tried again on a remote store, and done once on the local disk."""
    return action() if is_local(uri) else retrying(action, f"{verb} {uri}")


def _info(uri: str) -> fs.FileInfo:
    """What lies at a URI, of a type NotFound where nothing does."""
    if not is_web(uri):
        store, path = open_store(uri)
        return _repeat(uri, "look at", lambda: store.get_file_info(path))
    try:
        size, _ = retrying(lambda: web.stat(uri), f"look at {uri}")
    except FileNotFoundError:
        return fs.FileInfo(uri, fs.FileType.NotFound)
    except IsADirectoryError:
        return fs.FileInfo(uri, fs.FileType.Directory)
    return fs.FileInfo(uri, fs.FileType.File, size=size)


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    return bool(_info(uri).type != fs.FileType.NotFound)


def is_dir(uri: str) -> bool:
    """Whether the URI is a folder; a web server has none."""
    return bool(_info(uri).type == fs.FileType.Directory)


def size(uri: str) -> int:
    """Bytes of a file.

    Raises:
        FileNotFoundError: No such file.
        ConfigError: A web server that does not say.
    """
    info = _info(uri)
    if info.type != fs.FileType.File:
        raise FileNotFoundError(uri)
    if info.size is None:
        raise web.unsized(uri)
    return int(info.size)


def open_input(uri: str) -> pa.NativeFile:
    """A random-access reader; raises FileNotFoundError. Each read of a remote file is a request: read in large pieces."""
    if is_local(uri):
        store, path = open_store(uri)
        return store.open_input_file(path)
    return pa.PythonFile(RemoteFile(uri), mode="r")


def read_bytes(uri: str) -> bytes:
    """A whole file; raises FileNotFoundError."""
    if is_web(uri):
        return retrying(lambda: web.read(uri), f"read {uri}")

    def attempt() -> bytes:
        store, path = open_store(uri)
        with store.open_input_file(path) as source:
            data, expected = bytes(source.read()), int(source.size())
        if len(data) != expected:
            raise OSError(f"got {len(data)} of {expected} bytes")
        return data

    return _repeat(uri, "read", attempt)


def read_text(uri: str) -> str:
    """A whole UTF-8 file; raises FileNotFoundError."""
    return read_bytes(uri).decode()


def write_atomic(uri: str, content: bytes | str | Sequence[memoryview]) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part.

    Args:
        uri: Of the file; its folder is made.
        content: Text in UTF-8, bytes, or pieces of them, which are not joined in memory.

    Raises:
        OSError: The disk is full, or the store refuses.
    """
    pieces = _pieces(content)
    if not is_local(uri):
        store, key = open_store(uri)
        retrying(lambda: _put(store, key, pieces), f"write {uri}")
        return
    path = local_path(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as sink:
            sink.writelines(pieces)
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _pieces(content: bytes | str | Sequence[memoryview]) -> Sequence[bytes | memoryview]:
    if isinstance(content, str):
        return [content.encode()]
    return [content] if isinstance(content, bytes) else content


def _put(store: fs.FileSystem, key: str, pieces: Sequence[bytes | memoryview]) -> None:
    with store.open_output_stream(key) as sink:
        for piece in pieces:
            sink.write(piece)


def free_bytes(uri: str) -> int | None:
    """Room left for this process on the disk of a folder, which need not exist yet; None of a remote store."""
    if not is_local(uri):
        return None
    path = local_path(uri).absolute()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def make_dir(uri: str) -> None:
    """Creates a folder and its parents; an existing one is fine."""
    store, path = open_store(uri)
    _repeat(uri, "create", lambda: store.create_dir(path, recursive=True))


def list_dir(uri: str) -> list[str]:
    """Base names in a folder, sorted; empty when there is no such folder.

    Raises:
        ConfigError: A web server, which cannot list.
    """
    if is_web(uri):
        return sorted(retrying(lambda: web.list_dir(uri), f"list {uri}"))
    store, path = open_store(uri)
    selector = fs.FileSelector(path, allow_not_found=True)
    try:
        infos = _repeat(uri, "list", lambda: store.get_file_info(selector))
    except FileNotFoundError:  # it was made between pyarrow's failure to list it and its look whether it exists
        infos = _repeat(uri, "list", lambda: store.get_file_info(selector))
    return sorted(info.base_name for info in infos if info.base_name)


def delete(uri: str) -> None:
    """Removes a file or a whole folder; a missing one is fine."""
    if is_local(uri):
        path = local_path(uri)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        return
    store, path_in_store = open_store(uri)
    kind = _info(uri).type
    try:
        if kind == fs.FileType.Directory:
            retrying(lambda: store.delete_dir(path_in_store), f"delete {uri}")
        elif kind == fs.FileType.File:
            retrying(lambda: store.delete_file(path_in_store), f"delete {uri}")
    except FileNotFoundError:
        return  # gone already: a first attempt may have done it although its answer was lost


def check_writable(uri: str) -> None:
    """Writes and removes a small file, so that a storage fault shows before the first step.

    Raises:
        ConfigError: The folder cannot be written.
    """
    probe = join(uri, f".write-test-{uuid.uuid4().hex[:8]}")
    try:
        make_dir(uri)
        write_atomic(probe, b"ok")
        delete(probe)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"storage.path = '{uri}' cannot be written ({error}); choose a folder or bucket that can") from None
