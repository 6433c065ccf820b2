"""What the layers of a chosen model do, beside the same model at its initialisation.

In: the records of a run. Out: one curve a measure, averaged over the seeds of a configuration. Records are long where rows are
short, so only the few runs that a comparison chose are read.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from crate_ray import storage
from crate_ray.analysis.comparison.result import Configuration, LayerCurve
from crate_ray.config import ConfigError
from crate_ray.runs import RunFolder, read_records
from crate_ray.runs.rows import RunRow

MEASURES = ("coding_rate_pre_nats", "coding_rate_post_nats", "nonzero_fraction")
_KEY = re.compile(r"whitebox/layer(\d+)/(\w+)")


@dataclass(frozen=True)
class LayerMeasures:
    """Of one run, each measure from the first layer to the last; NaN where a layer has none.

    Attributes:
        trained: At the last step that was looked at.
        initial: At step 0; empty without it.
    """

    trained: Mapping[str, tuple[float, ...]]
    initial: Mapping[str, tuple[float, ...]]


ReadLayers = Callable[[RunRow], LayerMeasures | None]


def read_layers(row: RunRow) -> LayerMeasures | None:
    """Reads the white-box measures of a run's records; None where it has none, or its folder is out of reach."""
    try:
        with storage.retry_deadline(0):
            read = read_records(RunFolder(row.uri))
    except (OSError, ConfigError):
        return None
    records = [(record.step, found) for record in read if (found := _by_layer(record.values))]
    if not records or records[-1][0] == 0:
        return None
    first_step, first = records[0]
    return LayerMeasures(trained=records[-1][1], initial=first if first_step == 0 else {})


def layer_curves(configurations: Sequence[Configuration], read: ReadLayers) -> tuple[LayerCurve, ...]:
    """The curves of configurations, each the mean over its seeds."""
    return tuple(curve for item in configurations for curve in _curves(item, read))


def _curves(item: Configuration, read: ReadLayers) -> list[LayerCurve]:
    runs = [found for row in item.rows if (found := read(row)) is not None]
    names = [name for name in MEASURES if any(name in run.trained for run in runs)]
    return [
        LayerCurve(
            item.label, item.family, name, _mean([run.trained for run in runs], name), _mean([r.initial for r in runs], name)
        )
        for name in names
    ]


def _mean(runs: Sequence[Mapping[str, tuple[float, ...]]], name: str) -> tuple[float, ...]:
    curves = [run[name] for run in runs if name in run]
    return tuple(fmean(values) for values in zip(*curves, strict=True)) if len({len(curve) for curve in curves}) == 1 else ()


def _by_layer(values: Mapping[str, float]) -> dict[str, tuple[float, ...]]:
    measured = {(name, int(layer)): value for key, value in values.items() for layer, name in _KEY.findall(key)}
    depth = max((layer for _, layer in measured), default=0)
    names = [name for name in MEASURES if any(name == other for other, _ in measured)]
    return {name: tuple(measured.get((name, layer), math.nan) for layer in range(1, depth + 1)) for name in names}
