"""The numbers that a run ends with: what comparisons, sweeps and reports read.

In: what the run cost and measured. Out: final.json and one record, with four significant digits. Probes add theirs later, in
the same way.
"""

import dataclasses
from collections.abc import Mapping

from crate_ray.config import RunConfig
from crate_ray.models.cost import BACKWARD_FACTOR, count_parameters, training_flops_per_image
from crate_ray.runs import MetricSink, RunFolder, record_precision


def write_result(
    config: RunConfig,
    folder: RunFolder,
    sink: MetricSink,
    *,
    step: int,
    train_seconds: float,
    precision: str,
    measured: Mapping[str, float],
) -> None:
    """Writes final.json of a run that has taken its last step: its cost, and what was measured at the end.

    Args:
        config: Of the run.
        folder: Of the run.
        sink: Takes the same numbers as a record.
        step: The last one.
        train_seconds: Over all attempts.
        precision: The resolved precision.
        measured: By key, each below `final/`.
    """
    parameters, flops = count_parameters(config.model), training_flops_per_image(config.model)
    images = step * config.train.global_batch
    record_precision(folder, precision)
    cost = {
        "parameters": dataclasses.asdict(parameters),
        "training_flops_per_image": flops,
        "images": images,
        "train_seconds": train_seconds,
    }
    folder.write_json("final.json", {"values": {}, "cost": cost})
    costs = {
        "final/params_m": parameters.trainable / 1e6,
        "final/encoder_params_m": parameters.encoder / 1e6,
        "final/gflops": flops / BACKWARD_FACTOR / 1e9,
        "final/train_pflops": flops * images / 1e15,
        "final/train_hours": train_seconds / 3600,
    }
    write_final(folder, sink, step, {**costs, **measured})


def write_final(folder: RunFolder, sink: MetricSink, step: int, values: Mapping[str, float]) -> None:
    """Adds final values to the run: in final.json and as a record, with four significant digits."""
    rounded = {key: float(f"{value:.4g}") for key, value in values.items()}
    held = folder.read_json("final.json") or {"values": {}}
    folder.write_json("final.json", {**held, "values": {**held["values"], **rounded}})
    sink.write(step, rounded)
    sink.flush()
