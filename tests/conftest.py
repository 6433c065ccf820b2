"""What tests of several rooms read."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from crate_ray.data import build_source


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded handwritten digits as shards: train, validation and test below this folder."""
    folder = tmp_path_factory.mktemp("digits")
    build_source("digits", str(folder))
    return folder


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """URL of a bucket of an S3 server on this machine."""
    from moto.server import ThreadedMotoServer
    from pyarrow import fs

    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ACCESS_KEY_ID", "test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    query = f"endpoint_override={host}%3A{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    store, _ = fs.FileSystem.from_uri(f"s3://runs-bucket?{query}")
    store.create_dir("runs-bucket")
    yield f"s3://runs-bucket?{query}"
    server.stop()
    patch.undo()
