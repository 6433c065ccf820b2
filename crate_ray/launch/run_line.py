"""The line between who drives a run and its workers, an actor of its own.

In and out: plain values and the handle of the Train controller. It stands in a file that imports next to nothing, because its
process is one of those that a trial of several workers waits for.
"""

import asyncio
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@ray.remote(num_cpus=0)
class RunLine:
    """The wish to stop or to pause one way, events of rank 0 the other.

    Its methods are coroutines of one event loop: who waits here blocks nobody.
    """

    def __init__(self) -> None:
        self._stop = False
        self._pause: str | None = None
        self._released = asyncio.Event()
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._controller: tuple[Any, str] | None = None

    async def stop(self) -> None:
        """Asks the run to stop."""
        self._stop = True
        self._released.set()

    async def pause(self, reason: str) -> None:
        """Asks the workers of this group to write a checkpoint and to leave, so that others go on."""
        self._pause = reason
        self._released.set()

    async def join(self) -> None:
        """Said by rank 0 of each new group: what was asked of the group before is done."""
        self._pause = None

    async def wish(self) -> tuple[bool, str | None]:
        """Whether to stop; why to pause, or None."""
        return self._stop, self._pause

    async def post(self, event: dict[str, Any], *, wait: bool) -> None:
        """Hands an event to the driver; with `wait`, returns when the driver has released it."""
        if wait:
            self._released.clear()
        await self._events.put(event)
        if wait and not self._stop and self._pause is None:
            await self._released.wait()

    async def next_event(self) -> dict[str, Any]:
        """The next one that was posted, whenever it comes."""
        return await self._events.get()

    async def release(self) -> None:
        """Lets rank 0 go on."""
        self._released.set()

    async def put_controller(self, controller: Any, requester: str) -> None:
        """Keeps the handle of the Train controller, and what its wish for nodes goes by."""
        self._controller = controller, requester

    async def controller(self) -> tuple[Any, str] | None:
        """What `put_controller` was given; None before the controller runs."""
        return self._controller


def open_line() -> Any:
    """A RunLine on this node, so that it is lost with no node but that of the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return RunLine.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
