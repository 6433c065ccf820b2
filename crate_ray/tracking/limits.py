"""What MLflow takes: names, values and requests are made to fit before they are sent.

In: keys, texts and points as they are. Out: ones that every store accepts, in requests of bounded size. One
bad name would refuse its whole batch, at every try again; a text that is too long would end the mirror of
its run. The trade-off: a key is changed where it must be, and two keys that differ only in characters that
MLflow refuses become one.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

MAX_KEY = 250  # characters of the name of a metric, a parameter or a tag
MAX_PARAM = 6000
MAX_TAG = 8000
MAX_EXPERIMENT_NAME = 500
MAX_POINTS = 500  # a request; MLflow's own limit is 1000
MAX_ENTRIES = 100  # parameters, or tags, a request
MAX_REQUEST_BYTES = 1_000_000
_CUT = " ..."
_ENTRY_BYTES = 160  # the rest of one point, parameter or tag in JSON: field names, numbers, quotes
_HEAD_BYTES = 1_000
_Entry = TypeVar("_Entry")


def valid_key(key: str) -> str:
    """The key with what MLflow refuses replaced; other keys stay as they are.

    Allowed are letters, digits and `_-. :/`; as a path it must be relative, with no empty part or `.`, and not begin with `..`.
    """
    cut = re.sub(r"[^\w\-. :/]", "_", key)[:MAX_KEY]
    parts = [part for part in cut.split("/") if part not in ("", ".", "..")]
    return re.sub(r"^\.\.", "__", "/".join(parts)) or "_"


def valid_text(value: object, limit: int) -> str:
    """A text of at most `limit` characters that every database can store; a longer one ends in dots."""
    text = str(value).replace("\0", "").encode(errors="replace").decode()
    return text if len(text) <= limit else text[: limit - len(_CUT)] + _CUT


def valid_tags(tags: Mapping[str, object]) -> dict[str, str]:
    """Tags with names and values that fit."""
    return {valid_key(key): valid_text(value, MAX_TAG) for key, value in tags.items()}


def valid_params(params: Mapping[str, object]) -> dict[str, str]:
    """Parameters with names and values that fit."""
    return {valid_key(key): valid_text(value, MAX_PARAM) for key, value in params.items()}


def point(key: str, value: float, time_ms: int, step: int) -> "Metric":
    """One point of a curve, with a name that fits."""
    from mlflow.entities import Metric

    return Metric(valid_key(key), value, time_ms, step)


def log_points(client: "MlflowClient", run_id: str, points: Sequence["Metric"]) -> None:
    """Sends points, whose names fit, in as many requests as they need."""
    for batch in batches(points, [_json_bytes(metric.key) for metric in points], MAX_POINTS):
        client.log_batch(run_id, metrics=batch, synchronous=True)


def log_params(client: "MlflowClient", run_id: str, params: Mapping[str, object]) -> None:
    """Sends parameters, made to fit."""
    from mlflow.entities import Param

    entries = [Param(key, value) for key, value in valid_params(params).items()]
    for batch in batches(entries, [_json_bytes(entry.key + entry.value) for entry in entries], MAX_ENTRIES):
        client.log_batch(run_id, params=batch, synchronous=True)


def log_tags(client: "MlflowClient", run_id: str, tags: Mapping[str, object]) -> None:
    """Sends tags, made to fit; one replaces an earlier one of its name."""
    from mlflow.entities import RunTag

    entries = [RunTag(key, value) for key, value in valid_tags(tags).items()]
    for batch in batches(entries, [_json_bytes(entry.key + entry.value) for entry in entries], MAX_ENTRIES):
        client.log_batch(run_id, tags=batch, synchronous=True)


def batches(entries: Sequence[_Entry], sizes: Sequence[int], max_count: int) -> Iterator[list[_Entry]]:
    """Cuts entries into lists of at most `max_count` entries and of a request's bytes.

    Args:
        entries: In the order to send them.
        sizes: Bytes of each one's texts in JSON.
        max_count: Entries a list.
    """
    batch, size = list[_Entry](), _HEAD_BYTES
    for entry, text_bytes in zip(entries, sizes, strict=True):
        entry_bytes = text_bytes + _ENTRY_BYTES
        if batch and (len(batch) == max_count or size + entry_bytes > MAX_REQUEST_BYTES):
            yield batch
            batch, size = [], _HEAD_BYTES
        batch.append(entry)
        size += entry_bytes
    if batch:
        yield batch


def _json_bytes(text: str) -> int:
    return len(json.dumps(text))
