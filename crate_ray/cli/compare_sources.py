"""What `crate-ray compare` reads: run folders, folders of runs, sweeps or MLflow experiments, all as rows.

In: what the user named. Out: rows, why the rest has none, and where the report and its mirror belong. A name is a folder where
there is one, else an experiment. Only small files are read here; what a verdict needs beyond the rows, the answers of the
probes, is read from the folders of the runs.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crate_ray import storage
from crate_ray.config import ConfigError, TrackingConfig
from crate_ray.runs import RunFolder, list_runs
from crate_ray.runs.rows import RunRow, Split, read_run_rows

_REPORT = "comparison"
_DATABASE = "mlflow.db"
_DEFAULT_ROOT = "out"


@dataclass(frozen=True)
class Store:
    """A tracking store, and the experiment in it that a report is logged to."""

    uri: str
    experiment: str

    def how_to_open(self) -> str | None:
        """The command that serves a database; None for a server, which serves itself."""
        from crate_ray.tracking.client import database_path

        path = database_path(self.uri)
        return None if path is None else f"crate-ray tracking ui {path.parent}"


@dataclass
class Material:
    """What was found under the names that the user gave.

    Attributes:
        name: Of the comparison.
        rows: Of all runs, each once.
        unread: Why something has no row, by its name; of one thing that was named alone, by where it lies.
        out: Folder for the report, unless the user names one.
        uri: Tracking store of the runs; None where they are in none.
        experiment: Theirs.
    """

    name: str
    out: Path
    uri: str | None
    experiment: str
    rows: list[RunRow] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)

    @property
    def store(self) -> Store | None:
        """Where the report is logged to; None where the runs are in no store."""
        return None if self.uri is None else Store(self.uri, self.experiment)

    @property
    def sweep_uid(self) -> str | None:
        """run_uid of the one sweep that all runs are trials of."""
        sweeps = {row.sweep for row in self.rows}
        return sweeps.pop() if len(sweeps) == 1 else None


def gather(what: Sequence[str], *, split: Split, uri: str | None, experiment: str | None) -> Material:
    """Reads everything that was named.

    Args:
        what: Folders or experiments.
        split: Whose judgement the rows hold.
        uri: Tracking store; None for that of the runs.
        experiment: Experiment to log to; None for that of the runs.

    Raises:
        ConfigError: Something named is neither a folder of runs nor an experiment, or the store does not answer.
    """
    parts = [_of_folder(item, split) if storage.exists(item) else _of_experiment(item, split, uri) for item in what]
    name = " + ".join(dict.fromkeys(part.name for part in parts))
    mirrored = parts[0] if uri is not None else next((part for part in parts if part.uri is not None), parts[0])
    material = Material(name, parts[0].out, uri or mirrored.uri, experiment or mirrored.experiment)
    rows = {row.run_uid: row for part in reversed(parts) for row in reversed(part.rows)}
    material.rows = list(rows.values())[::-1]
    material.unread = _named(parts, material.rows)
    return material


def _named(parts: Sequence[Material], rows: Sequence[RunRow]) -> dict[str, str]:
    """What has no row by its name, or by where it lies, where something else is called alike."""
    names = {place: _name_of(place, part) for part in parts for place in part.unread}
    counts = Counter([*names.values(), *(row.name for row in rows)])
    reasons = {place: reason for part in parts for place, reason in part.unread.items()}
    return {names[place] if counts[names[place]] == 1 else place: reason for place, reason in reasons.items()}


def _name_of(place: str, part: Material) -> str:
    is_folder = storage.absolute(place) == place
    return RunFolder(place).name if is_folder else place.removeprefix(f"{part.name}: ")


class FolderAnswers(Mapping[str, dict[str, Any]]):
    """What the probes of runs answered on each source image, by run_uid; read from a run's folder when it is asked for.

    Of large test sets the answers of all runs are gigabytes, and a comparison asks for those of its pairs alone. A folder of
    another machine, or of a bucket that this one may not read, has none.

    Args:
        rows: Of the runs.
        split: That was judged.
    """

    def __init__(self, rows: Sequence[RunRow], split: Split) -> None:
        self._rows = {row.run_uid: row for row in rows if row.judged_split == split}
        self._split = split
        self._read: dict[str, dict[str, Any] | None] = {}

    def __getitem__(self, run_uid: str) -> dict[str, Any]:
        if run_uid not in self._read:
            self._read[run_uid] = self._answers(self._rows[run_uid])
        body = self._read[run_uid]
        if body is None:
            raise KeyError(run_uid)
        return body

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def _answers(self, row: RunRow) -> dict[str, Any] | None:
        try:
            with storage.retry_deadline(0):
                return RunFolder(row.uri).read_json(f"answers_{self._split}.json")
        except (OSError, TypeError, ValueError):  # not at hand, or damaged
            return None


def _of_folder(item: str, split: Split) -> Material:
    folder = RunFolder(item)
    is_run = folder.exists()
    folders = [folder] if is_run else list_runs(item)
    if not folders:
        raise ConfigError(f"no runs in '{item}'; give a run folder, the folder above some (storage.path), or that of a sweep")
    read = read_run_rows(folders, split=split)
    store, experiment = _store_of(folder, folders)
    return Material(folder.name, _beside(folder, is_run=is_run), store, experiment, list(read.rows), dict(read.unread))


def _beside(folder: RunFolder, *, is_run: bool) -> Path:
    """`comparison/` in a folder of runs or beside a run; what lies in an object store is compared into the current folder."""
    if not folder.is_local:
        return Path(_REPORT) / folder.name
    path = storage.local_path(folder.uri)
    return Path(path.parent if is_run else path) / _REPORT


def _store_of(folder: RunFolder, runs: Sequence[RunFolder]) -> tuple[str | None, str]:
    """Store and experiment of the runs, as the first readable one says: a server, or a database that lies above them."""
    tracking = _tracking_of(runs)
    uri = tracking.uri
    if uri is None and folder.is_local:
        path = storage.local_path(folder.uri)
        held = next((place / _DATABASE for place in (path, *path.parents[:3]) if (place / _DATABASE).is_file()), None)
        uri = None if held is None else f"sqlite:///{held.resolve()}"
    return uri, tracking.experiment


def _tracking_of(runs: Sequence[RunFolder]) -> TrackingConfig:
    for folder in runs:
        with contextlib.suppress(ValueError, FileNotFoundError):  # of another release, or not yet a run
            return folder.read_config().tracking
    return TrackingConfig()


def _of_experiment(item: str, split: Split, uri: str | None) -> Material:
    from crate_ray.tracking import default_uri, rows_of_experiment
    from crate_ray.tracking.client import database_path

    if "://" in item or item.startswith(("/", "./", "../", "~")):
        raise ConfigError(f"'{item}' does not exist; give a run folder, a folder of runs or of a sweep, or an experiment")
    store = uri or default_uri(_DEFAULT_ROOT)
    try:
        found = rows_of_experiment(store, item, split=split)
    except ConfigError as error:
        raise ConfigError(f"'{item}' is no folder, and as an experiment: {error}") from None
    path, slug = database_path(store), re.sub(r"[^\w.-]+", "-", item)
    out = Path(_REPORT) / slug if path is None else path.parent / _REPORT / slug
    unread = {f"{item}: {name}": reason for name, reason in found.unread.items()}
    return Material(item, out, store, item, found.rows, unread)
