"""What a source of images gives: the items of each split and how one item becomes a sample.

An item is small and picklable (a file name, an index, a placement); `render` turns it into the members of a sample.
Rendering one item never depends on another, so shards can be written by any number of processes and in any order.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Source:
    """A source of images, split and ready to be written.

    Attributes:
        name: What the user called it, e.g. `shapes:5000`.
        classes: Name of each class; the label is the position.
        splits: Items of each split, in the order in which they are written. Samples that share a source picture never
            lie in two splits.
        render: Makes the members of a sample, by extension, from an item. A module-level function or a partial of one.
        shard_samples: Samples in a shard, at most.
        options: What else decides the bytes; a folder built with other options is another data set.
    """

    name: str
    classes: list[str]
    splits: Mapping[str, Sequence[Any]]
    render: Callable[[Any], dict[str, bytes]]
    shard_samples: int
    options: dict[str, Any] = field(default_factory=dict)
