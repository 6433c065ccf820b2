"""An audit of shards: every byte is read, every image decoded, and all of it compared with the index where there is one.

In: a folder, a pattern or an index. Out: `Audit`, with every finding of every shard in one run. Nothing stops at the first
fault: what lies behind a damaged header is told from the index. Decoding costs a millisecond an image and is the only way to
find images that were broken before they were indexed; without it headers and hashes are checked at the rate of the disk.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from crate_ray import storage
from crate_ray.config import ConfigError
from crate_ray.data.findings import DAMAGED_SHARD, Fault, Finding, FindingLog
from crate_ray.data.headers import DEFAULT_MAX_PIXELS, check_size
from crate_ray.data.index import ShardIndex, has_index, load_index
from crate_ray.data.listing import list_shards
from crate_ray.data.scan import Inspect, ShardFile, ShardScan, scan_shard
from crate_ray.data.schema import NO_LABEL
from crate_ray.data.workers import TaskMap, map_here

_COMPARED = ("key", "offset", "xxh3", "label")


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        url: What was audited.
        findings: By shard and byte; empty when all is well.
        num_shards: Shards that were read.
        num_samples: Samples found in them.
        bytes: Of all of them.
        indexed: Whether there was an index to compare with.
        decoded: Whether every image was decoded.
    """

    url: str
    findings: tuple[Finding, ...]
    num_shards: int
    num_samples: int
    bytes: int
    indexed: bool
    decoded: bool


@dataclass(frozen=True)
class _Task:
    """A shard to audit, with its rows of the index if it has some; `is_new` when it lies beside an index that has none."""

    file: ShardFile
    indexed: pa.Table | None
    size: int
    checksum: str
    is_new: bool = False


def _decode(content: bytes, *, max_pixels: int) -> None:
    from crate_ray.data.images import decode

    decode(content, max_pixels=max_pixels)


def _lookup(table: pa.Table) -> dict[str, tuple[int, int, int]]:
    """Offset, hash and label of each sample by its key."""
    columns = (table[name].to_pylist() for name in _COMPARED)
    return {key: (offset, xxh3, label) for key, offset, xxh3, label in zip(*columns, strict=True)}


def _compare(task: _Task, found: ShardScan) -> Iterator[Finding]:
    """Where a shard differs from its index."""
    name = task.file.name
    if task.indexed is None or found.checksum == task.checksum or task.file.size < 0:
        return
    if task.file.size != task.size:
        yield Finding(Fault.CHANGED, name, f"it has {task.file.size} bytes, the index says {task.size}")
    expected, there = _lookup(task.indexed), _lookup(found.samples)
    explained = task.file.size != task.size
    for key, (offset, xxh3, label) in expected.items():
        if key not in there:
            explained = True
            yield Finding(Fault.LOST, name, "the sample is in the index but cannot be found", key, offset)
        elif there[key] != (offset, xxh3, label):
            explained = True
            what = (
                "its image does not have the hash in the index" if there[key][1] != xxh3 else "its place or label has changed"
            )
            yield Finding(Fault.CHANGED, name, what, key, there[key][0])
    for key in there.keys() - expected.keys():
        explained = True
        yield Finding(Fault.UNINDEXED, name, "the sample is not in the index", key, there[key][0])
    if found.checksum is not None and not explained:
        yield Finding(Fault.CHANGED, name, "its checksum is not that of the index: bytes outside of the images have changed")


def _unlabelled(found: ShardScan) -> Finding | None:
    """The samples of a shard without a label, which is a fault where others have one."""
    rows = np.flatnonzero(found.samples["label"].to_numpy() == NO_LABEL)
    if len(rows) == 0:
        return None
    first = found.samples.slice(int(rows[0]), 1).to_pylist()[0]
    what = "it has no label, though others do" + (f"; {len(rows) - 1} more in this shard" if len(rows) > 1 else "")
    return Finding(Fault.NO_LABEL, found.file.name, what, first["key"], first["offset"])


@dataclass(frozen=True)
class _Result:
    """What was found in one shard."""

    findings: list[Finding]
    num_samples: int
    is_labelled: bool
    unlabelled: Finding | None


