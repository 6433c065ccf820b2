"""Making an index: every shard is scanned once, and the tables are put together without holding them.

In: shards that anyone wrote. Out: `samples.parquet` and `shards.parquet`, beside the shards or in a folder of their own.
The rows of each shard are put down as soon as it is done, so that an interrupted or refused indexing does not read it again;
the last step joins these parts in the order of the shards. Memory is that of one shard's rows and one row group. The
price is a small file for each shard, for as long as the indexing lasts.
"""

import hashlib
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from crate_ray import storage
from crate_ray.config import ConfigError
from crate_ray.data.findings import DAMAGED_SAMPLE, DAMAGED_SHARD, DamagedDataError, Fault, Finding, FindingLog, counted
from crate_ray.data.index import shards_digest
from crate_ray.data.listing import Listing, list_shards
from crate_ray.data.peek import peek
from crate_ray.data.scan import ShardFile, ShardScan, scan_shard
from crate_ray.data.schema import NO_LABEL, SAMPLES_FILE, SAMPLES_SCHEMA, SCHEMA_VERSION, SHARDS_FILE, SHARDS_SCHEMA
from crate_ray.data.workers import TaskMap, map_here

logger = logging.getLogger(__name__)

PARTS_FOLDER = ".index-parts"
_UNWRITABLE = "make room there, or choose a folder of your own with --out DIR"
_ROW_GROUP = 16_384  # samples; while one is written, several copies of it are in memory
_WRITE_ERRORS: tuple[type[Exception], ...] = (OSError, pa.ArrowException)

Progress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class IndexSummary:
    """What an indexing wrote.

    Attributes:
        url: The folder of the tables.
        digest: Digest of the shards.
        num_samples: Samples in the index.
        num_shards: Shards in the index.
        bytes: Of all its shards.
        num_classes: Classes of the data set; 0 without labels.
        num_labelled: Samples with a label.
        left_out_shards: Shards that are damaged and not in the index.
        left_out_samples: Samples of the indexed shards that are not in the index: without an image, or damaged.
        resumed_shards: Shards that an earlier indexing, interrupted or refused, had read.
        findings: What was wrong.
        json_fields: Where no sample has a label: the fields of the first member `json`, one of which may hold it.
    """

    url: str
    digest: str
    num_samples: int
    num_shards: int
    bytes: int
    num_classes: int
    num_labelled: int
    left_out_shards: int
    left_out_samples: int
    resumed_shards: int
    findings: tuple[Finding, ...]
    json_fields: tuple[str, ...]


@contextmanager
def writing_to(place: str, fix: str, errors: tuple[type[Exception], ...] = _WRITE_ERRORS) -> Iterator[None]:
    """Say of a place that it cannot be written, or that its disk is full, and what to do about it."""
    try:
        yield
    except errors as error:
        raise ConfigError(f"{place} cannot be written ({error}); {fix}") from None


class _Parts:
    """The finished shards of an indexing that is under way, one file each; keyed by what decides their rows."""

    def __init__(self, folder: str, label_field: str | None) -> None:
        self._out, self._folder, self._label_field = folder, storage.join(folder, PARTS_FOLDER), label_field
        with writing_to(folder, _UNWRITABLE, (*_WRITE_ERRORS, ConfigError)):  # also of a store that is read only
            storage.make_dir(self._folder)
            self._there = set(storage.list_dir(self._folder))

    def _name(self, file: ShardFile) -> str:
        stated = [SCHEMA_VERSION, file.name, file.uri, file.size, file.modified, file.etag, self._label_field]
        return hashlib.sha256(json.dumps(stated).encode()).hexdigest()[:32] + ".parquet"

    def write(self, scan: ShardScan) -> None:
        findings = [asdict(finding) for finding in scan.findings]
        stated = {"checksum": scan.checksum, "left_out": scan.left_out, "findings": findings}
        table = scan.samples.replace_schema_metadata({"scan": json.dumps(stated)})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        with writing_to(self._out, _UNWRITABLE):
            storage.write_atomic(storage.join(self._folder, self._name(scan.file)), bytes(sink.getvalue()))

    def read(self, file: ShardFile) -> ShardScan | None:
        """What is known of a shard that has not changed since it was scanned."""
        if (name := self._name(file)) not in self._there:
            return None
        try:
            table = pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(self._folder, name))))
            stated = json.loads(table.schema.metadata[b"scan"])
            findings = [Finding(**{**row, "fault": Fault(row["fault"])}) for row in stated["findings"]]
            return ShardScan(file, table.cast(SAMPLES_SCHEMA), stated["checksum"], findings, stated["left_out"])
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
            logger.warning("%s cannot be read; its shard is scanned again", name)
            return None

    def note(self, file: ShardFile) -> None:
        self._there.add(self._name(file))

    def remove(self) -> None:
        storage.delete(self._folder)


