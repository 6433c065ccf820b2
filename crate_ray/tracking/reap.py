"""Closing what died: runs that MLflow shows as RUNNING and whose driver is gone.

In: a tracking store, with or without the run folders. Out: the same runs, FAILED as of when their driver last lived.
Where a run's folder can be found it decides, as it always does: a run that beats there is left alone, however old MLflow's
heartbeat is, one that ended there is caught up. Else the heartbeat in MLflow decides. The trade-off: a driver that was cut
off from the server for that long looks dead; when it is heard again its mirror opens the run, so nothing is lost by closing it.
"""

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from crate_ray.config import ConfigError
from crate_ray.runs import RunFolder, close_stale, read_status
from crate_ray.tracking.client import absolute_uri, database_path, explain, one_line, open_client, public_uri
from crate_ray.tracking.describe import FOLDER_TAG, HEARTBEAT_TAG, RUN_UID_TAG, to_ms
from crate_ray.tracking.replay import BEAT_SECONDS, Session
from crate_ray.tracking.sync import SyncResult, replay_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient

SILENT_SECONDS = 5 * BEAT_SECONDS
_PAGE = 1000


def reap(
    uri: str, experiment: str | None = None, *, silent_s: float = SILENT_SECONDS, timeout_s: float = 30
) -> list[SyncResult]:
    """Closes the runs of a store whose drivers died.

    Args:
        uri: The tracking store.
        experiment: Name of the experiment; None for all.
        silent_s: How long a driver must not have been heard of; its clock and this one's are taken to agree.
        timeout_s: How long one request may take.

    Returns:
        One result a run that was closed or caught up.

    Raises:
        ConfigError: There is no such experiment, or the store does not answer.
    """
    uri = absolute_uri(uri)
    database = database_path(uri)
    if database is not None and not database.exists():
        return []
    client = _open(uri, timeout_s)
    from mlflow.exceptions import MlflowException

    try:
        experiments = _experiments(client, experiment)
        found = list(_silent_runs(client, list(experiments), time.time() - silent_s))
        closed = [
            _close(Session(client, uri, run.info.experiment_id), experiments[run.info.experiment_id], run) for run in found
        ]
        return [result for result in closed if result is not None]
    except MlflowException as error:
        raise ConfigError(f"MLflow at {public_uri(uri)} does not answer: {explain(error)}") from None


def _open(uri: str, timeout_s: float) -> "MlflowClient":
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return open_client(uri, timeout_s=timeout_s)
    except (SQLAlchemyError, ModuleNotFoundError) as error:
        raise ConfigError(f"tracking.uri = '{public_uri(uri)}': {explain(error)}") from None


def _experiments(client: "MlflowClient", name: str | None) -> dict[str, str]:
    """The names of the experiments to look through, by their ids."""
    names: dict[str, str] = {}
    token: str | None = None
    while True:
        page = client.search_experiments(max_results=_PAGE, page_token=token)
        names |= {experiment.experiment_id: experiment.name for experiment in page}
        token = page.token
        if not token:
            break
    if name is not None and name not in names.values():
        raise ConfigError(f"--experiment '{name}' is not in the store; there are: {', '.join(sorted(names.values()))}")
    return {key: found for key, found in names.items() if name in (None, found)}


def _silent_runs(client: "MlflowClient", experiments: list[str], before: float) -> Iterator[Any]:
    """Our runs that are shown as RUNNING with a heartbeat older than `before`, unix seconds."""
    token: str | None = None
    while experiments:
        page = client.search_runs(experiments, "attributes.status = 'RUNNING'", max_results=_PAGE, page_token=token)
        for run in page:
            tags = run.data.tags
            if RUN_UID_TAG in tags and float(tags.get(HEARTBEAT_TAG, "inf")) < before:
                yield run
        token = page.token
        if not token:
            return


def _close(session: Session, experiment: str, run: Any) -> SyncResult | None:
    """Closes one run by its folder, or without one by its heartbeat; None where its driver lives."""
    folder = _folder_of(run)
    if folder is not None:
        try:
            close_stale(folder)
        except OSError as error:  # it may be read from here and not written; the others are closed all the same
            return SyncResult(str(run.info.run_name), experiment, str(run.info.run_id), 0, one_line(error))
        status = read_status(folder)
        if status is not None and status.state == "RUNNING":
            return None
        return replay_folder(folder, session, experiment)
    beat = float(run.data.tags[HEARTBEAT_TAG])
    seen = datetime.fromtimestamp(beat, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    session.client.set_tag(run.info.run_id, "failure", f"driver died: last heard of at {seen}")
    session.client.set_terminated(run.info.run_id, "FAILED", end_time=to_ms(beat))
    return SyncResult(str(run.info.run_name), experiment, str(run.info.run_id), 0, None)


def _folder_of(run: Any) -> RunFolder | None:
    """The run's folder where it can be read from here, and is that of this run and not another machine's of the same path."""
    place = run.data.tags.get(FOLDER_TAG)
    if place is None:
        return None
    try:
        folder = RunFolder(place)
        meta = folder.read_json("run_meta.json")
    except (OSError, ValueError):  # an object store that this machine has no key of
        return None
    return folder if meta is not None and meta.get("run_uid") == run.data.tags[RUN_UID_TAG] else None
