"""Evaluation: frozen features, probes and their intervals. Takes tensors and models, never shards."""

from crate_ray.evaluation.features import Features, extract_features, raw_pixels
from crate_ray.evaluation.intervals import Interval, accuracy_interval, paired_gain
from crate_ray.evaluation.probes import (
    FewLabelResult,
    Judgement,
    ProbeResult,
    Rows,
    draw_few_labels,
    few_label_probe,
    judge,
    knn_top1,
    linear_probe,
    raw_pixel_probe,
)
from crate_ray.evaluation.protocols import PROBE_PROTOCOL

__all__ = [
    "PROBE_PROTOCOL",
    "Features",
    "FewLabelResult",
    "Interval",
    "Judgement",
    "ProbeResult",
    "Rows",
    "accuracy_interval",
    "draw_few_labels",
    "extract_features",
    "few_label_probe",
    "judge",
    "knn_top1",
    "linear_probe",
    "paired_gain",
    "raw_pixel_probe",
    "raw_pixels",
]
