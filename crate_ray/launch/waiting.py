"""A driver that waits for nodes says so, and gives up when none comes.

In: the placement groups of this job, which are what workers and trials wait with, and what the autoscaler does. Out: warnings,
and in the end a reason. Ray itself waits without a word. Workers of a range of sizes make a group only when there is room for
the fewest of them (see `launch.policies`), so for those it is the missing group that tells.
"""

import logging
import math
import time
from collections import Counter

from crate_ray.config import ScaleConfig
from crate_ray.launch.autoscaler import Growth, growth
from crate_ray.launch.capacity import Capacity, amounts_in_words
from crate_ray.launch.cluster import capacity, node_wait_s, worker_need
from crate_ray.launch.placement import Group, groups

log = logging.getLogger(__name__)

LOOK_S = 5.0  # between two looks
FIRST_WORD_S = 15.0  # so long there may be no room without a word; the next ones come after a minute, two, four ...
_COMPUTING = ("CPU", "GPU")


class NodeWatch:
    """Looks now and then at what this job waits for.

    Args:
        scale: Its node_wait_s bounds the wait.
    """

    def __init__(self, scale: ScaleConfig) -> None:
        self._scale = scale
        self._waits_for_ever = scale.is_elastic and scale.node_wait_s is None
        self._looked = float("-inf")
        self._seen: dict[str, float] = {}
        self._idle_since: float | None = None
        self._next_word, self._trouble = FIRST_WORD_S, ""

    def look(self) -> str | None:
        """Says what is waited for.

        Returns:
            Why to give up: nothing of this job runs, and no room came in `scale.node_wait_s`.
        """
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return None
        self._looked = now
        mine = [group for group in groups() if _computes(group)] or self._fewest()
        waiting = [group for group in mine if not group.is_placed]
        self._seen = {group.id: self._seen.get(group.id, now) for group in waiting}
        is_idle = len(waiting) == len(mine) > 0
        self._idle_since = (self._idle_since or now) if is_idle else None
        if not waiting:
            self._next_word, self._trouble = FIRST_WORD_S, ""
            return None
        waited = now - min(self._seen.values())
        return self._judge(mine, waited) if waited >= FIRST_WORD_S else None

    def _fewest(self) -> list[Group]:
        """What an elastic run without a group waits for: room for its fewest workers."""
        need, least = worker_need(self._scale), self._scale.min_workers
        if not self._scale.is_elastic or capacity(self._scale).workers(need) >= least:
            return []
        return [Group("fewest", (need,) * least, is_placed=False)]

    def _judge(self, mine: list[Group], waited: float) -> str | None:
        have, doing = capacity(self._scale), growth()
        waiting = [group for group in mine if not group.is_placed]
        is_taken = fits_now(mine, have)
        trouble = trouble_in_words(doing, waiting)
        if waited >= self._next_word or trouble != self._trouble:
            self._next_word, self._trouble = max(60.0, 2 * self._next_word), trouble
            log.warning("waiting for %.0f s for room for %s", waited, situation(waiting, have, doing, is_taken=is_taken))
        patience = math.inf if self._waits_for_ever else node_wait_s(self._scale, have)
        if self._idle_since is None or time.monotonic() - self._idle_since < patience:
            return None
        asked = situation(waiting, have, doing, is_taken=is_taken)
        return f"no room came within {patience:.0f} s for {asked}; the same command goes on once it is there"


def _computes(group: Group) -> bool:
    """Whether it is more than the small actor that follows the workers of a trial."""
    return any(bundle.get(key) for bundle in group.bundles for key in _COMPUTING)


def fits_now(mine: list[Group], have: Capacity) -> bool:
    """Whether the live nodes hold all of these groups, so that what keeps one waiting is not of this job's groups.

    Args:
        mine: All groups of this job, placed or not.
        have: What the cluster has.
    """
    needs = (({key: amount for key, amount in bundle if amount}, count) for bundle, count in _bundles(mine).items())
    return all(not need or have.workers(need) >= count for need, count in needs)


def _bundles(of: list[Group]) -> Counter[tuple[tuple[str, float], ...]]:
    return Counter(tuple(sorted(bundle.items())) for group in of for bundle in group.bundles)


def situation(waiting: list[Group], have: Capacity, doing: Growth, *, is_taken: bool = False) -> str:
    """What is asked for, what is there, and what the autoscaler does about it.

    Args:
        waiting: What there is no room for.
        have: What the cluster has.
        doing: What its autoscaler does.
        is_taken: Whether the nodes hold it, and other work is on them: tasks that time the runs of a sweep, or another job.
    """
    bundles = _bundles(waiting)
    asked = ", ".join(f"{count} x {amounts_in_words(dict(bundle))}" for bundle, count in bundles.items())
    need = {key: 1.0 for bundle in bundles for key, _ in bundle}
    parts = [f"{asked}: {have.described(need)}"]
    if doing.coming:
        since = "" if doing.since_s is None else f" since {doing.since_s:.0f} s"
        parts.append(f"{', '.join(f'{count} x {name}' for name, count in doing.coming.items())} on their way{since}")
    if trouble := trouble_in_words(doing, waiting):
        parts.append(trouble)
    elif is_taken:
        parts.append("other work holds them for now, such as the timing of a forecast or another job")
    elif not doing.coming:
        parts.append("no node is on its way")
    return "; ".join(parts)


def trouble_in_words(doing: Growth, waiting: list[Group]) -> str:
    """What keeps nodes from coming; empty where nothing is known to.

    Args:
        doing: What the autoscaler does.
        waiting: What there is no room for.
    """
    parts = []
    if doing.failed:
        parts.append(f"{', '.join(sorted(doing.failed))} could not be started (monitor.log on the head says why)")
    if any(group.id in doing.impossible for group in waiting):
        parts.append("the autoscaler can add no node that holds it, or no more of them")
    return "; ".join(parts)
