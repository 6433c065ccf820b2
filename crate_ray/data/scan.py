"""One shard in one pass: the rows of its samples, its checksum, and everything that is wrong with it.

In: a shard that anyone wrote. Out: `ShardScan`, a table and findings; nothing is raised for what a stranger's file can hold.
Memory is a window of the file, one label or one image at a time, and some hundred bytes for each sample of this shard.
Nothing is decoded here and no pickle is ever opened; `inspect` may look at the images while their bytes are at hand.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from crate_ray import storage
from crate_ray.config import ConfigError
from crate_ray.data.findings import Fault, Finding
from crate_ray.data.headers import ImageError
from crate_ray.data.schema import NO_LABEL, SAMPLES_SCHEMA
from crate_ray.data.shards import IMAGE_EXTENSIONS, MASK_EXTENSION, image_extensions, kind_of, runs_code, split_name
from crate_ray.data.tar import WINDOW_BYTES, DamagedShardError, Member, ShardStream, walk_tar

_REMOTE_CHUNK_BYTES = 16 << 20  # one request each
_MAX_METADATA_BYTES = 1 << 20
_MAX_IMAGE_BYTES = 256 << 20
_MAX_LABEL = 2**31 - 1
_MAX_FINDINGS = 1000  # of one kind in one shard; the others are counted

Inspect = Callable[[bytes], None]


@dataclass(frozen=True)
class ShardFile:
    """A shard as its store lists it.

    Attributes:
        name: Path relative to the folder of the data set.
        uri: Where it lies.
        size: Bytes; -1 when it is not there.
        modified: Time of its last change, nanoseconds since 1970; None where the store does not say.
        etag: What a web server says changes with its content: its etag, else the date of its last change.
    """

    name: str
    uri: str
    size: int
    modified: int | None
    etag: str | None = None


@dataclass(frozen=True)
class ShardScan:
    """What one pass over a shard found.

    Attributes:
        samples: Rows of `samples.parquet`.
        checksum: XXH3-128 of the file in hex; None when it was not read to the end.
        findings: What is wrong with it.
        left_out: Samples that are in the shard but not in `samples`.
    """

    file: ShardFile
    samples: pa.Table
    checksum: str | None
    findings: list[Finding]
    left_out: int

    def shard_row(self) -> dict[str, Any]:
        """Its row of `shards.parquet`; without `uri`, which the index decides."""
        file = self.file
        stated = {"name": file.name, "bytes": file.size, "count": self.samples.num_rows, "checksum": self.checksum}
        return {**stated, "modified": file.modified, "uri": None, "etag": file.etag}


@dataclass(slots=True)
class _Sample:
    """What is known of a sample so far: members by extension, hashes of images, labels and sources by extension."""

    members: dict[str, Member] = field(default_factory=dict)
    hashes: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int | str] = field(default_factory=dict)
    source: str | None = None
    refused: bool = False


class _Chunks:
    """Chunks of any size as a source for `ShardStream`."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readinto(self, buffer: memoryview, /) -> int:
        if not self._rest:
            self._rest = memoryview(next(self._chunks, b""))
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


@contextmanager
def open_shard(file: ShardFile) -> Iterator[ShardStream]:
    """A shard from its start; raises OSError when it cannot be opened."""
    if not storage.is_local(file.uri):
        with storage.RemoteFile(file.uri) as remote:
            yield ShardStream(_Chunks(remote.chunks(_REMOTE_CHUNK_BYTES)), file.size, file.name)
        return
    with storage.open_input(file.uri) as source:
        yield ShardStream(source, file.size, file.name)


