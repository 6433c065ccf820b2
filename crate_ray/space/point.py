"""A point of a sweep: one run that could be trained.

In: an arm and the values of its varying keys. Out: something small that can be compared, written down and read back; the
configuration of its run is built from it, never stored in it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crate_ray.config import Stage


@dataclass(frozen=True)
class Point:
    """One run that could be trained.

    Attributes:
        arm: The side of the comparison.
        values: Dotted keys with their values over the arm's own configuration; dependents and solved keys included.
        seed: Of the run.
        stage: "screen", or "confirm" for a run that comparisons use.
    """

    arm: str
    values: Mapping[str, Any]
    seed: int
    stage: Stage = "screen"

    def as_dict(self) -> dict[str, Any]:
        """The point as JSON can hold it."""
        return {"arm": self.arm, "values": dict(self.values), "seed": self.seed, "stage": self.stage}

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> "Point":
        """The inverse of `as_dict`; other keys are passed over."""
        return cls(body["arm"], dict(body["values"]), body["seed"], body.get("stage", "screen"))

    @property
    def key(self) -> str:
        """Equal for equal points, whichever of them went through a file."""
        return canonical(self.as_dict())


def canonical(value: Any) -> str:
    """One spelling of a value as JSON, lists and tuples alike."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
