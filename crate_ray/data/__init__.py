"""Images to batches: sources, shards, index, order, reader. See docs/data_format.md.

The names below are loaded when they are used: indexing and auditing shards need no torch, which takes seconds and 500 MB.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crate_ray.data.build import BuildSummary, build_source
    from crate_ray.data.findings import DamagedDataError, Fault, Finding
    from crate_ray.data.index import ShardIndex, load_index
    from crate_ray.data.indexing import IndexSummary, build_index
    from crate_ray.data.mix import Source, load_ordered, load_source, with_classes
    from crate_ray.data.order import SampleOrder, epoch_order, global_batch, rank_slice
    from crate_ray.data.reader import (
        Batch,
        BatchReader,
        LoaderTimeoutError,
        Reader,
        ReplacedSamples,
        open_reader,
        read_all,
        read_masks,
    )
    from crate_ray.data.verify import Audit, verify_shards
    from crate_ray.data.workers import TaskMap, map_with

__all__ = [
    "Audit",
    "Batch",
    "BatchReader",
    "BuildSummary",
    "DamagedDataError",
    "Fault",
    "Finding",
    "IndexSummary",
    "LoaderTimeoutError",
    "Reader",
    "ReplacedSamples",
    "SampleOrder",
    "ShardIndex",
    "Source",
    "TaskMap",
    "build_index",
    "build_source",
    "epoch_order",
    "global_batch",
    "load_index",
    "load_ordered",
    "load_source",
    "map_with",
    "open_reader",
    "rank_slice",
    "read_all",
    "read_masks",
    "verify_shards",
    "with_classes",
]

_MODULES = {
    "build": ("BuildSummary", "build_source"),
    "findings": ("DamagedDataError", "Fault", "Finding"),
    "index": ("ShardIndex", "load_index"),
    "indexing": ("IndexSummary", "build_index"),
    "mix": ("Source", "load_ordered", "load_source", "with_classes"),
    "order": ("SampleOrder", "epoch_order", "global_batch", "rank_slice"),
    "reader": (
        *("Batch", "BatchReader", "LoaderTimeoutError", "Reader", "ReplacedSamples"),
        *("open_reader", "read_all", "read_masks"),
    ),
    "verify": ("Audit", "verify_shards"),
    "workers": ("TaskMap", "map_with"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
