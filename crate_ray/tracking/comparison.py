"""A comparison in MLflow: a run of its own, its files below the sweep that it is of, and its verdict where it is read first.

In: the files of a report and its first line. Out: one run of kind `compare`. The experiment's note and that of the sweep open
with the verdict, because MLflow shows the first line of a note without a click; what a person wrote into a note stays below it.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from crate_ray.config import digest
from crate_ray.tracking.client import absolute_uri, configure, explain, public_uri, web_url
from crate_ray.tracking.describe import MAX_NAME, PARENT_TAG, RUN_UID_TAG
from crate_ray.tracking.experiment import connect
from crate_ray.tracking.limits import MAX_TAG, log_tags, valid_text
from crate_ray.tracking.replay import Session, find_run
from crate_ray.tracking.views import run_url, view_links

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

NOTE_TAG = "mlflow.note.content"
HEADLINE_TAG = "crate_ray.headline"
TIMEOUT_S = 10.0  # of one request
FOLDER = "comparison"  # among the artifacts of the run above


@dataclass(frozen=True)
class LoggedComparison:
    """Where a comparison is in MLflow: its run, the page of that run, and the experiment's saved views by their titles."""

    run_id: str
    url: str
    views: Mapping[str, str]


def log_comparison(
    uri: str,
    experiment: str,
    *,
    name: str,
    folder: Path,
    files: Sequence[str],
    headline: str,
    parent_uid: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> LoggedComparison | None:
    """Stores a comparison; one of the same name is written over.

    Args:
        uri: The tracking store.
        experiment: Name of the experiment.
        name: Name of the comparison; its first 18 characters are shown.
        folder: Holds the files.
        files: Paths in it, with forward slashes.
        headline: The verdict in one line.
        parent_uid: run_uid of the sweep that was compared; it gets the files as well.
        tags: Further tags.

    Returns:
        None when the store does not answer, or refuses; a warning says so.

    Raises:
        ConfigError: The store or the experiment cannot be used at all.
    """
    uri = absolute_uri(uri)
    configure(timeout_s=TIMEOUT_S)
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    line = " ".join(headline.split())
    try:
        client, experiment_id = connect(uri, experiment, timeout_s=TIMEOUT_S)
        session = Session(client, uri, experiment_id)
        parent = find_run(session, parent_uid) if parent_uid is not None else None
        parent_id = None if parent is None else str(parent.info.run_id)
        own = {**(tags or {}), "kind": "compare", RUN_UID_TAG: f"compare-{digest([experiment, name])[:32]}"}
        run_id = _open_run(session, name, own | ({PARENT_TAG: parent_id} if parent_id else {}))
        for target in filter(None, (run_id, parent_id)):
            _send(client, target, folder, files, FOLDER if target == parent_id else "")
            _put_note(client, target, line)
        client.set_terminated(run_id, "FINISHED")
        _put_experiment_note(session, line)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        text = "the comparison is not in MLflow at %s (%s); the report is in %s, and the same command sends it"
        logger.warning(text, public_uri(uri), explain(error), folder)
        return None
    base = web_url(uri)
    return LoggedComparison(run_id, run_url(base, experiment_id, run_id), view_links(uri, base, experiment_id))


def with_headline(note: str, headline: str, earlier: str | None) -> str:
    """A note that opens with the headline; the earlier one gives way to it, everything else stays.

    Args:
        note: As it is.
        headline: One line.
        earlier: The headline that was put there before; None where there was none.
    """
    first, _, rest = note.partition("\n")
    kept = (rest if earlier is not None and first == earlier else note).strip()
    return f"{headline}\n\n{kept}" if kept else headline


def _open_run(session: Session, name: str, tags: dict[str, str]) -> str:
    found = find_run(session, tags[RUN_UID_TAG])
    if found is None:
        found = session.client.create_run(session.experiment_id, run_name=name[:MAX_NAME])
    run_id = str(found.info.run_id)
    log_tags(session.client, run_id, dict(tags.items() - found.data.tags.items()))
    return run_id


def _send(client: "MlflowClient", run_id: str, folder: Path, files: Sequence[str], below: str) -> None:
    for name in files:
        target = str(PurePosixPath(below, name).parent)
        client.log_artifact(run_id, str(folder / name), None if target == "." else target)


def _put_note(client: "MlflowClient", run_id: str, line: str) -> None:
    tags = client.get_run(run_id).data.tags
    note = with_headline(tags.get(NOTE_TAG, ""), line, tags.get(HEADLINE_TAG))
    log_tags(client, run_id, {NOTE_TAG: note, HEADLINE_TAG: line})


def _put_experiment_note(session: Session, line: str) -> None:
    found = session.client.get_experiment(session.experiment_id).tags
    note = with_headline(found.get(NOTE_TAG, ""), line, found.get(HEADLINE_TAG))
    for key, value in {NOTE_TAG: valid_text(note, MAX_TAG), HEADLINE_TAG: valid_text(line, MAX_TAG)}.items():
        if found.get(key) != value:
            session.client.set_experiment_tag(session.experiment_id, key, value)
