"""Tiny sweeps on the digits, and what became of them."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from conftest import TINY

from crate_ray.config import SweepConfig
from crate_ray.launch.sweeps.driver import SweepOutcome, run_sweep
from crate_ray.runs import RecordTail, RunFolder, TrialRow, list_trials, read_status

MAE = {
    "model.width": 32,
    "model.num_heads": 2,
    "model.encoder_depth": 1,
    "model.decoder_depth": 1,
    "model.decoder_width": 32,
    "model.decoder_num_heads": 2,
}
NOTHING: Mapping[str, Any] = MappingProxyType({})
RATES = {"optimizer.lr": {"grid": [1e-3, 1e-4, 3e-4]}}


@dataclass
class Seen:
    """What a sweep told its watcher."""

    started: list[str] = field(default_factory=list)
    ended: list[TrialRow] = field(default_factory=list)
    before: list[str] = field(default_factory=list)

    def known(self, rows: list[TrialRow], *, total: int | None, refused: int = 0) -> None:
        self.before = [row.id for row in rows]

    def stage(self, name: str, total: int) -> None:
        pass

    def notes(self, *parts: str) -> None:
        pass

    def trial_started(self, row: TrialRow, folder: RunFolder) -> None:
        self.started.append(row.id)

    def trial_ended(self, row: TrialRow) -> None:
        self.ended.append(row)


def write_sweep_file(digits: Path, folder: Path, **keys: Any) -> Path:
    """A sweep file of tiny trials; keys over those of the file."""
    fixed = dict(item.split("=", 1) for item in TINY)
    split = {"train": "train", "eval": "validation", "test": "test"}
    values: dict[str, Any] = {
        "base": "digits_crate_mae",
        "set": {
            **{key: yaml.safe_load(text) for key, text in fixed.items() if key != "eval.every_steps"},
            **{f"data.{key}": f"{digits}/{name}" for key, name in split.items()},
            "model.mask_ratio": 0.5,
            "train.steps": 20,
            "storage.path": str(folder / "out"),
        },
        "tune": RATES,
        "report_every_steps": 5,
        "resources_per_trial": {"cpus": 1},
        **keys,
    }
    values["set"].update(keys.pop("more", {}))
    values.pop("more", None)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def write_population_file(
    digits: Path, folder: Path, *, steps: int, interval_steps: int, scheduler: Mapping[str, Any] = NOTHING, **keys: Any
) -> Path:
    """A sweep file of four trials that copy each other; keys over those of the file and of its scheduler."""
    domain = {"loguniform": [1e-5, 1e-2]}
    return write_sweep_file(
        digits,
        folder,
        tune={},
        space={"optimizer.lr": domain},
        search={"method": "random"},
        scheduler={
            "type": "pbt",
            "population": 4,
            "interval_steps": interval_steps,
            "perturb": {"optimizer.lr": domain},
            **scheduler,
        },
        more={"train.steps": steps},
        **keys,
    )


def run(path: Path, *overrides: str) -> tuple[SweepOutcome, Seen]:
    """Runs a sweep in this process."""
    seen = Seen()
    return run_sweep(SweepConfig.load(str(path), overrides), events=seen), seen


def attempts(folder: RunFolder) -> dict[str, int]:
    """Starts of each trial."""
    found = {}
    for row in list_trials(folder.uri):
        status = read_status(RunFolder(folder.path("trials", row.id)))
        found[row.id] = status.attempt if status else 0
    return found


def results(folder: RunFolder) -> dict[str, Any]:
    """The file of results."""
    return dict(json.loads(Path(folder.uri, "results.json").read_text()))


def study_states(folder: RunFolder) -> dict[str, int]:
    """Trials of the search's own database by state."""
    import optuna

    storage = f"sqlite:///{folder.uri}/study.db"
    studies = optuna.get_all_study_names(storage)
    trials = [trial for name in studies for trial in optuna.load_study(study_name=name, storage=storage).trials]
    return dict(Counter(trial.state.name for trial in trials))


def steps_done_twice(folder: RunFolder) -> dict[str, int]:
    """Steps that were trained more than once, of each run folder below the trials."""
    twice = {}
    for path in sorted(Path(folder.uri, "trials").rglob("metrics.jsonl")):
        records = RecordTail(RunFolder(str(path.parent))).poll()
        steps = [record.step for record in records if "train/loss" in record.values]
        twice[str(path.parent.relative_to(folder.uri))] = len(steps) - len(set(steps))
    return twice
