"""What kind of archive a shard is, told from its first sample.

In: a shard. Out: the extensions and the JSON fields of its first members, for messages that say what to do next. A window
of the file is read. Later samples may differ: what is seen here is not known of all of them.
"""

import json
from dataclasses import dataclass
from itertools import islice

from crate_ray.config import ConfigError
from crate_ray.data.scan import ShardFile, open_shard
from crate_ray.data.shards import kind_of, split_name
from crate_ray.data.tar import DamagedShardError, walk_tar

_MEMBERS = 16
_MAX_JSON_BYTES = 1 << 20


@dataclass(frozen=True)
class Peek:
    """What the first members of a shard are.

    Attributes:
        extensions: Of the members, as webdataset splits their names.
        json_fields: Of the first member `json`, sorted; empty without one.
    """

    extensions: frozenset[str]
    json_fields: tuple[str, ...]


def peek(file: ShardFile) -> Peek:
    """Look at the first members of a shard; one that cannot be read shows nothing."""
    extensions, fields = set(), tuple[str, ...]()
    try:
        with open_shard(file) as stream:
            for member in islice(walk_tar(stream), _MEMBERS):
                if (split := split_name(member.name)) is None:
                    continue
                extensions.add(split[1])
                if kind_of(split[1]) == "json" and not fields and member.size <= _MAX_JSON_BYTES:
                    found = json.loads(stream.read(member.size))
                    fields = tuple(sorted(found)) if isinstance(found, dict) else ()
    except (DamagedShardError, ConfigError, OSError, ValueError, RecursionError):
        pass  # the scan says what is wrong
    return Peek(frozenset(extensions), fields)
