"""The run folder: layout, records, status, lease, fingerprint check. No torch, ray or mlflow here."""

from crate_ray.runs.create import find_run, git_state, is_finished, open_run, record_precision, versions
from crate_ray.runs.folder import RunFolder, list_runs
from crate_ray.runs.protocols import MetricSink, NullSink, WorkerContext
from crate_ray.runs.records import (
    SEGMENT_SECONDS,
    Record,
    RecordTail,
    RecordWriter,
    decode_number,
    encode_number,
    later_records,
    merge_records,
    read_records,
)
from crate_ray.runs.status import (
    HEARTBEAT_SECONDS,
    LEASE_SECONDS,
    Lease,
    LeaseLostError,
    State,
    Status,
    read_status,
    write_status,
)

__all__ = [
    "HEARTBEAT_SECONDS",
    "LEASE_SECONDS",
    "SEGMENT_SECONDS",
    "Lease",
    "LeaseLostError",
    "MetricSink",
    "NullSink",
    "Record",
    "RecordTail",
    "RecordWriter",
    "RunFolder",
    "State",
    "Status",
    "WorkerContext",
    "decode_number",
    "encode_number",
    "find_run",
    "git_state",
    "is_finished",
    "later_records",
    "list_runs",
    "merge_records",
    "open_run",
    "read_records",
    "read_status",
    "record_precision",
    "versions",
    "write_status",
]
