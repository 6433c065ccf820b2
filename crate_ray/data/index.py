"""The index of a folder of shards: where every image lies, what it is, and what its bytes hash to.

In: a folder of tar shards, ours or anyone's. Out: `samples.parquet` and `shards.parquet` beside them, and `ShardIndex`.
One row a sample costs about 30 bytes on disk and buys random access, exact counts and a checksum for every read;
the price is one pass over foreign shards before they can be used. The format is described in docs/data_format.md.
"""

import hashlib
import io
import json
import logging
import mmap
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crate_ray import storage
from crate_ray.config import ConfigError
from crate_ray.data.shards import Buffer, Sample, group_samples, walk_tar

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
SAMPLES_FILE = "samples.parquet"
SHARDS_FILE = "shards.parquet"
NO_LABEL = -1

_SAMPLES_SCHEMA = pa.schema(
    [
        ("shard", pa.dictionary(pa.int32(), pa.string())),
        ("key", pa.string()),
        ("extension", pa.dictionary(pa.int32(), pa.string())),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("label", pa.int64()),
        ("source", pa.string()),
        ("xxh3", pa.uint64()),
        ("mask_offset", pa.int64()),
        ("mask_size", pa.int64()),
    ]
)
_SHARDS_SCHEMA = pa.schema([("name", pa.string()), ("bytes", pa.int64()), ("count", pa.int64()), ("checksum", pa.string())])


@dataclass(frozen=True)
class ShardIndex:
    """The samples of a folder of shards; the id of a sample is its row.

    Attributes:
        url: The folder.
        samples: Columns shard, key, extension, offset, size, label, source, xxh3, mask_offset, mask_size; in shard order.
        shards: Columns name, bytes, count, checksum; sorted by name.
        num_classes: Number of classes of the data set; 0 without labels.
    """

    url: str
    samples: pa.Table
    shards: pa.Table
    num_classes: int

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return int(self.samples.num_rows)

    @cached_property
    def shard_names(self) -> list[str]:
        """Name of each shard."""
        return [str(name) for name in self.shards["name"].to_pylist()]

    @cached_property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples in each shard."""
        return tuple(int(count) for count in self.shards["count"].to_pylist())

    @cached_property
    def shard_of(self) -> NDArray[np.int64]:
        """The shard of each sample, (N,)."""
        return np.repeat(np.arange(len(self.shard_sizes)), self.shard_sizes)

    def column(self, name: str) -> NDArray[Any]:
        """A column of `samples` as a numpy array, (N,)."""
        return np.asarray(self.samples[name].to_numpy())

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Label of each sample, (N,); -1 where there is none."""
        return self.column("label")

    @cached_property
    def sources(self) -> NDArray[np.object_]:
        """Id of the picture each sample was made from, (N,) of str; its key where the shards do not say."""
        return self.column("source")

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the names, sizes and checksums of the shards; independent of where they lie."""
        rows = zip(self.shard_names, self.shards["bytes"].to_pylist(), self.shards["checksum"].to_pylist(), strict=True)
        return hashlib.sha256("".join(f"{name}\t{size}\t{checksum}\n" for name, size, checksum in rows).encode()).hexdigest()

    def locate(self, sample_id: int) -> str:
        """Describe where a sample lies, for messages."""
        row = self.samples.slice(sample_id, 1).to_pylist()[0]
        return f"sample {row['key']!r} at byte {row['offset']} of shard {storage.join(self.url, row['shard'])}"


def read_shard(uri: str) -> Buffer:
    """The bytes of a shard: a memory map of a local file, a download of a remote one."""
    if not storage.is_local(uri):
        return storage.read_bytes(uri)
    with storage.local_path(uri).open("rb") as file:
        if file.seek(0, io.SEEK_END) == 0:
            raise ConfigError(f"shard {uri} is empty; write or copy it again")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _metadata(sample: Sample, data: Buffer, shard: str) -> tuple[int, str]:
    """Label and source of a sample: from `cls`, else from the fields `label` or `cls` of `json`, else none."""
    label, source = NO_LABEL, sample.key
    for extension in ("json", "cls"):
        if (member := sample.members.get(extension)) is None:
            continue
        content = bytes(data[member.offset : member.offset + member.size])
        try:
            if extension == "cls":
                label = int(content)
            elif isinstance(fields := json.loads(content), dict):
                found = fields.get("label", fields.get("cls"))
                label = found if isinstance(found, int) and found >= 0 else NO_LABEL
                source = str(fields.get("source", source))
        except ValueError as error:
            raise ConfigError(f"shard {shard}: {member.name!r} at byte {member.offset} is no label: {error}") from None
    return label, source


def _sample_row(sample: Sample, extension: str, data: Buffer, shard: str) -> dict[str, Any]:
    from xxhash import xxh3_64_intdigest

    image, mask = sample.members[extension], sample.members.get("mask.png")
    label, source = _metadata(sample, data, shard)
    return {
        "shard": shard,
        "key": sample.key,
        "extension": extension,
        "offset": image.offset,
        "size": image.size,
        "label": label,
        "source": source,
        "xxh3": xxh3_64_intdigest(data[image.offset : image.offset + image.size]),
        "mask_offset": mask.offset if mask else None,
        "mask_size": mask.size if mask else None,
    }


def scan_shard(uri: str, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Walk one shard and return its row of `shards.parquet` and the rows of its samples.

    Raises:
        ConfigError: For a damaged archive, a label that is not a number, or a shard without an image.
    """
    from xxhash import xxh3_128_hexdigest

    data = read_shard(uri)
    samples = group_samples(walk_tar(data, name), name)
    rows = [_sample_row(sample, extension, data, name) for sample in samples if (extension := sample.image_extension())]
    if not rows:
        raise ConfigError(f"shard {uri} holds no image: samples need a member named KEY.jpg, .jpeg, .png or .webp")
    if len(rows) < len(samples):
        logger.warning("shard %s: %d of %d samples have no image and are left out", uri, len(samples) - len(rows), len(samples))
    return {"name": name, "bytes": len(data), "count": len(rows), "checksum": xxh3_128_hexdigest(data)}, rows