@dataclass
class _Totals:
    """What is kept of the shards while they are scanned: a row each, and findings."""

    rows: dict[str, dict[str, Any]]
    findings: FindingLog
    left_out_samples: int = 0
    num_samples: int = 0
    num_labelled: int = 0
    largest_label: int = NO_LABEL
    done: int = 0
    resumed: int = 0

    def add(self, scan: ShardScan) -> None:
        self.done += 1
        self.findings.add(scan.findings)
        if any(finding.fault in DAMAGED_SHARD for finding in scan.findings):
            return
        if scan.samples.num_rows:
            self.rows[scan.file.name] = scan.shard_row()
        self.left_out_samples += scan.left_out
        labels = scan.samples["label"]
        self.num_samples += len(labels)
        self.num_labelled += int(pc.sum(pc.greater_equal(labels, 0)).as_py() or 0)
        self.largest_label = max(self.largest_label, pc.max(labels).as_py() or NO_LABEL)


def _scan_all(
    files: list[ShardFile], parts: _Parts, totals: _Totals, scan: Callable[[ShardFile], ShardScan], task_map: TaskMap
) -> Iterator[None]:
    """Take what earlier passes left, scan the rest, and keep every part; yields after each shard."""
    missing = []
    for file in files:
        if (known := parts.read(file)) is None:
            missing.append(file)
            continue
        totals.add(known)
        totals.resumed += 1
        yield
    for _, found in task_map(scan, missing):
        if found.checksum is not None:
            parts.write(found)
            parts.note(found.file)
        totals.add(found)
        yield


def _write_samples(uri: str, files: list[ShardFile], parts: _Parts, metadata: dict[str, str]) -> None:
    """Join the parts in the order of the shards, in row groups, by way of a local file."""
    waiting: list[pa.Table] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SAMPLES_FILE
        with pq.ParquetWriter(path, SAMPLES_SCHEMA.with_metadata(metadata), compression="zstd") as writer:
            for file in [*files, None]:
                if file is not None:
                    found = parts.read(file)
                    if found is None:
                        raise ConfigError(f"the part of {file.name} is gone; is another indexing of the same shards under way?")
                    waiting.append(found.samples)
                if waiting and (file is None or sum(table.num_rows for table in waiting) >= _ROW_GROUP):
                    writer.write_table(pa.concat_tables(waiting).unify_dictionaries().combine_chunks())
                    waiting.clear()
        storage.write_atomic(uri, path.read_bytes())


def _refuse_archives(url: str, listing: Listing) -> None:
    """Refuse a tar of tars, as ImageNet is published, before all of it is read; a local one, where a look costs nothing."""
    first = listing.files[0]
    if first.size > 0 and storage.is_local(first.uri) and peek(first).extensions == {"tar"}:
        raise ConfigError(
            f"{url} was not indexed: {first.name} holds archives, not images; unpack these, and if it is ImageNet "
            "write shards with `crate-ray data build imagenet:DIR OUT` (DIR holds train/ and val/)"
        )


def _refuse_field(url: str, file: ShardFile, totals: _Totals, label_field: str | None) -> None:
    """Refuse a field that no sample has in one line, rather than in one a sample."""
    fields = peek(file).json_fields
    if label_field is None or totals.num_labelled or not fields or label_field in fields:
        return
    labels = [finding for finding in totals.findings.sorted() if finding.fault == Fault.LABEL]
    having = counted(totals.findings.counts[Fault.LABEL], "sample")
    heading = f"{url} was not indexed: the json of {having} has no field {label_field!r} ({Fault.LABEL})"
    raise DamagedDataError(f"{heading}; fields are {', '.join(fields)}", labels, listed=False)


def _refuse(url: str, totals: _Totals, *, skip_damaged: bool) -> None:
    """Refuse what is damaged, unless it is to be left out; refuse an index of nothing in any case."""
    refused = DAMAGED_SHARD | DAMAGED_SAMPLE
    count = sum(totals.findings.counts[fault] for fault in refused)
    if count and not skip_damaged:
        heading = (
            f"{url} was not indexed: {counted(count, 'fault')}. Repair the shards and index again "
            "(whole ones are not read again), or leave out what is damaged with --skip-damaged:"
        )
        raise DamagedDataError(heading, (finding for finding in totals.findings.sorted() if finding.fault in refused))
    if not totals.rows:
        raise DamagedDataError(
            f"{url} holds no image: samples need a member named KEY.jpg, .jpeg, .jpe, .png or .webp", totals.findings.sorted()
        )


