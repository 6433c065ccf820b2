"""A comparison as data: comparison.json, the whole of it, and comparison.parquet, one row a run.

In: a comparison. Out: JSON text and an Arrow table. In JSON a configuration names its runs by run_uid and a difference its
configurations by label, so that each number stands there once; numbers that are not finite are named, as everywhere. In the
table the parts of a row are columns of their own: settings.lr, values.probe_top1, intervals.probe_top1.low.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from crate_ray.analysis.comparison.configurations import unique_names
from crate_ray.analysis.comparison.result import Comparison, Configuration
from crate_ray.config import SCHEMA_VERSION
from crate_ray.runs.records import encode_number
from crate_ray.runs.rows import Estimate, RunRow

_TEXT, _WHOLE, _REAL, _FLAG = pa.string(), pa.int64(), pa.float64(), pa.bool_()
# Of a run, what is one value; parts that are mappings follow as columns of their own.
_COLUMNS: Mapping[str, pa.DataType] = {
    "run_uid": _TEXT, "name": _TEXT, "uri": _TEXT, "kind": _TEXT, "family": _TEXT, "model": _TEXT, "recipe": _TEXT,
    "sweep": _TEXT, "arm": _TEXT, "stage": _TEXT, "seed": _WHOLE, "state": _TEXT, "is_complete": _FLAG,
    "configuration": _TEXT, "commit": _TEXT, "is_dirty": _FLAG, "tuning_trials": _WHOLE, "params_total": _WHOLE,
    "params_encoder": _WHOLE, "params_paper": _WHOLE, "train_flops_per_image": _REAL, "images": _WHOLE, "train_pflops": _REAL,
    "train_hours": _REAL, "hardware": _TEXT, "images_per_s": _REAL, "timing": _TEXT, "exclusive_hours": _REAL,
    "judged_split": _TEXT, "probe_protocol": _WHOLE, "rollbacks": _WHOLE, "skipped_steps": _WHOLE,
}  # fmt: skip
_MAPPINGS = ("settings", "compare", "loss_target")
_NUMBERS = (int, float)


def to_json(comparison: Comparison) -> str:
    """The whole comparison as JSON text."""
    content: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
    for item in fields(comparison):
        value = getattr(comparison, item.name)
        content[item.name] = [row.as_dict() for row in value] if item.name == "rows" else _plain(value)
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """A value as JSON can hold it, with runs by run_uid and, inside others, configurations by label."""
    if isinstance(value, RunRow):
        return value.run_uid
    if isinstance(value, Estimate):
        return _plain(value._asdict())
    if is_dataclass(value) and not isinstance(value, type):
        parts = {item.name: getattr(value, item.name) for item in fields(value)}
        return {key: part.label if isinstance(part, Configuration) else _plain(part) for key, part in parts.items()}
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return encode_number(value) if isinstance(value, float) else value


def to_table(comparison: Comparison) -> pa.Table:
    """One row a run, in the order of `rows`, with its place in the comparison.

    The first columns are those of a run; then `is_included`, `configuration_label` and `excluded` (why not); then the columns
    of its mappings, by name. Metadata: schema_version, name and metric.
    """
    rows = comparison.rows
    label_of = {row.run_uid: item.label for item in comparison.configurations for row in item.rows}
    columns = {name: pa.array([getattr(row, name) for row in rows], kind) for name, kind in _COLUMNS.items()}
    columns["is_included"] = pa.array([row.run_uid in label_of for row in rows], _FLAG)
    columns["configuration_label"] = pa.array([label_of.get(row.run_uid) for row in rows], _TEXT)
    names = unique_names(rows)
    why_not = [None if row.run_uid in label_of else comparison.excluded.get(names[row.run_uid]) for row in rows]
    columns["excluded"] = pa.array(why_not, _TEXT)
    for name in _MAPPINGS:
        parts = [_flat(getattr(row, name)) for row in rows]
        columns |= {f"{name}.{key}": _column([part.get(key) for part in parts]) for key in _keys(parts)}
    values = [row.values for row in rows]
    columns |= {f"values.{key}": pa.array([part.get(key) for part in values], _REAL) for key in _keys(values)}
    intervals = [row.intervals for row in rows]
    for key in _keys(intervals):
        found = [part.get(key) for part in intervals]
        for end in Estimate._fields:
            ends = [getattr(item, end) if item else None for item in found]
            columns[f"intervals.{key}.{end}"] = pa.array(ends, _REAL)
    about = {"schema_version": str(SCHEMA_VERSION), "name": comparison.name, "metric": comparison.metric}
    return pa.table(columns).replace_schema_metadata(about)


def to_parquet(comparison: Comparison) -> bytes:
    """`to_table` as the bytes of a file."""
    buffer = io.BytesIO()
    pq.write_table(to_table(comparison), buffer)
    return buffer.getvalue()


def _keys(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({key for part in parts for key in part})


def _flat(part: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Mappings within mappings under dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in part.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def _column(values: Sequence[Any]) -> pa.Array:
    """Numbers as numbers, flags as flags; anything else, and what is mixed, as text, lists and mappings as JSON."""
    known = [value for value in values if value is not None]
    if known and all(isinstance(value, bool) for value in known):
        return pa.array(values, _FLAG)
    if known and all(isinstance(value, _NUMBERS) and not isinstance(value, bool) for value in known):
        return pa.array([None if value is None else float(value) for value in values], _REAL)
    return pa.array(
        [None if value is None else value if isinstance(value, str) else json.dumps(value) for value in values], _TEXT
    )
