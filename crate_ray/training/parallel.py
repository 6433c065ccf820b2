"""How workers share a model: one alone, whole copies of it (DDP), or shards of it (FSDP2).

In: a configuration and a worker. Out: a `Parallel`, the one object that knows which of them it is. Step, loop, checkpoints and
evaluation call the same methods on each:

  alone    one worker holds everything.
  ddp      every worker holds everything; gradients are averaged while the backward pass goes on.
  fsdp     every worker holds 1/W of each parameter, gradient and moment. A layer's weights are gathered when it is their
           turn and dropped after it, gradients are averaged into shards. With `scale.hybrid_shard`, shards lie inside a node
           and nodes hold copies of each other, so that only gradients travel between nodes.

All three compute the same losses: gathered weights are float32 as the others' are, and autocast rounds them the same. FSDP's
own mixed precision would gather half the bytes, and also round norms, biases and residuals (docs/numerics.md).
What is computed outside of the step (evaluation, kNN, white-box measures) takes a whole copy of the weights, `whole`: one
gather instead of one for each layer and batch, and no rank waits in a collective for another that has fewer images. It costs
4 bytes a parameter meanwhile.
"""

import inspect
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from crate_ray.config import ScaleConfig
from crate_ray.models import Classifier, MaskedAutoencoder, create_model
from crate_ray.models.layers import distinct_layers
from crate_ray.runs import WorkerContext
from crate_ray.training.checkpoint import Checkpoint
from crate_ray.training.sharded import SavedState, local_shards, shard_name

log = logging.getLogger(__name__)

Model = MaskedAutoencoder | Classifier

# Position tables are the same on every rank and never change. torch 2.15 renamed the argument that says so.
_SYNC_BUFFERS = "forward_sync_buffers"
if _SYNC_BUFFERS not in inspect.signature(DistributedDataParallel.__init__).parameters:
    _SYNC_BUFFERS = "broadcast_buffers"
_BUFFERS_STAY: dict[str, Any] = {_SYNC_BUFFERS: False}


