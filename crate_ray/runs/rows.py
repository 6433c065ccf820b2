"""A run as one row: what it was, what it cost, what it measured. What every comparison reads.

In: the small files of a run folder, never its records. Out: a frozen RunRow that JSON can hold, so that the mirror keeps it in
a tag and a comparison of a thousand runs costs one request. Everything here was measured or counted by training or by a
probe; nothing is computed again. A number that was not measured is not there.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, NamedTuple, Self

from crate_ray.runs.records import decode_number, encode_number
from crate_ray.runs.status import State

Timing = Literal["exclusive", "shared"]


class Estimate(NamedTuple):
    """A value and the ends of its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run.

    Attributes:
        run_uid: Made when the run was created; the same in its folder and in MLflow.
        name: Of its folder.
        uri: Of its folder.
        kind: train, trial or control.
        family: crate or vit.
        model: As the presets call it, without a size.
        recipe: The recipe that it started from.
        sweep: run_uid of the sweep above it.
        arm: Side of the sweep.
        stage: screen or confirm, of a trial.
        seed: Of the run.
        state: As its status says.
        is_complete: Whether it took the last step of its schedule; a trial that a scheduler stopped did not.
        configuration: 8 hex digits of all that its numbers follow from but the seed; runs that share it differ in their seed.
        settings: Shape and tuning: depth, width, mask_ratio, ista_step_size, lr, wd, ... by the names of MLflow's parameters.
        compare: Parts of the compare digest: data, evaluation, schedule, precision.
        commit: Of the checkout; None when installed without one.
        is_dirty: Whether the checkout had changes.
        tuning_trials: Screening trials of its arm that finished or were stopped; None outside a sweep.
        params_total: Trainable parameters of the whole model.
        params_encoder: Trainable parameters of the encoder.
        params_paper: Counted as the papers count.
        train_flops_per_image: Forward and backward of the executed form, mask-aware, by closed form.
        images: Seen in training.
        train_pflops: train_flops_per_image x images / 1e15.
        train_hours: Wall time of training over all attempts.
        hardware: Device and number of workers: "4 x NVIDIA H200".
        images_per_s: Of the timing pass where there was one, else of training itself.
        timing: Where images_per_s comes from; "exclusive" alone is compared.
        values: Final values without `final/`: eval_loss, probe_top1 of the judged split, knn_top1, rankme, ...
        intervals: Of judged accuracies, over source images: probe_top1, gain, control_top1, ...
        judged_split: What `values` of probes were judged on.
        probe_protocol: Its version.
        loss_target: What the validation loss asks; losses compare only where it is equal.
        rollbacks: Returns to an earlier checkpoint.
        skipped_steps: Steps without a finite loss or gradient.
    """

    run_uid: str
    name: str
    uri: str
    kind: str
    family: str
    model: str
    recipe: str
    sweep: str | None = None
    arm: str | None = None
    stage: str | None = None
    seed: int
    state: State
    is_complete: bool
    configuration: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    compare: Mapping[str, Any] = field(default_factory=dict)
    commit: str | None = None
    is_dirty: bool | None = None
    tuning_trials: int | None = None
    params_total: int
    params_encoder: int
    params_paper: int
    train_flops_per_image: float
    images: int
    train_pflops: float
    train_hours: float
    hardware: str | None = None
    images_per_s: float | None = None
    timing: Timing | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, Estimate] = field(default_factory=dict)
    judged_split: str | None = None
    probe_protocol: int | None = None
    loss_target: Mapping[str, Any] = field(default_factory=dict)
    rollbacks: int = 0
    skipped_steps: int = 0

    @property
    def exclusive_hours(self) -> float | None:
        """Hours that its images take by the exclusive timing pass; None without one."""
        return self.images / self.images_per_s / 3600 if self.timing == "exclusive" and self.images_per_s else None

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON can hold it: non-finite numbers by name."""
        values = {key: encode_number(value) for key, value in self.values.items()}
        intervals = {key: [encode_number(number) for number in interval] for key, interval in self.intervals.items()}
        return asdict(self) | {"values": values, "intervals": intervals}

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Self:
        """The inverse of `as_dict`; keys that another release wrote are passed over."""
        known = {item.name: body[item.name] for item in fields(cls) if item.name in body}
        known["values"] = {key: decode_number(value) for key, value in known.get("values", {}).items()}
        intervals = known.get("intervals", {})
        known["intervals"] = {key: Estimate(*map(decode_number, interval)) for key, interval in intervals.items()}
        return cls(**known)