def _valid_label(value: object) -> int | str:
    """A label, or what is wrong with it."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_LABEL:
        return value
    return f"the label {str(value)[:40]!r} is no whole number from 0 to {_MAX_LABEL}"


def _label_of_cls(content: bytes) -> int | str:
    digits = content.strip()
    return _valid_label(int(digits) if digits.isdigit() and len(digits) < 20 else content[:40].decode("utf-8", "replace"))


class ShardScanner:
    """Scans one shard; see `scan_shard`."""

    def __init__(self, file: ShardFile, *, label_field: str | None, inspect: Inspect | None) -> None:
        from xxhash import xxh3_64, xxh3_64_intdigest

        self._file, self._label_field, self._inspect = file, label_field, inspect
        self._hash_bytes, self._hash_pieces = xxh3_64_intdigest, xxh3_64
        self._samples: dict[str, _Sample] = {}
        self._cut: str | None = None  # the sample in which the damage of the shard shows: its rest may be there
        self._findings: list[Finding] = []
        self._counts: Counter[Fault] = Counter()

    def _found(self, fault: Fault, what: str, *, key: str = "", offset: int | None = None) -> None:
        self._counts[fault] += 1
        if self._counts[fault] <= _MAX_FINDINGS:
            self._findings.append(Finding(fault, self._file.name, what, key, offset))

    def _all_findings(self) -> list[Finding]:
        more = {fault: count - _MAX_FINDINGS for fault, count in self._counts.items() if count > _MAX_FINDINGS}
        rest = [Finding(fault, self._file.name, f"{count} more of this kind") for fault, count in more.items()]
        return self._findings + rest

    def scan(self) -> ShardScan:
        """One pass."""
        checksum = None
        if self._file.size < 0:
            self._found(Fault.NO_SHARD, f"{self._file.uri} is not there")
        else:
            try:
                with open_shard(self._file) as stream:
                    for member in walk_tar(stream):
                        self._take(member, stream)
                    checksum = stream.checksum()
            except DamagedShardError as error:
                self._cut = next(reversed(self._samples), None)
                self._found(error.fault, error.what, offset=error.offset)
            except (OSError, ConfigError) as error:
                self._found(Fault.UNREADABLE, f"it cannot be read: {error}")
        samples = self._table()
        return ShardScan(self._file, samples, checksum, self._all_findings(), len(self._samples) - samples.num_rows)

    def _take(self, member: Member, stream: ShardStream) -> None:
        """Put a member into its sample, with its hash or label."""
        if (split := split_name(member.name)) is None:
            return
        key, extension = split
        if runs_code(extension):
            self._found(Fault.CODE, f"the member {member.name!r} is a pickle by its name", key=key, offset=member.offset)
            return
        sample = self._samples.get(key)
        if sample is None:
            sample = self._samples[key] = _Sample()
        if extension in sample.members:
            sample.refused = True
            what = f"it holds {extension!r} twice, at bytes {sample.members[extension].offset} and {member.offset}"
            self._found(Fault.DUPLICATE, what, key=key, offset=member.offset)
            return
        sample.members[extension] = member
        kind = kind_of(extension)
        if kind in IMAGE_EXTENSIONS:
            sample.hashes[extension] = self._hash(key, member, stream)
        elif kind in ("cls", "json"):
            self._take_metadata(sample, extension, member, stream)

    def _hash(self, key: str, member: Member, stream: ShardStream) -> int:
        if self._inspect is None or member.size > _MAX_IMAGE_BYTES:
            if self._inspect is not None:
                self._found(Fault.IMAGE, f"an image file of {member.size} bytes", key=key, offset=member.offset)
            if member.size <= WINDOW_BYTES:
                return self._hash_bytes(stream.take(member.size))
            state = self._hash_pieces()
            for piece in stream.pieces(member.size):
                state.update(piece)
            return int(state.intdigest())
        content = stream.read(member.size)
        try:
            self._inspect(content)
        except ImageError as error:
            self._found(Fault.IMAGE, f"the image {member.name!r}: {error}", key=key, offset=member.offset)
        return self._hash_bytes(content)

    def _take_metadata(self, sample: _Sample, extension: str, member: Member, stream: ShardStream) -> None:
        """Read a label and the picture's source; what is wrong is kept until it is known whether this member counts."""
        if member.size > _MAX_METADATA_BYTES:
            sample.labels[extension] = f"{member.name!r} has {member.size} bytes"
            return
        content = stream.read(member.size)
        if kind_of(extension) == "cls":
            sample.labels[extension] = _label_of_cls(content)
            return
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError) as error:
            sample.labels[extension] = f"{member.name!r} is no JSON: {error}"
            return
        if not isinstance(fields, dict):
            return
        if "source" in fields:
            sample.source = str(fields["source"]).encode("utf-8", "backslashreplace").decode()
        if self._label_field is not None:
            absent = f"{member.name!r} has no field {self._label_field!r}"
            sample.labels[extension] = _valid_label(fields[self._label_field]) if self._label_field in fields else absent
        elif isinstance(label := _valid_label(fields.get("label", fields.get("cls"))), int):
            sample.labels[extension] = label

    def _label(self, key: str, sample: _Sample, image: str) -> int | None:
        """The label of a sample, -1 without one, None when it cannot be told: `cls` first, then `json`.

        Members named as the image is (`v2.cls` for `v2.jpeg`) come before plain ones. With a chosen field, JSON comes first.
        """
        stem = image.removesuffix(kind_of(image))
        kinds = ("json", "cls") if self._label_field is not None else ("cls", "json")
        for extension in [name for kind in kinds for name in dict.fromkeys((stem + kind, kind))]:
            found = sample.labels.get(extension)
            if isinstance(found, int):
                return found
            if found is not None:
                self._found(Fault.LABEL, found, key=key, offset=sample.members[extension].offset)
                return None
        return NO_LABEL

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        for key, sample in self._samples.items():
            images = image_extensions(sample.members)
            first = next(iter(sample.members.values())).offset
            if sample.refused or (key == self._cut and not images):
                continue
            if len(images) != 1:
                fault, what = Fault.NO_IMAGE, f"its members {', '.join(sample.members)} hold no image"
                if images:
                    fault, what = Fault.SEVERAL_IMAGES, f"it could be any of the images {', '.join(images)}"
                self._found(fault, what, key=key, offset=first)
                continue
            extension, mask = images[0], sample.members.get(MASK_EXTENSION)
            if (label := self._label(key, sample, extension)) is None:
                continue
            image = sample.members[extension]
            where = (key, extension, image.offset, image.size, label, sample.source or key, sample.hashes[extension])
            members = ",".join(sorted(sample.members))
            yield (*where, mask.offset if mask else None, mask.size if mask else None, members)

    def _table(self) -> pa.Table:
        fields = list(SAMPLES_SCHEMA)[1:]
        columns = list(zip(*self._rows(), strict=True)) or [()] * len(fields)
        shard = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(columns[0]), np.int32)), pa.array([self._file.name]))
        arrays = [pa.array(column, type=field.type) for column, field in zip(columns, fields, strict=True)]
        return pa.Table.from_arrays([shard, *arrays], schema=SAMPLES_SCHEMA)


def scan_shard(file: ShardFile, *, label_field: str | None = None, inspect: Inspect | None = None) -> ShardScan:
    """Read a shard once.

    Args:
        file: The shard.
        label_field: Field of the member `json` that holds the label; by default `label` or `cls`, after the member `cls`.
        inspect: Called with the bytes of every image; raises ImageError for one that is bad.
    """
    return ShardScanner(file, label_field=label_field, inspect=inspect).scan()
