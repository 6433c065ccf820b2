"""The planner of points that are all known from the start: grid and random search, and the confirmation.

In: the points in order. Out: one after the other. Nothing is learnt from results, so nothing needs a file: the same sweep plans
the same list, and what earlier sessions ended is left out of it.
"""

from collections.abc import Mapping, Sequence

from crate_ray.space.matching import Match
from crate_ray.space.point import Point


class ListedPlanner:
    """Hands out a list; see `Planner`.

    Args:
        points: The list.
        refused: See `Planner`.
        matches: See `Planner`.
    """

    def __init__(
        self, points: Sequence[Point], *, refused: Mapping[str, int] | None = None, matches: Sequence[Match] = ()
    ) -> None:
        self._points = points
        self.total: int | None = len(points)
        self.refused: Mapping[str, int] = refused or {}
        self.matches = matches
        self._next = 0
        self._done: set[str] = set()

    @property
    def is_exhausted(self) -> bool:
        """See Planner."""
        self._skip_done()
        return self._next == len(self._points)

    def ask(self) -> Point | None:
        """See Planner."""
        if self.is_exhausted:
            return None
        self._next += 1
        return self._points[self._next - 1]

    def tell(self, point: Point, values: Mapping[str, float]) -> None:
        """See Planner; a list does not learn."""

    def tell_infeasible(self, point: Point, reason: str) -> None:
        """See Planner; a list does not learn."""

    def restore(self, done: Sequence[tuple[Point, Mapping[str, float] | None]]) -> None:
        """See Planner."""
        self._done = {point.key for point, _ in done}

    def _skip_done(self) -> None:
        while self._next < len(self._points) and self._points[self._next].key in self._done:
            self._next += 1
