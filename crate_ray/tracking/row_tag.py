"""What a comparison needs of a run, as one tag on its MLflow run.

In: a run folder, or the text of the tag. Out: the text, or a row. The row as judged on the test split and that as judged
on validation share nearly all they say, so both are one compressed JSON text: about 1 kB of the 8,000 characters that MLflow
takes. The trade-off: a person cannot read the tag, but every number in it is a metric or a parameter of the run as well; in
return a comparison of a thousand runs is one search, without a request for each run.
"""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from crate_ray.config import ConfigError
from crate_ray.runs import RunFolder
from crate_ray.runs.rows import RunRow, Split, read_run_row
from crate_ray.tracking.client import one_line
from crate_ray.tracking.limits import MAX_TAG
from crate_ray.tracking.packing import pack, unpack

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

ROW_TAG = "crate_ray.row"
SPLITS: tuple[Split, ...] = ("test", "validation")


def row_tag(folder: RunFolder) -> str | None:
    """The tag of a run as its folder stands; None where the folder is no trained run.

    Raises:
        ConfigError: The text is longer than a tag may be.
    """
    rows = {split: row for split in SPLITS if (row := read_run_row(folder, split=split)) is not None}
    return pack_rows(rows) if rows else None


class MirroredRow:
    """The tag of one run as MLflow has it, and brought up to date.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._held: str | None = None

    def restore(self, tags: Mapping[str, str]) -> None:
        """What MLflow has already."""
        self._held = tags.get(ROW_TAG)

    def send(self, client: "MlflowClient", run_id: str) -> None:
        """Writes the tag where the folder says more than it does.

        Raises:
            mlflow.exceptions.MlflowException: The store does not answer.
        """
        try:
            text = row_tag(self._folder)
        except (ConfigError, LookupError, TypeError, ValueError) as error:  # a file that another release wrote
            logger.warning("run %s is not told to comparisons in MLflow: %s", self._folder.name, one_line(error))
            return
        if text is not None and text != self._held:
            client.set_tag(run_id, ROW_TAG, text)
            self._held = text


def pack_rows(rows: Mapping[Split, RunRow]) -> str:
    """The rows of one run by the split they were judged on, as a tag's text; equal rows give an equal text.

    Raises:
        ConfigError: The text is longer than a tag may be.
    """
    body = {split: row.as_dict() for split, row in rows.items()}
    packed = pack(body)
    if len(packed) > MAX_TAG:
        name = next(iter(rows.values())).name
        raise ConfigError(f"the row of run {name} is {len(packed):,} characters, and a tag of MLflow takes {MAX_TAG:,}")
    return packed


def unpack_row(text: str, split: Split) -> RunRow:
    """The row as judged on a split.

    Raises:
        ValueError: The text is not what `pack_rows` gives.
    """
    try:
        return RunRow.of(unpack(text)[split])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"its tag {ROW_TAG} cannot be read ({type(error).__name__})") from None
