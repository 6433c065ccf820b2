"""Catching up: replays of run folders.

In: run folders. Out: the same MLflow runs that a live mirror makes.
Unlike the mirror, this is the foreground: it waits for the server and says what it could not do.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from crate_ray.runs import RunFolder
from crate_ray.tracking.client import absolute_uri, one_line, open_client, public_uri
from crate_ray.tracking.experiment import initialise
from crate_ray.tracking.replay import RunReplay, Session


@dataclass(frozen=True)
class SyncResult:
    """How one run fared: its MLflow run, the records sent now, and why it is not complete."""

    name: str
    experiment: str
    run_id: str | None
    sent: int
    error: str | None


def sync(
    folders: Iterable[RunFolder], uri: str, experiment: str, *, timeout_s: float = 30, artifact_root: str | None = None
) -> list[SyncResult]:
    """Replays run folders to MLflow; what is there already stays as it is.

    Args:
        folders: The runs, in any order.
        uri: The tracking store.
        experiment: Name of the experiment.
        timeout_s: How long one request may take.
        artifact_root: Where a new experiment keeps files, for a database that is no sqlite; a server decides for itself.

    Returns:
        One result a folder, parents first.

    Raises:
        ConfigError: The store or the experiment cannot be used at all.
    """
    ordered = sorted(folders, key=_created)
    experiment_id = initialise(uri, experiment, timeout_s=timeout_s, artifact_root=artifact_root)
    if experiment_id is None:
        reason = f"MLflow at {public_uri(uri)} does not answer"
        return [SyncResult(folder.name, experiment, None, 0, reason) for folder in ordered]
    session = Session(open_client(uri, timeout_s=timeout_s), absolute_uri(uri), experiment_id)
    return [replay_folder(folder, session, experiment) for folder in ordered]


def replay_folder(folder: RunFolder, session: Session, experiment: str) -> SyncResult:
    """Sends what is missing of one run; whatever goes wrong is in the result.

    Args:
        folder: The run.
        session: Of the store.
        experiment: Name of the session's experiment.
    """
    replay = RunReplay(folder)
    try:
        while replay.is_behind:
            replay.poll()
            replay.push(session)
    except Exception as error:  # noqa: BLE001 - one run that cannot be sent must not keep the others from it
        return SyncResult(folder.name, experiment, replay.run_id, replay.sent, one_line(error))
    error_text = None if replay.run_id else f"no run_meta.json with a config.yaml in {folder.uri}: not a run folder"
    return SyncResult(folder.name, experiment, replay.run_id, replay.sent, error_text)


def _created(folder: RunFolder) -> float:
    """A parent is older than what it started."""
    return float((folder.read_json("run_meta.json") or {}).get("created", 0))
