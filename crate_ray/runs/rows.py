"""A run as one row: what it was, what it cost, what it measured. What every comparison reads.

In: the small files of a run folder, never its records. Out: a frozen RunRow that JSON can hold, so that the mirror keeps it in
a tag and a comparison of a thousand runs costs one request. Everything here was measured or counted by training or by a
probe; nothing is computed again. A number that was not measured is not there. A run has one row for each split that it was
judged on, for a number on validation and one on test are not to be mixed.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any, Literal, NamedTuple, Self

from crate_ray import storage
from crate_ray.config import ConfigError, RunConfig, digest, is_exploratory
from crate_ray.runs.folder import RunFolder, sweep_of
from crate_ray.runs.records import decode_number, encode_number
from crate_ray.runs.screening import Screening, read_screening, screening_of
from crate_ray.runs.settings import settings_of
from crate_ray.runs.status import State, Status, read_status
from crate_ray.runs.trials import TrialRow, loss_target, read_sweep, read_trial

Timing = Literal["exclusive", "shared"]
Split = Literal["validation", "test"]
_SPLITS: tuple[Split, ...] = ("test", "validation")
_KINDS = ("train", "trial", "control")
_READERS = 16
_SEED = "train.seed"
_FINAL = "final/"
_RAW_PIXELS = "raw_pixels_top1"  # of the data, and not of a run: it stands beside the values of a report
_DAMAGES = (AttributeError, KeyError, TypeError, ValueError)
"""What comes of a file that is no JSON, or whose keys and values are not those that this release writes."""
_REPORT = re.compile(r"probe_(test|validation)(?!.*_step_\d{8}).*\.json")
"""Of the end of a run; reports on earlier checkpoints have their step in the name."""


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
        tuning_trials: Screening trials of its arm that are over; None outside a sweep, and of a screening trial read alone.
        params_total: Trainable parameters of the whole model; like all counts here 0 where the run has not come to its end.
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
        probe_protocol: Version of the protocol of `probe_top1`.
        loss_target: What the validation loss asks; losses compare only where it is equal.
        rollbacks: Returns to an earlier checkpoint.
        skipped_steps: Steps without a finite loss or gradient.
        incomplete: Why it is not complete, in words; None where it is.
        place: Of a confirmed run: where its point stood in the screening of its arm, from 1.
        created: Unix seconds.
        measured_by: Name and version of the protocol of each judged value: "house/1".
        judged_data: Digest of the shards that were judged on, by the name that values on them begin with; "" for the run's own.
        untuned: Of a sweep's run: why its arms had no equally tuned learning rates; None where they had, and outside a sweep.
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
    incomplete: str | None = None
    place: int | None = None
    created: float | None = None
    measured_by: Mapping[str, str] = field(default_factory=dict)
    judged_data: Mapping[str, str] = field(default_factory=dict)
    untuned: str | None = None

    def data_of(self, metric: str) -> str:
        """The name of the shards that a value is of, which it begins with; "" for the run's own."""
        return max((name for name in self.judged_data if name and metric.startswith(f"{name}_")), key=len, default="")

    def judge_of(self, metric: str) -> tuple[str | None, str | None]:
        """Split and protocol that a value was judged by; None twice for what training measured itself."""
        if metric in self.measured_by:
            return self.judged_split, self.measured_by[metric]
        is_judged = metric in self.intervals or (metric.endswith("top1") and not metric.startswith("eval_"))
        return (self.judged_split, f"house/{self.probe_protocol}") if is_judged else (None, None)

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


@dataclass(frozen=True)
class RunRows:
    """What folders hold.

    Attributes:
        rows: Of the runs, in the order of their folders.
        unread: Why a folder is no run, or not yet, or cannot be read, by its URI.
    """

    rows: tuple[RunRow, ...]
    unread: Mapping[str, str]


def read_run_row(folder: RunFolder, *, split: Split | None = None) -> RunRow | None:
    """The row of a run.

    Args:
        folder: The run's.
        split: Whose judgement `values` hold, and none where it was not judged on it; None for test where it was judged there,
            else validation. A screening trial is read on validation always.

    Returns:
        None while the run is being created, or where the folder is no trained run.

    Raises:
        ConfigError: A file of the run is damaged, or of another release.
    """
    sweep = sweep_of(folder)
    try:
        trial = read_trial(folder) if sweep is not None else None
        is_confirmed = trial is not None and trial.stage == "confirm"
        row = _row(folder, trial, _screening_of(sweep) if sweep is not None and is_confirmed else None, split)
    except _DAMAGES as error:
        raise ConfigError(f"{folder.uri}: {_damaged(error)}") from None
    return row if isinstance(row, RunRow) else None


