"""Web servers and the Hugging Face hub, through fsspec, read only.

In: http, https and hf URIs. Out: sizes, versions and bytes, or an OSError whose text holds the HTTP status. fsspec knows the
protocols; its errors are translated here, because its `info` calls every fault "not found" and its errors are no OSErrors.
A server without range requests sends whole files: correct, and as costly as it sounds, so that is said once a server.
"""

import os
from functools import lru_cache
from typing import Any, NoReturn
from urllib.parse import urlsplit

from crate_ray.config import ConfigError
from crate_ray.storage.uris import scheme

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0

_PACKAGES = {"http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub"}


@lru_cache(maxsize=8)
def _filesystem(kind: str, process: int) -> Any:
    """One client a protocol and process: event loop and connections do not survive a fork."""
    try:
        import fsspec

        if kind == "hf":
            return fsspec.filesystem("hf", skip_instance_cache=True)
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
        client = {"timeout": timeout, "trust_env": True}
        return fsspec.filesystem("http", client_kwargs=client, skip_instance_cache=True)
    except ImportError:
        raise ConfigError(
            f"{kind}:// URIs need the packages fsspec and {_PACKAGES[kind]}: python -m pip install fsspec {_PACKAGES[kind]}"
        ) from None


def _client(uri: str) -> Any:
    return _filesystem(scheme(uri), os.getpid())


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of aiohttp or huggingface_hub holds."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return int(status) if status else None


def _raise(error: Exception, uri: str) -> NoReturn:
    """Translates to an OSError: FileNotFoundError, or one whose text `retry.is_transient` reads."""
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    status = _status(cause)
    if status in {404, 410} or (status is None and cause is error and isinstance(error, FileNotFoundError)):
        raise FileNotFoundError(uri) from None
    text = f"HTTP status {status}" if status else f"{type(cause).__name__}: {cause}".rstrip(": ")
    raise OSError(text) from None


def unsized(uri: str) -> ConfigError:
    """The error for a file whose length its server does not say."""
    return ConfigError(f"{uri}: the server does not say how long it is (no Content-Length); copy it to a path or a bucket")


def stat(uri: str) -> tuple[int | None, str]:
    """Size in bytes, None if the server does not say, and what changes with the content: an etag or a date."""
    client = _client(uri)
    try:
        info = client.info(uri)
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001  translated; fsspec lets errors of three libraries through
        _raise(error, uri)
    if info.get("type") == "directory":
        raise IsADirectoryError(uri)
    fields = ("ETag", "blob_id", "Content-MD5", "Digest", "Last-Modified", "last_commit")
    return info["size"], next((str(info[field]) for field in fields if info.get(field)), "")


def read(uri: str, start: int | None = None, stop: int | None = None) -> bytes:
    """Bytes [start, stop), or the whole file. A server without ranges sends the whole file: see `read_range`."""
    try:
        return bytes(_client(uri).cat_file(uri, start=start, end=stop))
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001
        _raise(error, uri)


def list_dir(uri: str) -> list[str]:
    """Base names in a folder of the hub.

    Raises:
        ConfigError: For a web server, which has files and no folders.
    """
    if scheme(uri) != "hf":
        host = urlsplit(uri).netloc
        raise ConfigError(f"the web server {host} cannot list {uri}; name the shards: .../train-{{000000..000009}}.tar")
    try:
        return [str(entry["name"]).rsplit("/", 1)[-1] for entry in _client(uri).ls(uri, detail=True)]
    except FileNotFoundError:
        return []
    except Exception as error:  # noqa: BLE001
        _raise(error, uri)
