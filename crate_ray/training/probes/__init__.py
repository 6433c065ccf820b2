"""Judging runs after training: which checkpoint (`subjects`), on what (`splits`), from which features (`encode`), by which
protocol (`measures`), and what is written down (`judge`); fine-tuning as a judgement (`fine_tune`).
"""

from crate_ray.training.probes.fine_tune import FineTunes, plan_fine_tunes, record_fine_tunes
from crate_ray.training.probes.judge import (
    CLUSTER_FROM,
    check_subject,
    judge_classifier,
    judge_encoder,
    num_images,
    probe_raw_pixels,
    probe_run,
)
from crate_ray.training.probes.splits import OtherData, Split, without_labels
from crate_ray.training.probes.subjects import ProbeRequest, Subject, find_subject, finished_checkpoint, untrained

__all__ = [
    "CLUSTER_FROM",
    "FineTunes",
    "OtherData",
    "ProbeRequest",
    "Split",
    "Subject",
    "check_subject",
    "find_subject",
    "finished_checkpoint",
    "judge_classifier",
    "judge_encoder",
    "num_images",
    "plan_fine_tunes",
    "probe_raw_pixels",
    "probe_run",
    "record_fine_tunes",
    "untrained",
    "without_labels",
]
