"""Tensors on the host, and the bytes of a safetensors file made of them without a copy.

In: tensors of any device. Out: their copy in host memory, which is used again by the next one, and the pieces of a file: its
header, and the memory of each tensor as it lies there. `safetensors.torch.save` would copy the file twice and hold the
interpreter lock meanwhile, so a training thread would wait for it (benchmarks/bench_checkpoint.py measures both). The price is
that the header is written here; tests read it with safetensors, and compare with its own bytes.
"""

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of types in the header of a safetensors file."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8  # bytes; the header ends at a multiple of it, and wide types come first, so that all tensors are aligned


class HostCopy:
    """Room in host memory for one state, page-locked where it comes from a GPU; made at the first copy and used again."""

    def __init__(self) -> None:
        self._rooms: dict[tuple[str, str], Tensor] = {}
        self._arrivals: list[torch.cuda.Event] = []

    @torch.no_grad()
    def take(self, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Copies tensors; what was taken before is gone.

        From a GPU the copies are only queued, before any later change of the tensors: `wait` before they are read.

        Args:
            files: Tensors by file and name.
        """
        wanted = {(file, name): tensor for file, tensors in files.items() for name, tensor in tensors.items()}
        self._rooms = {key: self._room(key, tensor) for key, tensor in wanted.items()}
        for key, tensor in wanted.items():
            self._rooms[key].copy_(tensor, non_blocking=True)
        devices = {tensor.device for tensor in wanted.values() if tensor.is_cuda}
        self._arrivals = [torch.cuda.current_stream(device).record_event() for device in devices]
        return {file: {name: self._rooms[file, name] for name in tensors} for file, tensors in files.items()}

    def wait(self) -> None:
        """Returns when the last copy has arrived; may be called from another thread."""
        for arrival in self._arrivals:
            arrival.synchronize()

    def _room(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        held = self._rooms.get(key)
        if held is not None and held.shape == tensor.shape and held.dtype == tensor.dtype:
            return held
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def file_pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Sequence[memoryview]:
    """A safetensors file in pieces; the same tensors and metadata are the same bytes.

    Args:
        tensors: On the CPU and contiguous; not to be changed while the pieces are in use.
        metadata: Text by name, for the header; may be empty.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    pieces, end = [], 0
    for name, tensor in ordered:
        piece = tensor.reshape(-1).view(torch.uint8).numpy().data
        begin, end = end, end + len(piece)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        pieces.append(piece)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return [memoryview(len(text).to_bytes(8, "little") + text), *pieces]
