"""Reading runs back from MLflow: an experiment as rows.

In: a tracking store and the name of an experiment. Out: the RunRow of every run that the mirror has told of, and why the others
have none. The rows come with the runs, by pages of a thousand, so that no run costs a request of its own. The store is asked
once and has to answer in time: a comparison is the foreground, and a server that is down is the user's to start.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from crate_ray.config import ConfigError
from crate_ray.runs.rows import RunRow
from crate_ray.tracking.client import absolute_uri, configure, database_path, one_line, open_client, public_uri
from crate_ray.tracking.row_tag import ROW_TAG, unpack_row

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PAGE = 1000
_NO_ROWS = ("sweep", "probe", "compare")  # kinds of runs that no comparison reads
_SYNC = "`crate-ray tracking sync ROOT` tells MLflow what a comparison needs"
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class ExperimentRows:
    """What an experiment holds for a comparison.

    Attributes:
        rows: Of the runs that have one.
        unread: Names of the runs that have none, by the reason.
    """

    rows: list[RunRow]
    unread: Mapping[str, list[str]]


def rows_of_experiment(uri: str, experiment: str, *, split: str, timeout_s: float = 10) -> ExperimentRows:
    """Reads every run of an experiment.

    Args:
        uri: The tracking store.
        experiment: Name of the experiment.
        split: Whose judgement the rows hold: test or validation.
        timeout_s: How long the store may take to answer at first, and each page after that.

    Raises:
        ConfigError: There is no such store or experiment, or it does not answer in time.
    """
    client = _connect(uri, timeout_s)
    found = _within(lambda: client.get_experiment_by_name(experiment), uri, timeout_s)
    if found is None or found.lifecycle_stage != "active":
        names = _within(lambda: _experiments(client), uri, timeout_s)
        raise ConfigError(
            f"there is no experiment '{experiment}' at {public_uri(absolute_uri(uri))}; there "
            + (f"are: {', '.join(names)}" if names else "is none at all")
        )
    rows, unread = list[RunRow](), dict[str, list[str]]()
    for run in _runs(client, found.experiment_id, uri, timeout_s):
        if run.data.tags.get("kind") in _NO_ROWS:
            continue
        try:
            rows.append(unpack_row(run.data.tags[ROW_TAG], split))
        except KeyError:
            unread.setdefault(_why_no_tag(run), []).append(run.info.run_name)
        except ValueError as error:
            unread.setdefault(f"{error}; {_SYNC}", []).append(run.info.run_name)
    return ExperimentRows(rows, unread)


def _connect(uri: str, timeout_s: float) -> "MlflowClient":
    """A client of a store that is there; a database file is not made by asking for it."""
    path = database_path(absolute_uri(uri))
    if path is not None and not path.is_file():
        raise ConfigError(
            f"there is no MLflow database {path}; name the store with --uri, or give the folders of the runs "
            "(`crate-ray tracking sync ROOT` makes one from them)"
        )
    configure(timeout_s=timeout_s)
    import mlflow  # noqa: F401 - takes seconds, which are not the store's

    return _within(lambda: open_client(uri, timeout_s=timeout_s), uri, timeout_s)


def _within(ask: Callable[[], _Answer], uri: str, timeout_s: float) -> _Answer:
    """The answer of a store, in a thread that can be left behind: a database has no time limit of its own.

    Raises:
        ConfigError: It did not answer within `timeout_s`, or with an error.
    """
    answers = list[_Answer]()
    errors = list[Exception]()

    def call() -> None:
        try:
            answers.append(ask())
        except Exception as error:  # noqa: BLE001 - told in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=call, name="mlflow-query", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if answers:
        return answers[0]
    if errors and isinstance(errors[0], ConfigError):
        raise errors[0]
    reason = f"cannot be read ({one_line(errors[0])})" if errors else f"does not answer within {timeout_s:g} s"
    raise ConfigError(
        f"MLflow at {public_uri(absolute_uri(uri))} {reason}; start it, name another store with --uri, "
        "or give the folders of the runs"
    ) from None


def _experiments(client: "MlflowClient") -> list[str]:
    """Names of those that are not in the trash and not MLflow's own empty one."""
    found = client.search_experiments(max_results=PAGE)
    return sorted(item.name for item in found if item.experiment_id != "0")


def _runs(client: "MlflowClient", experiment_id: str, uri: str, timeout_s: float) -> Iterator["Run"]:
    token: str | None = None
    while True:
        page = _within(lambda token=token: _page(client, experiment_id, token), uri, timeout_s)  # type: ignore[misc]
        yield from page
        token = page.token
        if not token:
            return


def _page(client: "MlflowClient", experiment_id: str, token: str | None) -> Any:
    return client.search_runs([experiment_id], max_results=PAGE, order_by=["attributes.start_time ASC"], page_token=token)


def _why_no_tag(run: "Run") -> str:
    if run.info.status in ("RUNNING", "SCHEDULED"):
        return "still running"
    return f"mirrored by an earlier release; {_SYNC}"
