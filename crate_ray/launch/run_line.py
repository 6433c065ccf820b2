"""The line between who drives a run and its workers, an actor of its own.

In and out: plain values and the handle of the Train controller. It stands in a file that imports next to nothing, because its
process is one of those that a trial of several workers waits for.
"""

import asyncio
from typing import Any

import ray


@ray.remote(num_cpus=0)
class RunLine:
    """The wish to stop one way, events of rank 0 the other.

    Its methods are coroutines of one event loop: who waits here blocks nobody.
    """

    def __init__(self) -> None:
        self._stop = False
        self._released = asyncio.Event()
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._controller: Any = None

    async def stop(self) -> None:
        """Asks the run to stop."""
        self._stop = True
        self._released.set()

    async def is_set(self) -> bool:
        """Whether a stop was asked for."""
        return self._stop

    async def post(self, event: dict[str, Any], *, wait: bool) -> None:
        """Hands an event to the driver; with `wait`, returns when the driver has released it."""
        if wait:
            self._released.clear()
        await self._events.put(event)
        if wait and not self._stop:
            await self._released.wait()

    async def next_event(self) -> dict[str, Any]:
        """The next one that was posted, whenever it comes."""
        return await self._events.get()

    async def release(self) -> None:
        """Lets rank 0 go on."""
        self._released.set()

    async def put_controller(self, controller: Any) -> None:
        """Keeps the handle of the Train controller."""
        self._controller = controller

    async def controller(self) -> Any:
        """The handle of the Train controller; None before it runs."""
        return self._controller