def read_run_rows(folders: Sequence[RunFolder], *, split: Split | None = None) -> RunRows:
    """The rows of many runs, each sweep's screening read once; `split` as for one run."""
    with ThreadPoolExecutor(_READERS) as pool:
        sweeps = list(pool.map(sweep_of, folders))
        trials = list(pool.map(_trial_of, folders, sweeps))
        screenings = {uri: _screening_of(RunFolder(uri)) for uri in {sweep.uri for sweep in sweeps if sweep is not None}}
        of_folder = [screenings[sweep.uri] if sweep is not None else None for sweep in sweeps]
        found = list(pool.map(partial(_read, split=split), folders, trials, of_folder))
    unread = {folder.uri: item for folder, item in zip(folders, found, strict=True) if isinstance(item, str)}
    return RunRows(tuple(item for item in found if isinstance(item, RunRow)), unread)


def _trial_of(folder: RunFolder, sweep: RunFolder | None) -> TrialRow | str | None:
    """The trial's row, or why it cannot be read; None outside a sweep."""
    try:
        return read_trial(folder) if sweep is not None else None
    except _DAMAGES as error:
        return _damaged(error)


def _screening_of(sweep: RunFolder) -> Screening | None:
    """The screening of a sweep; with a trial that cannot be read its counts and places are not known, so it has none."""
    try:
        return read_screening(sweep)
    except ConfigError:
        raise
    except _DAMAGES:
        config = read_sweep(sweep)
        return screening_of(config, ()) if config is not None else None


def _read(folder: RunFolder, trial: TrialRow | str | None, screening: Screening | None, split: Split | None) -> RunRow | str:
    """The row, or why there is none."""
    if isinstance(trial, str):
        return trial
    try:
        return _row(folder, trial, screening, split)
    except _DAMAGES as error:
        return _damaged(error)


def _damaged(error: Exception) -> str:
    return f"its files are damaged, or of another release ({type(error).__name__}: {_line(str(error))})"


def _row(folder: RunFolder, trial: TrialRow | None, screening: Screening | None, split: Split | None) -> RunRow | str:
    files = _Files(folder)
    meta, fingerprint = files.read("run_meta.json"), files.read("fingerprint.json")
    if meta is not None and meta["kind"] not in _KINDS:
        return f"a {meta['kind']}, and no trained run"
    if meta is None or fingerprint is None or "config.yaml" not in files.names:
        return _ending(trial) if trial is not None and trial.is_over else "no run was started here, or it is being created"
    try:
        config = folder.read_config()
    except ConfigError as error:
        return f"its configuration cannot be read: {_line(str(error))}"
    status, final = read_status(folder), files.read("final.json")
    incomplete = _why_incomplete(trial, status, final)
    stage = trial.stage if trial else meta.get("stage")
    parts = fingerprint["compare"]["parts"]
    return RunRow(
        run_uid=str(meta["run_uid"]),
        name=folder.name,
        uri=folder.uri,
        kind=meta["kind"],
        family=config.model.family,
        recipe=config.recipe,
        sweep=meta.get("parent_uid"),
        arm=trial.arm if trial else None,
        stage=stage,
        seed=config.train.seed,
        state=status.state if status else "RUNNING",
        is_complete=incomplete is None,
        incomplete=incomplete,
        configuration=configuration_of(fingerprint["resume"]["parts"]),
        compare=parts,
        commit=meta.get("git_commit"),
        is_dirty=meta.get("git_dirty"),
        tuning_trials=screening.tried.get(trial.arm) if screening and trial else None,
        place=screening.place_of(trial) if screening and trial and stage == "confirm" else None,
        created=meta.get("created"),
        untuned=is_exploratory(screening.sweep) if screening else None,
        loss_target=loss_target(config),
        **_described(config, parts.get("precision")),
        **_cost(final, trial),
        **_speed(files, final),
        **_measured(files, final, "validation" if stage == "screen" else split),
    )


class _Files:
    """The JSON files of a folder, listed once: what is not there is not asked for."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self.names = frozenset(storage.list_dir(folder.uri))

    def read(self, name: str) -> dict[str, Any] | None:
        try:
            return self._folder.read_json(name) if name in self.names else None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from None


def configuration_of(resume_parts: Mapping[str, Any]) -> str:
    """8 hex digits of what a run's numbers follow from, without its seed."""
    return digest({key: value for key, value in resume_parts.items() if key != _SEED})[:8]


def _described(config: RunConfig, precision: str | None) -> dict[str, Any]:
    settings = {
        key: list(value) if isinstance(value, tuple) else value for key, value in settings_of(config, precision).items()
    }
    return {"model": settings.pop("model"), "settings": settings}


def _why_incomplete(trial: TrialRow | None, status: Status | None, final: Mapping[str, Any] | None) -> str | None:
    if trial is not None and trial.state != "FINISHED":
        return _ending(trial)
    if status is None:
        return "never started"
    if status.state == "RUNNING":
        return "its driver died; start it again to go on" if status.is_stale else "still running"
    if status.state != "FINISHED":
        return status.state.lower() + (f" ({_line(status.reason)})" if status.reason else "")
    if final is None:
        return "finished as a copy of another trial" if trial else "finished without final.json"
    return None