def _parquet_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())


def build_index(url: str, *, num_classes: int | None = None) -> ShardIndex:
    """Index a folder of shards and write the two tables beside them.

    Args:
        url: Folder that holds `*.tar`, local or remote (a remote shard is downloaded once to be scanned).
        num_classes: Classes of the data set; by default the largest label plus one.

    Raises:
        ConfigError: For a folder without shards, or a shard that cannot be trusted.
    """
    names = [name for name in storage.list_dir(url) if name.endswith(".tar")]
    if not names:
        raise ConfigError(f"no *.tar shards in {url}; give the folder that holds them (compressed archives are not supported)")
    shard_rows, sample_tables = [], []
    for name in names:
        shard, rows = scan_shard(storage.join(url, name), name)
        shard_rows.append(shard)
        sample_tables.append(pa.Table.from_pylist(rows, schema=_SAMPLES_SCHEMA))
    samples = pa.concat_tables(sample_tables).unify_dictionaries().combine_chunks()
    shards = pa.Table.from_pylist(shard_rows, schema=_SHARDS_SCHEMA)
    largest = int(samples["label"].to_numpy().max())
    if num_classes is not None and largest >= num_classes:
        raise ConfigError(
            f"{url} has the label {largest}, but only {num_classes} classes; labels run from 0 to {num_classes - 1}"
        )
    metadata = {"schema_version": str(SCHEMA_VERSION), "num_classes": str(largest + 1 if num_classes is None else num_classes)}
    for file_name, table in ((SAMPLES_FILE, samples), (SHARDS_FILE, shards)):
        storage.write_atomic(storage.join(url, file_name), _parquet_bytes(table.replace_schema_metadata(metadata)))
    return ShardIndex(url, samples, shards, int(metadata["num_classes"]))


def _without_index(url: str, file_name: str) -> str:
    """What is wrong with a folder that should hold an index, and what to do."""
    if not storage.exists(url):
        return (
            f"{url} does not exist; data.train, data.eval and data.test are folders of shards with their index, which "
            "`crate-ray data build SOURCE OUT` writes (`crate-ray data build digits data/digits` for the digits recipes)"
        )
    splits = [name for name in storage.list_dir(url) if storage.exists(storage.join(url, name, file_name))]
    if splits:
        return f"{url} holds the splits {', '.join(splits)}, not shards; name one of them: {storage.join(url, splits[-1])}"
    return f"{url} has no index ({file_name}); run `crate-ray data index {url}`"


def _read_table(url: str, file_name: str, schema: pa.Schema) -> tuple[pa.Table, int]:
    """A table of the index and the number of classes its metadata states."""
    uri = storage.join(url, file_name)
    if not storage.exists(uri):
        raise ConfigError(_without_index(url, file_name))
    try:
        table = pq.read_table(pa.BufferReader(storage.read_bytes(uri)))
        metadata = table.schema.metadata or {}
        version, num_classes = int(metadata[b"schema_version"]), int(metadata[b"num_classes"])
        if version == SCHEMA_VERSION:
            return table.select(schema.names).cast(schema), num_classes
    except (pa.ArrowInvalid, KeyError, ValueError) as error:
        raise ConfigError(f"{uri} is not an index of crate-ray ({error}); run `crate-ray data index {url}`") from None
    raise ConfigError(
        f"{uri} has schema_version {version}, this release reads {SCHEMA_VERSION}; run `crate-ray data index {url}`"
    )


def load_index(url: str) -> ShardIndex:
    """Read the index of a folder of shards.

    Raises:
        ConfigError: When the folder or its index does not exist, is of another version, or holds no samples.
    """
    shards, _ = _read_table(url, SHARDS_FILE, _SHARDS_SCHEMA)
    samples, num_classes = _read_table(url, SAMPLES_FILE, _SAMPLES_SCHEMA)
    index = ShardIndex(url, samples.unify_dictionaries().combine_chunks(), shards, num_classes)
    if index.num_samples == 0:
        raise ConfigError(f"{url} holds no samples; build it again or point at another folder")
    if sum(index.shard_sizes) != index.num_samples:
        raise ConfigError(f"{url}: {SAMPLES_FILE} and {SHARDS_FILE} disagree; run `crate-ray data index {url}`")
    return index


def _verify_shard(url: str, indexed: dict[str, Any]) -> str | None:
    """What is wrong with one shard of the index, if anything."""
    uri = storage.join(url, indexed["name"])
    if not storage.exists(uri):
        return f"shard {uri} is missing"
    try:
        found, _ = scan_shard(uri, indexed["name"])
    except ConfigError as error:
        return str(error)
    changed = [f"{key} {found[key]} (indexed {value})" for key, value in indexed.items() if found[key] != value]
    return f"shard {uri} has changed: {', '.join(changed)}" if changed else None


def verify_index(url: str) -> list[str]:
    """Compare shards with their index and return what does not agree, one sentence a shard; empty when all is well.

    Raises:
        ConfigError: When there is no index to compare with.
    """
    index = load_index(url)
    problems = [problem for row in index.shards.to_pylist() if (problem := _verify_shard(url, row))]
    unknown = {name for name in storage.list_dir(url) if name.endswith(".tar")} - set(index.shard_names)
    problems += [f"shard {storage.join(url, name)} is not in the index; index the folder again" for name in sorted(unknown)]
    return problems
