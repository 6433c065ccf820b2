"""Which shards a path, a URL or a pattern means.

In: a folder, one `.tar`, or a pattern such as `s3://bucket/in-{0000..1023}.tar` or `part-*.tar`. Out: the shards with size and
time as their store lists them, sorted by name. Braces are expanded as webdataset does, anywhere in the path; `*` and `[...]`
stand in file names only, because listing a store recursively may cost more than reading the shards.
"""

import fnmatch
from dataclasses import dataclass
from typing import Any

from pyarrow import fs

from crate_ray import storage
from crate_ray.config import ConfigError
from crate_ray.data.scan import ShardFile
from crate_ray.storage.retry import retrying
from crate_ray.storage.uris import is_web

ALL_SHARDS = "*.tar"
_WILDCARDS = "*["
_LOOKED_INTO = 16  # names in a folder without shards, for what may be its splits


@dataclass(frozen=True)
class Listing:
    """The shards of a data set.

    Attributes:
        folder: What their names are relative to.
        pattern: What was asked for, relative to the folder.
        files: Sorted by name; one that is named but not there has the size -1.
    """

    folder: str
    pattern: str
    files: list[ShardFile]


def _split(url: str) -> tuple[str, str]:
    """The folder in front of the first pattern or shard, and what follows; a query stays with the folder."""
    base, mark, query = url.partition("?") if "://" in url else (url, "", "")
    root = base.find("://") + 3 if "://" in base else 0
    cut = next((i for i, letter in enumerate(base) if letter in _WILDCARDS + "{"), -1)
    if cut < 0:
        if not base.endswith(".tar") or storage.is_dir(url):
            return url, ALL_SHARDS
        cut = len(base)
    slash = base.rfind("/", root, cut)
    folder = base[:slash] or "/" if slash >= 0 else (base[:root] or ".")
    return folder + mark + query, base[slash + 1 :] if slash >= 0 else base[root:]


def _expand(pattern: str) -> list[str]:
    """The alternatives of `{a,b}` and `{00..11}`."""
    from braceexpand import braceexpand

    try:
        return list(braceexpand(pattern))
    except ValueError:  # UnbalancedBracesError
        raise ConfigError(f"the braces in {pattern!r} do not match; write for example shard-{{0000..0123}}.tar") from None


def _has_wildcard(pattern: str) -> bool:
    return any(letter in pattern for letter in _WILDCARDS)


def _matching(folder: str, pattern: str) -> list[ShardFile]:
    """The shards that a pattern without braces means."""
    parent, _, base = pattern.rpartition("/")
    if _has_wildcard(parent):
        raise ConfigError(f"'{pattern}': * and [...] stand in file names only; name the folders with braces, {{a,b}}/*.tar")
    place = storage.join(folder, parent) if parent else folder
    try:
        return _found_in(place, folder, parent, base)
    except PermissionError as error:
        raise ConfigError(f"{place} may not be listed ({error}); give this user the right to read it") from None


def _found_in(place: str, folder: str, parent: str, base: str) -> list[ShardFile]:
    """The shards of one folder whose file names match."""
    if is_web(place):
        there = fnmatch.filter(storage.list_dir(place), base)
        return _named(folder, [f"{parent}/{name}" if parent else name for name in there])
    store, path = storage.open_store(place)
    infos = retrying(lambda: store.get_file_info(fs.FileSelector(path, allow_not_found=True)), f"list {place}")
    chosen = [info for info in infos if fnmatch.fnmatchcase(info.base_name, base)]
    return [_shard_file(folder, f"{parent}/{info.base_name}" if parent else info.base_name, info) for info in chosen]


def _named(folder: str, names: list[str]) -> list[ShardFile]:
    """Shards that are named in full; object stores are asked for all of them at once."""
    uris = [storage.join(folder, name) for name in names]
    if not uris or is_web(uris[0]):
        return [_web_file(name, uri) for name, uri in zip(names, uris, strict=True)]
    store, _ = storage.open_store(folder)
    paths = [storage.open_store(uri)[1] for uri in uris]
    infos = retrying(lambda: store.get_file_info(paths), f"look at shards in {folder}")
    return [_shard_file(folder, name, info) for name, info in zip(names, infos, strict=True)]


def _web_file(name: str, uri: str) -> ShardFile:
    try:
        found = storage.RemoteFile(uri)
    except (FileNotFoundError, IsADirectoryError):
        return ShardFile(name, uri, -1, None)
    return ShardFile(name, uri, found.size, None, found.version or None)


def _shard_file(folder: str, name: str, info: Any) -> ShardFile:
    uri = storage.join(folder, name)
    if info.type != fs.FileType.File:
        return ShardFile(name, uri, -1, None)
    return ShardFile(name, uri, int(info.size), info.mtime_ns)


def _why_nothing(url: str, pattern: str) -> str:
    """Why no shard was found, and what to give instead."""
    usual = (
        "give the folder that holds them, or a pattern such as shard-{0000..0123}.tar (compressed archives are not supported)"
    )
    if is_web(url) or (pattern != ALL_SHARDS and (_has_wildcard(pattern) or "{" in pattern)):
        return f"; {usual}"
    if not storage.exists(url):
        return f": it does not exist; {usual}"
    inside = [name for name in storage.list_dir(url)[:_LOOKED_INTO] if storage.is_dir(storage.join(url, name))]
    splits = [name for name in inside if _matching(storage.join(url, name), ALL_SHARDS)]
    if splits:
        return f": it holds the splits {', '.join(splits)}; name one of them: {storage.join(url, splits[-1])}"
    return f"; {usual}"


def list_shards(url: str) -> Listing:
    """Find the shards that a folder, a file or a pattern means.

    Raises:
        ConfigError: For a scheme that is not read, a pattern that cannot be understood, or one that no shard matches.
    """
    storage.scheme(url)
    folder, pattern = _split(url)
    alternatives = _expand(pattern)
    found = _named(folder, [name for name in alternatives if not _has_wildcard(name)])
    for alternative in filter(_has_wildcard, alternatives):
        found += _matching(folder, alternative)
    files = {file.name: file for file in found if file.name.endswith(".tar")}
    if not any(file.size >= 0 for file in files.values()):
        raise ConfigError(f"no *.tar shards in {url}{_why_nothing(url, pattern)}")
    return Listing(folder, pattern, [files[name] for name in sorted(files)])
