"""Images to batches: sources, shards, index, order, reader. See docs/data_format.md."""

from crate_ray.data.build import BuildSummary, build_source
from crate_ray.data.index import ShardIndex, build_index, load_index, verify_index
from crate_ray.data.order import SampleOrder, epoch_order, global_batch, rank_slice
from crate_ray.data.reader import Batch, Reader, open_reader, read_all, read_masks

__all__ = [
    "Batch",
    "BuildSummary",
    "Reader",
    "SampleOrder",
    "ShardIndex",
    "build_index",
    "build_source",
    "epoch_order",
    "global_batch",
    "load_index",
    "open_reader",
    "rank_slice",
    "read_all",
    "read_masks",
    "verify_index",
]
