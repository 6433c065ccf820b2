"""What a sweep has used, and whether one more trial would go past what it may use.

In: the limits, what a trial holds, and the time that trials held it. Out: a reason to start no more, in numbers. A trial that
has not ended counts as a typical one: the mean of those measured so far. The first ones are started on trust.
"""

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from crate_ray.config.sweep import BudgetConfig, TrialResources
from crate_ray.runs import TrialRow


@dataclass
class Budget:
    """The account of a sweep. Tune's thread writes it while the main thread reads what was used.

    Attributes:
        limits: What it may use.
        resources: What one trial holds.
        hour_price: Of what one trial holds, in dollars; None where no price is known.
        hours_before: Wall time of earlier sessions.
        running: Trials that hold resources: the time they held them before, and the moment they got them.
        seconds: Of each trial that is over.
        num_started: Screening trials, whatever became of them.
    """

    limits: BudgetConfig
    resources: TrialResources
    hour_price: float | None = None
    hours_before: float = 0.0
    running: dict[str, tuple[float, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    num_started: int = 0
    _since: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take_in(self, rows: Iterable[TrialRow]) -> None:
        """Counts what earlier sessions have used."""
        for row in rows:
            self.seconds[row.id] = row.seconds
            self.num_started += row.stage == "screen"

    def started(self, row: TrialRow) -> None:
        """A trial gets its resources; one that was started before goes on with its account."""
        with self._lock:
            known = row.id in self.seconds
            self.running[row.id] = (self.seconds.pop(row.id, 0.0), time.monotonic())
            self.num_started += row.stage == "screen" and not known

    def ended(self, row: TrialRow) -> None:
        """A trial has given its resources back."""
        with self._lock:
            before, since = self.running.pop(row.id)
            self.seconds[row.id] = max(row.seconds, before + time.monotonic() - since)

    @property
    def hours(self) -> float:
        """Wall time of all sessions."""
        return self.hours_before + (time.monotonic() - self._since) / 3600

    def spent(self) -> dict[str, float]:
        """Trials, hours, trial_hours, gpu_hours, and usd where a price is known."""
        with self._lock:
            held = sum(self.seconds.values()) + sum(self._elapsed(name) for name in self.running)
        return self._priced(held / 3600, self.hours)

    def _priced(self, trial_hours: float, hours: float) -> dict[str, float]:
        gpus = self.resources.num_workers * self.resources.gpus
        amounts = {"trials": self.num_started, "hours": hours, "trial_hours": trial_hours, "gpu_hours": trial_hours * gpus}
        return amounts if self.hour_price is None else {**amounts, "usd": trial_hours * self.hour_price}

    def refusal(self) -> str | None:
        """Why no further trial may start; None when one may. The number of trials is the planner's business."""
        with self._lock:
            typical = self._typical_seconds()
            going = sum(max(self._elapsed(name), typical) for name in self.running)
            held = sum(self.seconds.values()) + going
        after = self._priced((held + typical) / 3600, self.hours + typical / 3600)
        return _excess(self.limits, after)

    def _typical_seconds(self) -> float:
        return sum(self.seconds.values()) / len(self.seconds) if self.seconds else 0.0

    def _elapsed(self, name: str) -> float:
        before, since = self.running[name]
        return before + time.monotonic() - since


def _excess(limits: BudgetConfig, after: Mapping[str, float]) -> str | None:
    for name in ("gpu_hours", "hours", "usd"):
        limit = getattr(limits, name)
        if limit is not None and after.get(name, 0.0) > limit:
            return f"budget.{name} = {limit:g}: one more trial would make it {after[name]:.3g}"
    return None
