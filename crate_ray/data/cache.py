"""Whole shards of remote stores on this machine's disk, shared by all processes on it.

In: the URI of a shard, its size and checksum from the index. Out: a memory map of the verified file, or None where it does
not fit. A file is named after the URI and the version (etag or time) that the store states, so a changed shard is never
mistaken for the old one. It is written as `NAME.part` and renamed when its size and checksum are right.

Three kernel locks (flock) order the processes, and the kernel drops them with their owner, so that a killed one blocks
nobody: the writer of a part file holds it exclusively while others wait; a reader holds its file shared for as long as its
map lives, so that it is not evicted; eviction and the reservation of room hold `.lock` for a moment.
The trade-off: `max_bytes` is a promise about the disk, so a shard that does not fit beside those in use is not cached at all;
its reader turns to ranged reads, which are right and slower.
"""

import errno
import fcntl
import hashlib
import logging
import mmap
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from crate_ray import storage
from crate_ray.config import ConfigError
from crate_ray.data.shards import Buffer

logger = logging.getLogger(__name__)

_FIRST_POLL_S = 0.01
_LONGEST_POLL_S = 0.5
_DOWNLOAD_TRIES = 3
_DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}


class CacheClosedError(RuntimeError):
    """The reader was closed while one of its threads waited for a shard."""


