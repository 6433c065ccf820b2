"""What a URI says: its scheme, its place, and that it holds no secret.

In: URIs as users write them. Out: schemes, paths, joined URIs, or one error. Nothing is opened here. A secret in a URI would
be copied to configurations, logs and checkpoints, so URIs that hold one are refused, and the refusal does not repeat it.
"""

import re
from pathlib import Path
from urllib.parse import parse_qsl

from crate_ray.config import ConfigError

STORES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
WEB = ("http", "https", "hf")
SCHEMES = (*STORES, *WEB, "file")

_SECRET_KEY = re.compile(r"access_?key|secret|passw|token|credential|signature|^sig$|account_?key|api_?key", re.IGNORECASE)
_PROVIDERS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws, or the role of the machine",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or the service account of the machine",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS, or the service account of the machine",
    "abfs": "AZURE_* variables, or the managed identity of the machine",
    "abfss": "AZURE_* variables, or the managed identity of the machine",
    "http": "~/.netrc",
    "https": "~/.netrc",
    "hf": "HF_TOKEN or `hf auth login`",
}


def _refuse_secrets(head: str, rest: str) -> None:
    """Raises for `user:password@` and for query keys that name a secret."""
    place, _, query = rest.partition("?")
    user, at, host_and_path = place.partition("@")
    with_password = bool(at) and ":" in user and "/" not in user
    named = [key for key, _ in parse_qsl(query, keep_blank_values=True) if _SECRET_KEY.search(key)]
    if with_password or named:
        found = "a password" if with_password else f"the secret '{named[0]}'"
        shown = f"{head}://{host_and_path if with_password else place}"
        raise ConfigError(
            f"the URI of {shown} holds {found}: it would end up in configurations, logs and checkpoints; remove it, replace "
            f"that secret, and give it through {_PROVIDERS.get(head, 'the environment')}"
        )


def scheme(uri: str) -> str:
    """The URI's scheme; 'file' for a plain path.

    Raises:
        ConfigError: A scheme that is not read here, `pipe:` among them, or a URI that holds a secret.
    """
    head, separator, rest = uri.partition("://")
    if not separator:
        if uri.startswith("pipe:"):
            raise ConfigError(
                f"'{uri}' would run a shell command, which is never done; give a path or a URL ({', '.join(SCHEMES)})"
            )
        return "file"
    if head not in SCHEMES:
        raise ConfigError(f"scheme '{head}' of '{head}://...' is not supported; valid: {', '.join(SCHEMES)}, or a plain path")
    _refuse_secrets(head, rest)
    return head


def is_local(uri: str) -> bool:
    """Whether the URI is on this machine's file system."""
    return scheme(uri) == "file"


def is_web(uri: str) -> bool:
    """Whether the URI is read through fsspec: a web server or the Hugging Face hub."""
    return scheme(uri) in WEB


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
