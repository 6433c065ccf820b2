"""What a URI says: its scheme, its place, and that it holds no secret.

In: URIs as users write them. Out: schemes, paths, joined URIs, or one error. Nothing is opened here. A secret in a URI would
be copied to configurations, logs and checkpoints, so URIs that hold one are refused, and the refusal does not repeat it.
"""

import re
from pathlib import Path
from urllib.parse import unquote

from crate_ray.config import ConfigError

STORES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
WEB = ("http", "https", "hf")
SCHEMES = (*STORES, *WEB, "file")

_NAMING_USERS = ("abfs", "abfss", "hdfs", "viewfs")  # `container@account` and `user@host`, which are no secrets
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SECRET_WORD = re.compile(
    r"pass|pwd|key|o?auth|jwt|sas|sig|code|bearer"  # whole words, so that `bypass`, `design` or `encoding` are none
    r"|\w*(secret|token|credential|passw|passphrase|signature|authori[sz]ation|authenticat)\w*"
    r"|(access|account|api|auth|private|shared)key",
    re.IGNORECASE,
)
_PLACE = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d*)?")  # host or bucket, and port
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


def _holds_password(head: str, rest: str) -> bool:
    """Whether a URI names a user: before the first slash, or split by a slash that the password itself holds."""
    if head == "file" or "@" not in rest:
        return False
    place = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user, at, _ = place.rpartition("@")
    if at:
        return ":" in user or head not in _NAMING_USERS
    return not _PLACE.fullmatch(place)  # `user:pa/ss@host`: what follows the colon is no port


def _secret_name(rest: str) -> str | None:
    """The first name in the query, fragment or parameters of a URI that says that its value is a secret."""
    for piece in re.split(r"[?#;&]", rest)[1:]:
        name, equals, _ = piece.partition("=")
        if equals and any(_SECRET_WORD.fullmatch(word) for word in _WORD.findall(unquote(name))):
            return unquote(name)
    return None


def _refuse_secrets(head: str, rest: str) -> None:
    """Raises for `user:password@` and for names of secrets; what follows such a user is not shown, as it may be the rest."""
    named = None
    if (with_password := _holds_password(head, rest)) or (named := _secret_name(rest)):
        found = "a password" if with_password else f"the secret '{named}'"
        shown = f"{head}://..." if with_password else f"{head}://{re.split('[?#;&]', rest)[0]}"
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
                f"'pipe:...' would run a shell command, which is never done; give a path or a URL ({', '.join(SCHEMES)})"
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
