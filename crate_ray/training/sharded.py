"""State in shards: each worker's part of every tensor, in a safetensors file that says where in the tensor it belongs.

In: a state dict with DTensors. Out: this worker's file; and from the files of all workers the same state again, whole or
sharded over any other number of workers. Who holds and who needs which rows is planned by torch.distributed.checkpoint, and
the files have the layout of its safetensors storage (its HuggingFaceStorageReader reads them too). Its own writers are not
used: one pickles its metadata, the other writes to a local path without checksums, and both meet in collectives first; ours
go through the saver of all checkpoints. The price of verified bytes: a file is read whole, even by a rank that needs few rows.

A checkpoint of one whole file is read in the same way: as a single shard at offset 0.
"""

import json
import operator
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import safetensors.torch
import torch
from torch import Tensor

from crate_ray import storage
from crate_ray.config import ConfigError
from crate_ray.training.tensor_files import DTYPES

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

_SHARD = re.compile(r"^(.+)\.shard-\d{5}-of-(\d{5})\.safetensors$")
_SUFFIX = ".safetensors"
_SHARDING, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
"""What torch.distributed.checkpoint calls them in a file's metadata."""


class Files(Protocol):
    """The files of a checkpoint."""

    @property
    def uri(self) -> str: ...  # noqa: D102

    @property
    def files(self) -> Mapping[str, Any]: ...  # noqa: D102

    def read_bytes(self, name: str) -> bytes:
        """A whole file, verified."""
        ...


def shard_name(name: str, number: int, total: int) -> str:
    """`model.safetensors` to `model.shard-00001-of-00004.safetensors`, the first of four."""
    return f"{name.removesuffix(_SUFFIX)}.shard-{number:05d}-of-{total:05d}{_SUFFIX}"


def files_of(checkpoint: Files, name: str) -> list[str]:
    """The file of that name, or all of its shards in order; none where the checkpoint does not have it."""
    if name in checkpoint.files:
        return [name]
    found = {file: match for file in sorted(checkpoint.files) if (match := _SHARD.match(file))}
    shards = [file for file, match in found.items() if match[1] + _SUFFIX == name]
    assert not shards or len(shards) == int(found[shards[0]][2]), "a manifest lists the shards of all workers"
    return shards


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, any other tensor whole; without its history."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def local_shards(state: Mapping[str, Tensor], *, has_whole: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """This worker's part of a state, and the metadata of the file that is to hold it.

    Args:
        state: DTensors and plain tensors.
        has_whole: Whether the plain tensors, which every worker holds, go into this file.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.tensor import DTensor

    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner({name: value for name, value in state.items() if has_whole or isinstance(value, DTensor)})
    tensors, offsets = {}, {}
    for item in planner.create_local_plan().items:
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, Tensor) and item.tensor_data is not None
        if tensor.numel():  # of few rows the last workers hold none
            tensors[item.index.fqn] = tensor.detach()
            offsets[item.index.fqn] = {_OFFSETS: list(item.tensor_data.chunk.offsets)}
    return tensors, {_SHARDING: json.dumps(offsets)}


def read_whole(checkpoint: Files, name: str) -> dict[str, Tensor]:
    """A state with all rows of every tensor, on the CPU.

    Raises:
        ConfigError: The state is not there, or a file of it is damaged.
    """
    saved = SavedState(checkpoint, name)
    state = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in saved.describe().items()}
    saved.read_into(state)
    return state


class SavedState:
    """A state as its files have it; from their headers, without tensors.

    Args:
        checkpoint: Whole or sharded.
        name: Of the state as one file.

    Raises:
        ConfigError: The checkpoint does not have it.
    """

    def __init__(self, checkpoint: Files, name: str) -> None:
        self._checkpoint, self._name = checkpoint, name
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._homes: dict[MetadataIndex, str] = {}
        files = files_of(checkpoint, name)
        if not files:
            held = ", ".join(sorted(checkpoint.files)) or "nothing"
            raise ConfigError(f"checkpoint {checkpoint.uri} has no {name}, whole or in shards; it holds: {held}")
        for file in files:
            self._add(file)

    def describe(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and type of every tensor."""
        return {key: (found.size, found.properties.dtype) for key, found in self._tensors.items()}

    def read_into(self, state: dict[str, Tensor]) -> None:
        """Fills tensors, this worker's rows of DTensors, from the files that have these rows; without a collective.

        Raises:
            ConfigError: A tensor is missing or has another shape, or a file is damaged.
        """
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
        from torch.distributed.checkpoint.metadata import Metadata

        self._refuse_misfits(state)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(state, Metadata(state_dict_metadata=dict(self._tensors)))
        wanted = defaultdict(list)
        for item in planner.create_local_plan().items:
            wanted[self._homes[item.storage_index]].append(item)
        for file, items in wanted.items():
            held = safetensors.torch.load(self._checkpoint.read_bytes(file))
            for item in items:
                rows = tuple(slice(at, at + size) for at, size in zip(item.storage_offsets, item.lengths, strict=True))
                planner.resolve_tensor(item).detach().copy_(held[item.storage_index.fqn][rows])

    def _add(self, file: str) -> None:
        """Takes note of what a file has, and where in the tensors it belongs."""
        from torch.distributed.checkpoint.metadata import (
            ChunkStorageMetadata,
            MetadataIndex,
            TensorProperties,
            TensorStorageMetadata,
        )

        header = _read_header(storage.join(self._checkpoint.uri, file))
        offsets = json.loads(header.pop("__metadata__", {}).get(_SHARDING, "{}"))
        for key, entry in header.items():
            sizes = torch.Size(entry["shape"])
            at = torch.Size(offsets[key][_OFFSETS] if key in offsets else [0] * len(sizes))
            ends = torch.Size(map(operator.add, at, sizes))
            found = self._tensors.setdefault(
                key, TensorStorageMetadata(TensorProperties(dtype=DTYPES[entry["dtype"]]), ends, [])
            )
            found.chunks.append(ChunkStorageMetadata(at, sizes))
            found.size = torch.Size(map(max, found.size, ends))
            self._homes[MetadataIndex(key, at)] = file

    def _refuse_misfits(self, state: Mapping[str, Tensor]) -> None:
        problems = [f"{key} is missing" for key in sorted(state.keys() - self._tensors.keys())]
        problems += [
            f"{key} is {tuple(self._tensors[key].size)} there and {tuple(value.shape)} here"
            for key, value in state.items()
            if key in self._tensors and self._tensors[key].size != value.shape
        ]
        if problems:
            where = f"{self._name} of checkpoint {self._checkpoint.uri}"
            raise ConfigError(f"{where} does not fit this run: {'; '.join(problems[:5])}")


def _read_header(uri: str) -> dict[str, Any]:
    """Names, types and shapes of a safetensors file, without its tensors."""
    with storage.open_input(uri) as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    return header