def _audit_shard(task: _Task, *, inspect: Inspect, label_field: str | None) -> _Result:
    found = scan_shard(task.file, label_field=label_field, inspect=inspect)
    findings = [*found.findings, *_compare(task, found)]
    is_damaged = any(finding.fault in DAMAGED_SHARD for finding in findings)  # then it is left out of indexes, and may be cut
    if task.is_new and not is_damaged and found.samples.num_rows:
        findings.append(Finding(Fault.UNINDEXED, task.file.name, "the shard is not in the index"))
    is_labelled = bool((found.samples["label"].to_numpy() != NO_LABEL).any())
    return _Result(findings, found.samples.num_rows, is_labelled, None if is_damaged else _unlabelled(found))


def _file_of_row(name: str, uri: str) -> ShardFile | Finding:
    """A shard that the index names by a URI of its own, or why that URI is not read."""
    try:
        return ShardFile(name, uri, storage.size(uri), None)
    except FileNotFoundError:
        return ShardFile(name, uri, -1, None)
    except (ConfigError, OSError) as error:
        return Finding(Fault.UNREADABLE, name, str(error))


def _listed(url: str) -> dict[str, ShardFile]:
    """The shards that are there now; none when nothing is left of them."""
    try:
        return {file.name: file for file in list_shards(url).files}
    except ConfigError:
        return {}


def _indexed_tasks(index: ShardIndex) -> tuple[list[_Task], list[Finding]]:
    """A task for each shard of an index, and for each that lies beside them without being in it."""
    listed, tasks, findings, first = _listed(index.shards_url), [], list[Finding](), 0
    compared = index.samples.select(_COMPARED)  # taken, not sliced: a slice is pickled with the buffers of the whole index
    for row, uri in zip(index.shards.to_pylist(), index.shard_uris, strict=True):
        name, rows = row["name"], compared.take(pa.array(np.arange(first, first + row["count"])))
        first += row["count"]
        known = listed.pop(name, None)
        file = known if known is not None and row["uri"] in (None, storage.absolute(known.uri)) else _file_of_row(name, uri)
        if isinstance(file, Finding):
            findings.append(file)
        else:
            tasks.append(_Task(file, rows, row["bytes"], row["checksum"]))
    tasks += [_Task(file, None, 0, "", is_new=True) for file in listed.values()]
    return tasks, findings


def verify_shards(
    url: str,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    decode: bool = True,
    label_field: str | None = None,
    task_map: TaskMap = map_here,
    progress: Callable[[int, int, int], None] | None = None,
) -> Audit:
    """Read all shards and report everything that is wrong with them.

    Args:
        url: Folder of shards or of an index, one shard, or a pattern; without an index only the shards themselves are judged.
        max_pixels: Larger images are reported from their headers, and not decoded.
        decode: Decode every image; else only look at its header.
        label_field: Field of the member `json` that holds the label, where there is no index to say so.
        task_map: Who reads the shards.
        progress: Called with the shards done, the shards in all and the samples found.

    Raises:
        ConfigError: When there are no shards, or the index itself cannot be read.
    """
    inspect = partial(_decode if decode else check_size, max_pixels=max_pixels)
    findings = FindingLog()
    if is_indexed := has_index(url):
        index = load_index(url)
        tasks, unread = _indexed_tasks(index)
        findings.add(unread)
        label_field = index.label_field
    else:
        tasks = [_Task(file, None, 0, "") for file in list_shards(url).files]
    unlabelled: list[Finding] = []
    num_samples, is_labelled = 0, False
    for done, (_, result) in enumerate(task_map(partial(_audit_shard, inspect=inspect, label_field=label_field), tasks), 1):
        findings.add(result.findings)
        unlabelled += [result.unlabelled] if result.unlabelled else []
        is_labelled |= result.is_labelled
        num_samples += result.num_samples
        if progress:
            progress(done, len(tasks), num_samples)
    findings.add(unlabelled if is_labelled else [])
    num_bytes = sum(max(task.file.size, 0) for task in tasks)
    return Audit(url, tuple(findings.sorted()), len(tasks), num_samples, num_bytes, is_indexed, decode)
