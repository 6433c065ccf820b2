"""Judging runs after training: which checkpoint (`subjects`), on what (`splits`), from which features (`encode`), by which
protocol (`measures`), and what is written down (`judge`); fine-tuning as a judgement (`fine_tune`).
"""

from crate_ray.training.probes.judge import judge_classifier, judge_encoder, num_images, probe_raw_pixels, probe_run
from crate_ray.training.probes.splits import OtherData, Split, without_labels
from crate_ray.training.probes.subjects import ProbeRequest, Subject, find_subject, finished_checkpoint, untrained

__all__ = [
    "OtherData",
    "ProbeRequest",
    "Split",
    "Subject",
    "find_subject",
    "finished_checkpoint",
    "judge_classifier",
    "judge_encoder",
    "num_images",
    "probe_raw_pixels",
    "probe_run",
    "untrained",
    "without_labels",
]