def _warn(findings: list[Finding], counts: Counter[Fault]) -> None:
    """One line for each kind of fault, with its first case."""
    for fault, count in counts.items():
        first = next(finding for finding in findings if finding.fault == fault)
        logger.warning("%s: %d found, the first in %s: %s; %s", fault, count, first.place, first.what, first.fix)


def _num_classes(url: str, largest_label: int, num_classes: int | None) -> int:
    if num_classes is not None and largest_label >= num_classes:
        raise ConfigError(
            f"{url} has the label {largest_label}, but only {num_classes} classes; labels run from 0 to {num_classes - 1}"
        )
    return largest_label + 1 if num_classes is None else num_classes


def _write_tables(listing: Listing, out: str, parts: _Parts, totals: _Totals, stated: dict[str, str]) -> list[dict[str, Any]]:
    """Write both tables, and into both what shows that they belong together; return the rows of `shards.parquet`."""
    metadata = {"schema_version": str(SCHEMA_VERSION), "pattern": listing.pattern, **stated}
    is_beside = storage.absolute(out) == storage.absolute(listing.folder)
    if not is_beside:
        metadata["shards_url"] = storage.join(storage.absolute(listing.folder), listing.pattern)
    files = [file for file in listing.files if file.name in totals.rows]
    rows = [totals.rows[file.name] | {"uri": None if is_beside else storage.absolute(file.uri)} for file in files]
    metadata["pair"] = hashlib.sha256(json.dumps([rows, metadata]).encode()).hexdigest()
    _write_samples(storage.join(out, SAMPLES_FILE), files, parts, metadata)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=SHARDS_SCHEMA.with_metadata(metadata)), sink, compression="zstd")
    storage.write_atomic(storage.join(out, SHARDS_FILE), bytes(sink.getvalue()))
    return rows


def build_index(
    url: str,
    *,
    out: str | None = None,
    num_classes: int | None = None,
    label_field: str | None = None,
    skip_damaged: bool = False,
    record_times: bool = True,
    task_map: TaskMap = map_here,
    progress: Progress | None = None,
) -> IndexSummary:
    """Index shards that anyone wrote; the same call again continues where an interrupted one stopped.

    Args:
        url: Folder of `*.tar`, one shard, or a pattern (`in-{0000..1023}.tar`, `part-*.tar`), local or remote.
        out: Folder of the tables; by default that of the shards. Elsewhere, the index holds the shards' URIs.
        num_classes: Classes of the data set; by default the largest label plus one.
        label_field: Field of the member `json` that holds the label; by default `label` or `cls`, after the member `cls`.
        skip_damaged: Leave out damaged shards and samples, and count them, instead of refusing.
        record_times: Write down when each shard was last changed, or its etag; without, equal shards have equal indexes.
        task_map: Who scans the shards.
        progress: Called with the shards done, the shards in all and the samples found.

    Raises:
        DamagedDataError: For shards that cannot be trusted, with every finding.
        ConfigError: For a URL without shards, a folder that cannot be written, or labels beyond `num_classes`.
    """
    listing = list_shards(url)
    _refuse_archives(url, listing)
    target = listing.folder if out is None else out
    parts, totals = _Parts(target, label_field), _Totals({}, FindingLog())
    for _ in _scan_all(listing.files, parts, totals, partial(scan_shard, label_field=label_field), task_map):
        if progress:
            progress(totals.done, len(listing.files), totals.num_samples)
    if totals.findings.counts[Fault.LABEL]:
        _refuse_field(url, listing.files[0], totals, label_field)
    _refuse(url, totals, skip_damaged=skip_damaged)
    classes = _num_classes(url, totals.largest_label, num_classes)
    stated = {"num_classes": str(classes), "label_field": label_field or ""}
    if not record_times:
        for row in totals.rows.values():
            row["modified"] = row["etag"] = None
    with writing_to(target, _UNWRITABLE):
        rows = _write_tables(listing, target, parts, totals, stated)
    parts.remove()
    findings = totals.findings.sorted()
    _warn(findings, totals.findings.counts)
    return IndexSummary(
        target,
        shards_digest((row["name"], row["bytes"], row["checksum"]) for row in rows),
        totals.num_samples,
        len(rows),
        sum(row["bytes"] for row in rows),
        classes,
        totals.num_labelled,
        len(listing.files) - len(rows),
        totals.left_out_samples,
        totals.resumed,
        tuple(findings),
        () if totals.num_labelled else peek(next(file for file in listing.files if file.name in totals.rows)).json_fields,
    )
