"""Reading runs back from MLflow: an experiment as rows.

In: a tracking store and the name of an experiment. Out: the RunRow of every run that the mirror has told of, and why the others
have none. The rows come with the runs, by pages of a thousand, so that no run costs a request of its own. The store is asked
once and has to answer in time: a comparison is the foreground, and a server that is down is the user's to start.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crate_ray.config import ConfigError
from crate_ray.runs.rows import RunRow, Split
from crate_ray.tracking.client import absolute_uri, configure, database_path, one_line, open_client, public_uri
from crate_ray.tracking.row_tag import ROW_TAG, unpack_row

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PAGE = 1000
PAGE_SECONDS = 120.0  # a thousand runs with hundreds of metrics each take a busy server longer than to say that it is there
_NO_ROWS = ("sweep", "probe", "compare")  # kinds of runs that no comparison reads
_SYNC = "`crate-ray tracking sync ROOT` tells MLflow what a comparison needs"


@dataclass(frozen=True)
class ExperimentRows:
    """What an experiment holds for a comparison.

    Attributes:
        rows: Of the runs that have one.
        unread: Why a run has none, by its name.
    """

    rows: list[RunRow]
    unread: Mapping[str, str]


def rows_of_experiment(uri: str, experiment: str, *, split: Split, timeout_s: float = 10) -> ExperimentRows:
    """Reads every run of an experiment.

    Args:
        uri: The tracking store.
        experiment: Name of the experiment.
        split: Whose judgement the rows hold.
        timeout_s: How long the store may take to answer at all; a page of runs may take PAGE_SECONDS.

    Raises:
        ConfigError: There is no such store or experiment, or it does not answer in time.
    """
    uri = absolute_uri(uri)
    with _as_one_message(uri, timeout_s):
        client = _connect(uri, timeout_s)
        found = client.get_experiment_by_name(experiment)
        if found is None or found.lifecycle_stage != "active":
            names = ", ".join(_experiments(client))
            known = f"there are: {names}" if names else "there is none at all"
            raise ConfigError(f"no experiment '{experiment}' at {public_uri(uri)}; {known}")
    with _as_one_message(uri, PAGE_SECONDS):
        return _read(_runs(client, found.experiment_id), split)


def _read(runs: Iterator["Run"], split: Split) -> ExperimentRows:
    rows, unread = list[RunRow](), dict[str, str]()
    for run in runs:
        if run.data.tags.get("kind") in _NO_ROWS:
            continue
        try:
            rows.append(unpack_row(run.data.tags[ROW_TAG], split))
        except KeyError:
            unread[_name(run, unread)] = _why_no_tag(run)
        except ValueError as error:
            unread[_name(run, unread)] = f"{error}; {_SYNC}"
    return ExperimentRows(rows, unread)


def _connect(uri: str, timeout_s: float) -> "MlflowClient":
    """A client of a store that is there; a database file is not made by asking for it."""
    path = database_path(uri)
    if path is not None and not path.is_file():
        raise ConfigError(
            f"there is no MLflow database {path}; name the store with --uri, or give the folders of the runs "
            "(`crate-ray tracking sync ROOT` makes one from them)"
        )
    if path is None and not uri.startswith(("http://", "https://")):
        _check_answer(uri, timeout_s)
    return open_client(uri, timeout_s=timeout_s)


def _check_answer(uri: str, timeout_s: float) -> None:
    """Connects to a database once: MLflow itself tries for hours, behind a lock that other stores wait for."""
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    engine = create_engine(uri, poolclass=NullPool, connect_args={"connect_timeout": math.ceil(timeout_s)})
    engine.connect().close()


@contextlib.contextmanager
def _as_one_message(uri: str, timeout_s: float) -> Iterator[None]:
    """What MLflow or the driver of a database raises, as what the user can do about it."""
    configure(timeout_s=timeout_s)
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError) as error:
        raise ConfigError(
            f"MLflow at {public_uri(uri)} does not answer within {timeout_s:g} s ({one_line(error)}); start it, "
            "name another store with --uri, or give the folders of the runs"
        ) from None
    except ModuleNotFoundError as error:
        raise ConfigError(f"{public_uri(uri)} needs the module {error.name}, which is not installed") from None


def _experiments(client: "MlflowClient") -> list[str]:
    """Names of those that are not in the trash, without MLflow's own empty one."""
    return sorted(item.name for item in client.search_experiments(max_results=PAGE) if item.experiment_id != "0")


def _runs(client: "MlflowClient", experiment_id: str) -> Iterator["Run"]:
    token: str | None = None
    while True:
        page = client.search_runs([experiment_id], max_results=PAGE, order_by=["attributes.start_time ASC"], page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _name(run: "Run", taken: Mapping[str, str]) -> str:
    """The run's name; with its id where another one is called alike."""
    name = str(run.info.run_name)
    return name if name not in taken else f"{name} ({run.info.run_id[:8]})"


def _why_no_tag(run: "Run") -> str:
    if run.info.status in ("RUNNING", "SCHEDULED"):
        return "still running"
    return f"mirrored by an earlier release; {_SYNC}"
