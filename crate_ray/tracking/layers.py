"""The white-box measures of a finished run as curves over its layers.

In: the run's records under `whitebox/layerNN/`. Out: one metric a measure, whose steps are layers: `layers/nonzero_fraction`,
and `layers/initial_nonzero_fraction` of the weights before the first step. A chart of twelve layers of sixty runs as they
trained would be 720 curves; this is one curve a run, and what a reader asks first: how a code changes from layer to layer,
and whether training did that. The curves over training remain as they are, metric by metric.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from crate_ray.runs import Record
from crate_ray.tracking.describe import to_ms
from crate_ray.tracking.limits import point

if TYPE_CHECKING:
    from mlflow.entities import Metric

PREFIX = "layers/"
INITIAL = "layers/initial_"
_LAYER = re.compile(r"whitebox/layer(\d+)/(\w+)")

_Key = tuple[str, int]  # measure, layer


class LayerCurves:
    """The first and the newest value of every measure of every layer, with the time of each."""

    def __init__(self) -> None:
        self._first: dict[_Key, tuple[int, float, float]] = {}  # step, time, value
        self._newest: dict[_Key, tuple[int, float, float]] = {}

    def see(self, records: Iterable[Record]) -> None:
        """Takes in records in the order of their steps."""
        for record in records:
            for name, value in record.values.items():
                if (found := _LAYER.fullmatch(name)) is not None:
                    key = (found[2], int(found[1]))
                    self._newest[key] = (record.step, record.time, value)
                    self._first.setdefault(key, self._newest[key])

    def points(self) -> list["Metric"]:
        """The curves: the newest values, and those of step 0 where it was measured."""
        initial = {key: seen for key, seen in self._first.items() if seen[0] == 0}
        return [
            point(f"{prefix}{measure}", value, to_ms(time), layer)
            for prefix, values in ((PREFIX, self._newest), (INITIAL, initial))
            for (measure, layer), (_, time, value) in sorted(values.items())
        ]
