"""Catching up, and what is written after the runs: replays of folders, and the comparison.

In: run folders, or the files of a comparison. Out: the same MLflow runs that a live mirror makes.
Unlike the mirror, this is the foreground: it waits for the server and says what it could not do.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crate_ray.config import digest
from crate_ray.runs import RunFolder
from crate_ray.tracking.client import absolute_uri, one_line, open_client, public_uri
from crate_ray.tracking.describe import MAX_NAME, RUN_UID_TAG
from crate_ray.tracking.experiment import initialise
from crate_ray.tracking.limits import valid_tags
from crate_ray.tracking.replay import RunReplay, Session, find_run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SyncResult:
    """How one run folder fared: its MLflow run, the records sent now, and why it is not complete."""

    name: str
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
        return [SyncResult(folder.name, None, 0, reason) for folder in ordered]
    session = Session(open_client(uri, timeout_s=timeout_s), absolute_uri(uri), experiment_id)
    return [_replay(folder, session) for folder in ordered]


def log_comparison(
    uri: str,
    experiment: str,
    *,
    name: str,
    artifacts: Sequence[Path],
    note_first_line: str,
    tags: Mapping[str, str] | None = None,
) -> str | None:
    """Stores a comparison as one run of its experiment, with the conclusion as the experiment's note.

    A comparison of the same name is written over.

    Args:
        uri: The tracking store.
        experiment: Name of the experiment.
        name: Name of the comparison; its first 18 characters are shown.
        artifacts: Files such as comparison.json, the figures and report.md.
        note_first_line: The conclusion in one line; MLflow shows no more without a click.
        tags: Further tags.

    Returns:
        The MLflow run id; None when the server does not answer (a warning says so).

    Raises:
        ConfigError: The store or the experiment cannot be used at all.
    """
    experiment_id = initialise(uri, experiment)
    if experiment_id is None:
        return None
    from mlflow.exceptions import MlflowException

    client = open_client(uri)
    described = valid_tags(tags or {})
    described |= {"kind": "compare", RUN_UID_TAG: f"compare-{digest([experiment, name])[:32]}"}
    try:
        run_id = _comparison_run(Session(client, absolute_uri(uri), experiment_id), name, described)
        for path in artifacts:
            client.log_artifact(run_id, str(path))
        client.set_terminated(run_id, "FINISHED")
        client.set_experiment_tag(experiment_id, "mlflow.note.content", " ".join(note_first_line.split()))
    except (MlflowException, OSError) as error:
        logger.warning("the comparison is not in MLflow at %s: %s", public_uri(uri), one_line(error))
        return None
    return run_id


def _comparison_run(session: Session, name: str, tags: dict[str, str]) -> str:
    found = find_run(session, tags[RUN_UID_TAG])
    if found is None:
        found = session.client.create_run(session.experiment_id, tags=tags, run_name=name[:MAX_NAME])
    for key, value in tags.items() - found.data.tags.items():
        session.client.set_tag(found.info.run_id, key, value)
    return str(found.info.run_id)


def _replay(folder: RunFolder, session: Session) -> SyncResult:
    replay = RunReplay(folder)
    try:
        is_first = True
        while is_first or replay.is_behind:
            replay.poll()
            replay.push(session)
            is_first = False
    except Exception as error:  # noqa: BLE001 - one run that cannot be sent must not keep the others from it
        return SyncResult(folder.name, replay.run_id, replay.sent, one_line(error))
    error_text = None if replay.run_id else f"no run_meta.json with a config.yaml in {folder.uri}: not a run folder"
    return SyncResult(folder.name, replay.run_id, replay.sent, error_text)


def _created(folder: RunFolder) -> float:
    """A parent is older than what it started."""
    return float((folder.read_json("run_meta.json") or {}).get("created", 0))
