"""The columns of the two tables of an index. docs/data_format.md explains them to other tools."""

import pyarrow as pa

SCHEMA_VERSION = 1
SAMPLES_FILE = "samples.parquet"
SHARDS_FILE = "shards.parquet"
NO_LABEL = -1

SAMPLES_SCHEMA = pa.schema(
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
        ("members", pa.dictionary(pa.int32(), pa.string())),
    ]
)
SHARDS_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("bytes", pa.int64()),
        ("count", pa.int64()),
        ("checksum", pa.string()),
        ("modified", pa.int64()),
        ("uri", pa.string()),
        ("etag", pa.string()),
    ]
)
# Columns that indexes of an earlier release do not have; null there.
OPTIONAL_COLUMNS = frozenset({"modified", "uri", "etag", "members"})