class ShardCache:
    """A folder of shards, bounded in bytes; the least recently opened leave first.

    Args:
        folder: On the machine's own disk. Created; may be shared by any number of processes and runs.
        max_bytes: Bytes that finished and unfinished shards take together.

    Raises:
        ConfigError: The folder is remote or cannot be made.
    """

    def __init__(self, folder: str, *, max_bytes: int) -> None:
        if not storage.is_local(folder):
            raise ConfigError(f"data.cache_dir={folder} is not on this machine; give a folder on a local disk")
        self.folder, self.max_bytes = storage.local_path(folder), max_bytes
        self._closing = threading.Event()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"data.cache_dir={folder} cannot be made: {error}; give a folder that can be written") from None

    def close(self) -> None:
        """Makes waiting and downloading threads of this process give up; maps stay valid."""
        self._closing.set()

    def open(self, uri: str, *, num_bytes: int, checksum: str) -> memoryview | None:
        """Maps a shard, downloading it first if no process has; None when there is no room for it.

        Args:
            uri: Of a remote shard.
            num_bytes: Its size in the index.
            checksum: Its XXH3-128 in the index.

        Raises:
            FileNotFoundError: No such shard.
            ConfigError: The shard is not the one that was indexed, or the disk is full.
            StorageError: The store refuses, or fails until the deadline.
        """
        remote = storage.RemoteFile(uri)
        if remote.size != num_bytes:
            raise ConfigError(_changed(uri, f"it has {remote.size} bytes, its index says {num_bytes}"))
        path = self._path(remote)
        part = path.with_suffix(".part")
        poll_s = _FIRST_POLL_S
        while not self._closing.is_set():
            if (mapped := _map(path, num_bytes)) is not None:
                return mapped
            with _locked(part, fcntl.LOCK_EX, create=True) as descriptor:
                if descriptor is not None:
                    if path.exists():  # another process has finished it since the look above
                        part.unlink()
                    elif not self._fill(remote, descriptor, part, checksum):
                        return None
                    else:
                        part.replace(path)
                    continue
            time.sleep(poll_s)
            poll_s = min(2 * poll_s, _LONGEST_POLL_S)
        raise CacheClosedError(uri)

    def discard_damaged(self, remote: storage.RemoteFile, *, offset: int, expected: Buffer) -> Path:
        """Removes the file of a shard if it does not hold these bytes at this offset; maps of it stay. Returns its path."""
        path = self._path(remote)
        with suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(offset)
            if file.read(len(expected)) != expected:
                path.unlink()
        return path

    def _path(self, remote: storage.RemoteFile) -> Path:
        name = hashlib.sha256(f"{remote.uri}\n{remote.version}\n{remote.size}".encode()).hexdigest()[:40]
        return self.folder / f"{name}.tar"

    @contextmanager
    def _writing(self, uri: str) -> Iterator[None]:
        """Says what to do about a fault of this disk; one of the store has other remedies and is not met here."""
        try:
            yield
        except OSError as error:
            if error.errno not in _DISK_FAULTS:
                raise
            raise ConfigError(
                f"data.cache_dir={self.folder} cannot hold {uri} ({error}); free the disk or lower data.cache_bytes"
            ) from error

    def _fill(self, remote: storage.RemoteFile, descriptor: int, part: Path, checksum: str) -> bool:
        """Reserves room for a part file and downloads into it; removes it where there is no room or anything fails."""
        filled = False
        try:
            if self._reserve(remote, descriptor, part):
                self._download(remote, descriptor, checksum)
                filled = True
        finally:
            if not filled:
                part.unlink(missing_ok=True)
        return filled

    def _reserve(self, remote: storage.RemoteFile, descriptor: int, part: Path) -> bool:
        """Makes room by evicting what no one reads; the part file's length, set here, counts from now on."""
        num_bytes = remote.size
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            entries = sorted(
                (_stat(path), path) for path in self.folder.iterdir() if path.suffix in {".tar", ".part"} and path != part
            )
            used = sum(num for (_, num), _ in entries)
            for (_, num), path in entries:
                abandoned = path.suffix == ".part"
                if (abandoned or used + num_bytes > self.max_bytes) and _remove_unused(path):
                    used -= num
            if used + num_bytes > self.max_bytes:
                return False
            with self._writing(remote.uri):
                os.ftruncate(descriptor, num_bytes)
            return True

    def _download(self, remote: storage.RemoteFile, descriptor: int, checksum: str) -> None:
        """Fills the part file and verifies it."""
        started, found = time.monotonic(), None
        for _ in range(_DOWNLOAD_TRIES):
            found = self._write(remote, descriptor)
            if found in {checksum, None}:
                with self._writing(remote.uri):
                    os.fsync(descriptor)
                logger.info("cached %s, %d bytes in %.1f s", remote.uri, remote.size, time.monotonic() - started)
                return
            logger.warning("%s arrived with checksum %s, indexed %s; again", remote.uri, found, checksum)
        raise ConfigError(_changed(remote.uri, f"its checksum is {found}, its index says {checksum}"))

    def _write(self, remote: storage.RemoteFile, descriptor: int) -> str | None:
        """Writes the whole shard and returns its checksum; None without the package that computes it."""
        try:
            from xxhash import xxh3_128

            hasher = xxh3_128()
        except ImportError:
            hasher = None
        offset = 0
        for chunk in remote.chunks():
            if self._closing.is_set():
                raise CacheClosedError(remote.uri)
            with self._writing(remote.uri):
                _write_all(descriptor, chunk, offset)
            offset += len(chunk)
            if hasher is not None:
                hasher.update(chunk)
        return None if hasher is None else str(hasher.hexdigest())


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    """Writes all bytes at an offset; the kernel may take fewer at a time, 2 GiB at most and less where the disk fills up."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def _changed(uri: str, how: str) -> str:
    return f"shard {uri} has changed since it was indexed: {how}; restore it or index the folder again"


def _stat(path: Path) -> tuple[int, int]:
    """Time of the last use and bytes; nothing where the file has just gone."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


@contextmanager
def _locked(path: Path, mode: int, *, create: bool = False) -> Iterator[int | None]:
    """A descriptor of the file at a path, locked; None while another holds it, or where it is gone or was replaced."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o644)
    except FileNotFoundError:
        yield None
        return
    try:
        yield descriptor if _lock(descriptor, path, mode) else None
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path, mode: int) -> bool:
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), path.stat())  # not one that was renamed or removed meanwhile
    except (BlockingIOError, FileNotFoundError):
        return False


def _remove_unused(path: Path) -> bool:
    """Removes a file that no one has locked."""
    with _locked(path, fcntl.LOCK_EX) as descriptor:
        if descriptor is None:
            return False
        path.unlink()
        return True


def _map(path: Path, num_bytes: int) -> memoryview | None:
    """Maps a finished shard and marks it as used; the map's own descriptor keeps the shared lock until it is gone."""
    with _locked(path, fcntl.LOCK_SH) as descriptor:
        if descriptor is None:
            return None
        if os.fstat(descriptor).st_size == num_bytes:
            os.utime(descriptor)
            return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
    _remove_unused(path)
    return None
