"""Files by URI: a local path, an object store (s3, gs, abfs, hdfs), or a web server and the Hugging Face hub, read only.

In: URIs. Out: bytes, listings, atomic writes. Faults of a remote store that may pass are tried again until a deadline; what
cannot pass is raised at once; every read is whole or an error. Credentials come from the provider chain, never from a URI.
"""

from crate_ray.storage.files import (
    check_writable,
    delete,
    exists,
    free_bytes,
    is_dir,
    list_dir,
    make_dir,
    open_input,
    read_bytes,
    read_text,
    size,
    write_atomic,
)
from crate_ray.storage.remote import RemoteFile, open_store
from crate_ray.storage.retry import StorageError, retry_deadline
from crate_ray.storage.uris import absolute, is_local, join, local_path, scheme
from crate_ray.storage.words import bytes_in_words

__all__ = [
    "RemoteFile",
    "StorageError",
    "absolute",
    "bytes_in_words",
    "check_writable",
    "delete",
    "exists",
    "free_bytes",
    "is_dir",
    "is_local",
    "join",
    "list_dir",
    "local_path",
    "make_dir",
    "open_input",
    "open_store",
    "read_bytes",
    "read_text",
    "retry_deadline",
    "scheme",
    "size",
    "write_atomic",
]