def _ending(trial: TrialRow) -> str:
    of_total = f" of {trial.total_steps}" if trial.total_steps else ""
    if trial.state == "STOPPED":
        return f"stopped by the scheduler at step {trial.step}{of_total}"
    if trial.state == "RUNNING":
        return f"still running, at step {trial.step}{of_total}"
    return trial.state.lower() + (f" ({_line(trial.reason)})" if trial.reason else "")


def _line(reason: str) -> str:
    return reason.partition("\n")[0]


def _cost(final: Mapping[str, Any] | None, trial: TrialRow | None) -> dict[str, Any]:
    """Counted by training at its end; of a trial without one, what the sweep knew of it beforehand."""
    if final is None:
        known = trial.quantities if trial else {}
        parameters = {key: round(1e6 * known.get(name, 0)) for key, name in _QUANTITIES.items()}
        return {
            **parameters,
            "params_paper": 0,
            "train_flops_per_image": 0.0,
            "images": 0,
            "train_pflops": 0.0,
            "train_hours": 0.0,
        }
    cost = final["cost"]
    return {
        "params_total": cost["parameters"]["trainable"],
        "params_encoder": cost["parameters"]["encoder"],
        "params_paper": cost["parameters"]["paper"],
        "train_flops_per_image": float(cost["training_flops_per_image"]),
        "images": cost["images"],
        "train_pflops": cost["training_flops_per_image"] * cost["images"] / 1e15,
        "train_hours": cost["train_seconds"] / 3600,
    }


_QUANTITIES = {"params_total": "params_m", "params_encoder": "encoder_params_m"}


def _speed(files: _Files, final: Mapping[str, Any] | None) -> dict[str, Any]:
    """Of the exclusive timing pass, else of training, which may have shared its machine."""
    timing = files.read("timing.json")
    if timing is not None and timing.get("exclusive"):
        return {"images_per_s": timing["images_per_s"], "hardware": timing.get("hardware"), "timing": "exclusive"}
    measured = (final or {}).get("values", {}).get("final/images_per_s")
    return {"images_per_s": measured, "timing": "shared" if measured is not None else None}


def _measured(files: _Files, final: Mapping[str, Any] | None, split: Split | None) -> dict[str, Any]:
    """What training measured at its end, with the judgements on one split alone, whatever else final.json holds by now."""
    if final is None:
        return {}
    reports = [report for name in sorted(files.names) if _REPORT.fullmatch(name) and (report := files.read(name)) is not None]
    splits = {report["split"] for report in reports}
    judged = split if split is not None else next((name for name in _SPLITS if name in splits), None)
    chosen = [report for report in reports if report["split"] == judged]
    of_probes = {key for report in reports for key in report["values"]}
    unlabelled = {key: value for report in reports for key, value in report["values"].items() if _is_label_free(report, key)}
    trained = {key: value for key, value in final["values"].items() if key not in of_probes}
    probed = {key: value for report in chosen for key, value in report["values"].items()}
    pixels = {key: report[key] for report in chosen for key in (_RAW_PIXELS,) if key in report and "data" not in report}
    found = {**trained, **unlabelled, **probed, **pixels}
    values = {key.removeprefix(_FINAL): decode_number(value) for key, value in found.items()}
    helped = {key: int(values.pop(key, 0)) for key in ("rollbacks", "skipped_steps")}
    stamps = {key.removeprefix(_FINAL): stamp for report in reports for key, stamp in report.get("measured_by", {}).items()}
    own = next((report for report in chosen if "data" not in report), None)
    return {
        "values": values,
        "intervals": {key: item for report in chosen for key, item in _intervals(report)},
        "judged_split": judged if chosen else None,
        "judged_data": {item.get("data", ""): item["data_digest"][:16] for item in chosen if "data_digest" in item},
        "probe_protocol": own.get("protocol") if own else None,
        "measured_by": {key: stamp for key, stamp in stamps.items() if key in values},
        **helped,
    }


def _is_label_free(report: Mapping[str, Any], key: str) -> bool:
    """Measured on validation without its labels, whatever split the rest of the report is of."""
    return bool(report.get("measured_by", {}).get(key, "").startswith("label-free"))


def _intervals(report: Mapping[str, Any]) -> Iterator[tuple[str, Estimate]]:
    """Every value with its ends, by the names of values: those on other shards begin with the name of these."""
    prefix = f"{report['data']}_" if "data" in report else ""
    for key, item in report.items():
        if isinstance(item, list) and len(item) == 3 and all(isinstance(number, int | float) for number in item):
            yield prefix + key, Estimate(*map(decode_number, item))
