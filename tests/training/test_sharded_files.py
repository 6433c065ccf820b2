"""Shards in files: what is joined, what torch reads of them itself, and what is refused."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from finished_runs import train
from torch import Tensor

from crate_ray.config import ConfigError, RunConfig
from crate_ray.models import create_model
from crate_ray.training.checkpoint import MODEL_FILE, Checkpoint, FileEntry, latest_checkpoint, write_file, write_manifest
from crate_ray.training.first_weights import load_first_weights, pin_weights
from crate_ray.training.sharded import SavedState, files_of, local_shards, read_whole, shard_name
from crate_ray.training.tensor_files import file_pieces

NAME = MODEL_FILE
WHOLE = {
    "blocks.0.weight": torch.arange(35.0).reshape(7, 5),  # of three shards with 3, 3 and 1 rows
    "cls_token": torch.randn(1, 1, 4),  # the first shard has it all
    "step": torch.tensor(3.0),
}


def write_shards(state: Mapping[str, Tensor], uri: str, total: int) -> dict[str, FileEntry]:
    """Matrices cut by rows as `total` workers hold them, everything else in the first file; by hand."""
    files = {}
    for shard in range(total):
        tensors, offsets = {}, {}
        for key, tensor in state.items():
            rows = -(-len(tensor) // total) if tensor.ndim == 2 else 0
            if rows or shard == 0:
                tensors[key] = tensor[rows * shard : rows * (shard + 1)].clone() if rows else tensor
                offsets[key] = {"saved_offsets": [rows * shard, 0] if rows else [0] * tensor.ndim}
        name = shard_name(NAME, shard + 1, total)
        files[name] = write_file(uri, name, file_pieces(tensors, {"DCP_SHARDING_INFO": json.dumps(offsets)}))
    return files


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Three shards."""
    return Checkpoint(str(tmp_path), 1, {}, write_shards(WHOLE, str(tmp_path), 3))


def test_shards_are_joined_to_the_whole_state(checkpoint: Checkpoint) -> None:
    assert files_of(checkpoint, NAME) == [f"model.shard-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert checkpoint.holds(NAME)
    joined = checkpoint.read(NAME)
    assert joined.keys() == WHOLE.keys()
    assert all(torch.equal(joined[name], tensor) for name, tensor in WHOLE.items())


def test_torch_reads_the_files_itself(checkpoint: Checkpoint) -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    state = {name: torch.empty_like(tensor) for name, tensor in WHOLE.items()}
    with pytest.warns(UserWarning, match="assuming the intent is to load in a single process"):
        load(state, storage_reader=HuggingFaceStorageReader(checkpoint.uri))
    assert all(torch.equal(state[name], tensor) for name, tensor in WHOLE.items())


def test_a_state_in_one_file_is_read_in_the_same_way(tmp_path: Path) -> None:
    files = {NAME: write_file(str(tmp_path), NAME, file_pieces(WHOLE, {}))}
    joined = read_whole(Checkpoint(str(tmp_path), 1, {}, files), NAME)
    assert all(torch.equal(joined[name], tensor) for name, tensor in WHOLE.items())


def test_what_every_worker_holds_whole_is_written_once() -> None:
    first, metadata = local_shards(WHOLE, has_whole=True)
    assert all(torch.equal(first[name], tensor) for name, tensor in WHOLE.items())
    offsets = {name: entry["saved_offsets"] for name, entry in json.loads(metadata["DCP_SHARDING_INFO"]).items()}
    assert offsets == {name: [0] * tensor.ndim for name, tensor in WHOLE.items()}
    assert local_shards(WHOLE, has_whole=False)[0] == {}


@pytest.mark.parametrize(
    ("wanted", "complaint"),
    [
        ({"head.weight": torch.empty(2)}, r"head\.weight is missing"),
        ({"cls_token": torch.empty(1, 1, 8)}, r"cls_token is \(1, 1, 4\) there and \(1, 1, 8\) here"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(wanted: dict[str, Tensor], complaint: str, checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match=complaint):
        SavedState(checkpoint, NAME).read_into(wanted)


def test_a_state_that_is_not_there_is_named(checkpoint: Checkpoint) -> None:
    assert not checkpoint.holds("ema.safetensors")
    with pytest.raises(ConfigError, match=r"has no ema\.safetensors, whole or in shards; it holds: model\.shard-00001"):
        checkpoint.read("ema.safetensors")


def test_a_damaged_shard_is_refused(checkpoint: Checkpoint) -> None:
    file = Path(checkpoint.uri, shard_name(NAME, 2, 3))
    data = np.frombuffer(file.read_bytes(), np.uint8).copy()
    data[-1] ^= 1
    file.write_bytes(data.tobytes())
    assert hashlib.sha256(data.tobytes()).hexdigest() != checkpoint.files[file.name]["sha256"]
    with pytest.raises(ConfigError, match=r"shard-00002-of-00003\.safetensors is damaged"):
        checkpoint.read(NAME)


def test_a_run_starts_from_weights_in_shards(load_tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    donor = train(load_tiny("train.steps=1", "name=donor"))
    whole = latest_checkpoint(donor)
    assert whole is not None
    trained = whole.read(MODEL_FILE)
    Path(whole.uri, MODEL_FILE).unlink()
    files = write_shards(trained, whole.uri, 2)
    write_manifest(donor, whole.step, files=files, state=whole.state, configuration=whole.configuration)

    config = pin_weights(load_tiny(f"train.init_from={donor.uri}"))
    sums = "".join(str(files[name]["sha256"]) for name in sorted(files))
    assert config.train.init_digest == hashlib.sha256(sums.encode()).hexdigest()
    model = create_model(config.model)
    load_first_weights(model, config)
    assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items())
