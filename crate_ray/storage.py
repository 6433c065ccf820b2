"""Files by URI: a local path, or any store that pyarrow.fs opens (s3, gs, abfs, hdfs).

In: URIs. Out: bytes, listings, atomic writes. A local write is a temporary file, fsync and a
rename; an object store has no rename and needs none, its PUT is atomic. Credentials come from
the provider chain, never from the URI.
"""

import os
import shutil
import uuid
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from crate_ray.config import ConfigError

_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "file")


def scheme(uri: str) -> str:
    """The URI's scheme; 'file' for a plain path.

    Raises:
        ConfigError: A scheme that is not read here, `pipe:` among them.
    """
    head, separator, _ = uri.partition("://")
    if not separator:
        if uri.startswith("pipe:"):
            raise ConfigError(
                f"'{uri}' would run a shell command, which is never done; give a path or a URL ({', '.join(_SCHEMES)})"
            )
        return "file"
    if head not in _SCHEMES:
        raise ConfigError(f"'{uri}': scheme '{head}' is not supported; valid: {', '.join(_SCHEMES)}, or a plain path")
    return head


def is_local(uri: str) -> bool:
    """Whether the URI is on this machine's file system."""
    return scheme(uri) == "file"


def local_path(uri: str) -> Path:
    """The path of a local URI.

    Raises:
        ValueError: The URI is remote.
    """
    if not is_local(uri):
        raise ValueError(f"{uri} is not on the local disk")
    return Path(uri.removeprefix("file://")).expanduser()


def absolute(uri: str) -> str:
    """A local path made absolute and free of `..`; a remote URI as it is."""
    return str(local_path(uri).resolve()) if is_local(uri) else uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    """Appends path components with single slashes; a query such as `?region=eu-west-1` stays at the end."""
    base, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    return ("/".join([base.rstrip("/"), *(part.strip("/") for part in parts)]) or "/") + mark + query


def open_store(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URI and the path in it.

    Raises:
        ConfigError: The store cannot be opened.
    """
    if is_local(uri):
        return fs.LocalFileSystem(), str(local_path(uri))
    try:
        store, path = fs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"cannot open '{uri}': {error}") from None
    return store, path


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    store, path = open_store(uri)
    return bool(store.get_file_info(path).type != fs.FileType.NotFound)


def is_dir(uri: str) -> bool:
    """Whether the URI is a folder."""
    store, path = open_store(uri)
    return bool(store.get_file_info(path).type == fs.FileType.Directory)


def size(uri: str) -> int:
    """Bytes of a file.

    Raises:
        FileNotFoundError: No such file.
    """
    store, path = open_store(uri)
    info = store.get_file_info(path)
    if info.type != fs.FileType.File:
        raise FileNotFoundError(uri)
    return int(info.size)


def open_input(uri: str) -> pa.NativeFile:
    """A random-access reader; raises FileNotFoundError."""
    store, path = open_store(uri)
    return store.open_input_file(path)


def read_bytes(uri: str) -> bytes:
    """A whole file; raises FileNotFoundError."""
    with open_input(uri) as source:
        return bytes(source.read())


def read_text(uri: str) -> str:
    """A whole UTF-8 file; raises FileNotFoundError."""
    return read_bytes(uri).decode()


def write_atomic(uri: str, content: bytes | str) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part.

    Raises:
        OSError: The disk is full, or the store refuses.
    """
    data = content.encode() if isinstance(content, str) else content
    if not is_local(uri):
        store, key = open_store(uri)
        with store.open_output_stream(key) as sink:
            sink.write(data)
        return
    path = local_path(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as sink:
            sink.write(data)
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def make_dir(uri: str) -> None:
    """Creates a folder and its parents; an existing one is fine."""
    store, path = open_store(uri)
    store.create_dir(path, recursive=True)


def list_dir(uri: str) -> list[str]:
    """Base names in a folder, sorted; empty when there is no such folder."""
    store, path = open_store(uri)
    infos = store.get_file_info(fs.FileSelector(path, allow_not_found=True))
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
    info = store.get_file_info(path_in_store)
    if info.type == fs.FileType.Directory:
        store.delete_dir(path_in_store)
    elif info.type == fs.FileType.File:
        store.delete_file(path_in_store)


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
