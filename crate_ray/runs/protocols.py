"""What the training loop needs from whoever runs it; no torch and no ray here.

A plain process, a Ray Train worker and a Tune trial are three WorkerContexts of one loop.
"""

from collections.abc import Mapping
from typing import Protocol


class WorkerContext(Protocol):
    """One worker of a run."""

    rank: int
    world_size: int
    local_rank: int
    attempt: int

    def stop_requested(self) -> bool:
        """Whether this worker was asked to stop; the loop makes all ranks agree before it acts."""
        ...

    def checkpoint_written(self, step: int, uri: str) -> None:
        """Called on every rank after each checkpoint, equally often."""
        ...

    def heartbeat(self, step: int) -> None:
        """Called on every rank after each step; must return at once."""
        ...

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """Called on every rank after each evaluation with what was measured; the loop goes on when it returns."""
        ...


class MetricSink(Protocol):
    """Where numbers go: the record writer of rank 0, or nothing on the other ranks."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records values measured at a step."""
        ...

    def flush(self) -> None:
        """Hands everything to the store; may be called from another thread than `write`."""
        ...

    def position(self) -> dict[str, int]:
        """Attempt and number of records written so far; what a checkpoint says of them."""
        ...

    def close(self) -> None:
        """Flushes and releases."""
        ...


class NullSink:
    """The sink of every rank but 0."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Drops the values."""

    def flush(self) -> None:
        """Nothing to hand over."""

    def position(self) -> dict[str, int]:
        """Nothing is written."""
        return {}

    def close(self) -> None:
        """Nothing to release."""