class Parallel:
    """One worker that holds everything; what the others do differently is in their classes.

    Attributes:
        rank: Of this worker, from 0.
        world_size: Workers.
        num_shards: Workers that hold one copy of the state between them.
        rehearsals: Passes that run differently from all later ones, and should not count.
    """

    rehearsals = 0

    def __init__(self, *, rank: int = 0, world_size: int = 1) -> None:
        self.rank = rank
        self.world_size = world_size
        self.num_shards = 1

    def distribute(self, model: Model) -> None:
        """Leaves this worker with its part of the parameters; before an optimizer takes hold of them."""

    def wrap(self, objective: nn.Module) -> nn.Module:
        """What the step calls in the place of the objective, whose model is distributed."""
        return objective

    def accumulating(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Surrounds forward and backward pass of a micro-batch; only the last one of a step communicates gradients."""
        return nullcontext()

    def total_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """2-norm of all gradients together, the same on every rank."""
        return nn.utils.get_total_norm(gradients)

    def sum_up(self, values: Tensor) -> Tensor:
        """Sums over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def whole(self, model: Model) -> Model:
        """A model with all weights on every rank, to use and forget; every rank must ask for it."""
        return model

    def files(self, name: str, state: Mapping[str, Tensor]) -> "dict[str, tuple[dict[str, Tensor], dict[str, str]]]":
        """The files that this rank writes of a state: tensors and metadata by name.

        Args:
            name: Of the state as one file.
            state: Of the distributed model, its optimizer, or averages of its weights.
        """
        return {name: (dict(state), {})} if self.rank == 0 else {}

    def read(self, checkpoint: Checkpoint, name: str, model: nn.Module) -> dict[str, Tensor]:
        """A state as `files` took it, whoever has written it and on however many workers.

        Args:
            checkpoint: Whole or sharded.
            name: Of the state as one file.
            model: Distributed; an entry is known by a parameter's name, or ends in one: `exp_avg.norm.weight`.
        """
        return checkpoint.read(name)


class Replicated(Parallel):
    """DistributedDataParallel: the graph is static and every parameter takes part.

    It learns the graph in a first backward pass, which must communicate even where micro-batches accumulate, and the order in
    which gradients come in a second; then it puts them into other buckets. A sum over three or more ranks has another order
    in these: if the two passes counted, the first steps of a resumed run would not repeat the bits of the undisturbed one.
    """

    rehearsals = 2

    def __init__(self, *, rank: int, world_size: int, device: torch.device) -> None:
        super().__init__(rank=rank, world_size=world_size)
        self._device_ids = [device] if device.type == "cuda" else None
        self._module: DistributedDataParallel | None = None

    def wrap(self, objective: nn.Module) -> nn.Module:
        """See Parallel."""
        self._module = DistributedDataParallel(
            objective, device_ids=self._device_ids, gradient_as_bucket_view=True, static_graph=True, **_BUFFERS_STAY
        )
        return self._module

    def accumulating(self, *, is_last: bool) -> AbstractContextManager[None]:
        """See Parallel."""
        assert self._module is not None
        return nullcontext() if is_last else cast(AbstractContextManager[None], self._module.no_sync())  # type: ignore[no-untyped-call]


class Sharded(Parallel):
    """FSDP2: `fully_shard` on every layer, and on the model for what is left.

    Args:
        rank: Of this worker.
        nodes: Ranks of each node; one list for shards over all workers. With several, each has as many ranks.
        device: Of this worker.
    """

    def __init__(self, *, rank: int, nodes: Sequence[Sequence[int]], device: torch.device) -> None:
        from torch.distributed.device_mesh import DeviceMesh

        super().__init__(rank=rank, world_size=sum(map(len, nodes)))
        if len(nodes) == 1:
            self._mesh = DeviceMesh(device.type, torch.tensor(nodes[0]), mesh_dim_names=("shard",))
        else:
            self._mesh = DeviceMesh(device.type, torch.tensor(nodes), mesh_dim_names=("replicate", "shard"))
        self.num_shards = len(nodes[0])
        self._shard = self._mesh.get_local_rank("shard")
        self._writes = rank in nodes[0]
        self._model: nn.Module | None = None

    def distribute(self, model: Model) -> None:
        """See Parallel."""
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        for layer in distinct_layers(model):
            fully_shard(layer, mesh=self._mesh)
        fully_shard(model, mesh=self._mesh)
        if isinstance(model, MaskedAutoencoder):
            register_fsdp_forward_method(model, "losses")
        self._model = model

    def accumulating(self, *, is_last: bool) -> AbstractContextManager[None]:
        """See Parallel. Until the last micro-batch a rank keeps whole gradients, as DDP does."""
        from torch.distributed.fsdp import FSDPModule

        assert isinstance(self._model, FSDPModule)
        self._model.set_requires_gradient_sync(is_last)
        self._model.set_is_last_backward(is_last)
        return nullcontext()

    def total_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """See Parallel."""
        return _gathered(super().total_norm(gradients))

    def whole(self, model: Model) -> Model:
        """See Parallel."""
        with torch.device("meta"):
            copy = create_model(model.config)
        copy.load_state_dict({name: _gathered(value) for name, value in model.state_dict().items()}, assign=True)
        return copy.train(model.training)

    def files(self, name: str, state: Mapping[str, Tensor]) -> "dict[str, tuple[dict[str, Tensor], dict[str, str]]]":
        """See Parallel. Of nodes that are copies of each other one writes."""
        if not self._writes:
            return {}
        return {shard_name(name, self._shard + 1, self.num_shards): local_shards(state, has_whole=self._shard == 0)}

    def read(self, checkpoint: Checkpoint, name: str, model: nn.Module) -> dict[str, Tensor]:
        """See Parallel. A rank reads the files that hold rows of its own."""
        places = dict(model.named_parameters())
        saved, state = SavedState(checkpoint, name), {}
        for key, (shape, dtype) in saved.describe().items():
            place = places.get(key, places.get(key.partition(".")[2]))
            if place is not None and place.shape == shape:
                state[key] = torch.empty_like(place, dtype=dtype, requires_grad=False)
            else:
                state[key] = torch.empty(shape, dtype=dtype)
        saved.read_into(state)
        return state


def choose_parallel(config: ScaleConfig, context: WorkerContext, device: torch.device) -> Parallel:
    """The way in which the workers of a run share its model; with several, all must ask at the same time."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # FSDP, and objects that ranks exchange, go to the current one
    if context.world_size == 1:
        return Parallel()
    if config.parallel == "ddp":
        return Replicated(rank=context.rank, world_size=context.world_size, device=device)
    nodes = [list(range(context.world_size))]
    if config.hybrid_shard:
        nodes = _nodes(context)
    return Sharded(rank=context.rank, nodes=nodes, device=device)


def _nodes(context: WorkerContext) -> list[list[int]]:
    """Ranks of each node; all in one list, with a warning, where nodes have different numbers of workers.

    A launcher numbers the workers of a node one after the other, so that a local rank of 0 starts a node.
    """
    local_ranks = [0] * context.world_size
    dist.all_gather_object(local_ranks, context.local_rank)
    nodes: list[list[int]] = []
    for rank, local_rank in enumerate(local_ranks):
        if local_rank == 0:
            nodes.append([])
        nodes[-1].append(rank)
    if len({len(node) for node in nodes}) > 1:
        if context.rank == 0:
            log.warning(
                "scale.hybrid_shard needs as many workers on every node and finds %s; sharding over all of them instead",
                ", ".join(str(len(node)) for node in nodes),
            )
        return [list(range(context.world_size))]
    return nodes


def _gathered(value: Tensor) -> Tensor:
    """All rows of a DTensor; a plain tensor as it is."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value.detach()
