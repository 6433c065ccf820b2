"""The index of a set of shards: where every image lies, what it is, and what its bytes hash to.

In: a folder with `samples.parquet` and `shards.parquet`, which `build_index` writes. Out: `ShardIndex`.
One row a sample costs about 30 bytes on disk and buys random access, exact counts and a checksum for every read;
the price is one pass over foreign shards before they can be used. The format is described in docs/data_format.md.
"""

import hashlib
import io
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crate_ray import storage
from crate_ray.config import ConfigError
from crate_ray.data.schema import OPTIONAL_COLUMNS, SAMPLES_FILE, SAMPLES_SCHEMA, SCHEMA_VERSION, SHARDS_FILE, SHARDS_SCHEMA
from crate_ray.data.shards import Buffer


def shards_digest(rows: Iterable[tuple[str, int, str]]) -> str:
    """SHA-256 over names, sizes and checksums of shards, sorted by name."""
    return hashlib.sha256("".join(f"{name}\t{size}\t{checksum}\n" for name, size, checksum in rows).encode()).hexdigest()


@dataclass(frozen=True)
class ShardIndex:
    """The samples of a folder of shards; the id of a sample is its row.

    Attributes:
        url: The folder of the tables; the shards lie there too where their rows state no URI.
        samples: Columns shard, key, extension, offset, size, label, source, xxh3, mask_offset, mask_size, members; in shard
            order.
        shards: Columns name, bytes, count, checksum, modified, uri, etag; sorted by name.
        num_classes: Number of classes of the data set; 0 without labels.
        shards_url: Folder and pattern that were indexed.
        label_field: Field of `json` that the labels were read from; None for the usual places.
        first_ids: The first sample id of each data set of a mix.
    """

    url: str
    samples: pa.Table
    shards: pa.Table
    num_classes: int
    shards_url: str
    label_field: str | None
    first_ids: tuple[int, ...] = (0,)

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return int(self.samples.num_rows)

    @cached_property
    def shard_names(self) -> list[str]:
        """Name of each shard."""
        return [str(name) for name in self.shards["name"].to_pylist()]

    @cached_property
    def shard_uris(self) -> list[str]:
        """Where each shard lies: beside the tables, unless the index says otherwise."""
        stated = self.shards["uri"].to_pylist()
        return [uri or storage.join(self.url, name) for name, uri in zip(self.shard_names, stated, strict=True)]

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
        return shards_digest(zip(*(self.shards[name].to_pylist() for name in ("name", "bytes", "checksum")), strict=True))

    def locate(self, sample_id: int) -> str:
        """Describe where a sample lies, for messages."""
        row = self.samples.slice(sample_id, 1).to_pylist()[0]
        return f"sample {row['key']!r} at byte {row['offset']} of shard {self.shard_uris[self.shard_of[sample_id]]}"


def read_shard(uri: str) -> Buffer:
    """A memory map of a local shard."""
    with storage.local_path(uri).open("rb") as file:
        if file.seek(0, io.SEEK_END) == 0:
            raise ConfigError(f"shard {uri} is empty; write or copy it again")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


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


def has_index(url: str) -> bool:
    """Whether a folder holds the tables of an index."""
    return storage.exists(storage.join(url, SHARDS_FILE))


def _complete(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of a schema, with nulls for those that an earlier release did not write."""
    for name in OPTIONAL_COLUMNS & set(schema.names) - set(table.column_names):
        table = table.append_column(schema.field(name), pa.nulls(table.num_rows, schema.field(name).type))
    return table.select(schema.names).cast(schema)


def _read_table(url: str, file_name: str, schema: pa.Schema) -> tuple[pa.Table, dict[bytes, bytes]]:
    """A table of the index and its metadata."""
    uri = storage.join(url, file_name)
    if not storage.exists(uri):
        raise ConfigError(_without_index(url, file_name))
    try:
        table = pq.read_table(pa.BufferReader(storage.read_bytes(uri)))
        metadata = dict(table.schema.metadata or {})
        version = int(metadata[b"schema_version"])
        if version == SCHEMA_VERSION:
            int(metadata[b"num_classes"])
            return _complete(table, schema), metadata
    except storage.StorageError:
        raise
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ConfigError(f"{uri} is not an index of crate-ray ({error}); run `crate-ray data index {url}`") from None
    raise ConfigError(
        f"{uri} has schema_version {version}, this release reads {SCHEMA_VERSION}; run `crate-ray data index {url}`"
    )


def load_index(url: str) -> ShardIndex:
    """Read the index of a set of shards.

    Raises:
        ConfigError: When the folder or its index does not exist, is of another version, or holds no samples.
    """
    shards, beside = _read_table(url, SHARDS_FILE, SHARDS_SCHEMA)
    samples, metadata = _read_table(url, SAMPLES_FILE, SAMPLES_SCHEMA)
    shards_url = metadata.get(b"shards_url", b"").decode() or storage.join(url, metadata.get(b"pattern", b"*.tar").decode())
    samples = samples.unify_dictionaries().combine_chunks()
    index = ShardIndex(
        url, samples, shards, int(metadata[b"num_classes"]), shards_url, metadata.get(b"label_field", b"").decode() or None
    )
    if index.num_samples == 0:
        raise ConfigError(f"{url} holds no samples; build it again or point at another folder")
    pairs = {stated[b"pair"] for stated in (beside, metadata) if b"pair" in stated}
    if len(pairs) > 1 or sum(index.shard_sizes) != index.num_samples:
        raise ConfigError(f"{url}: {SAMPLES_FILE} and {SHARDS_FILE} disagree; index again: `crate-ray data index {url}`")
    return index
