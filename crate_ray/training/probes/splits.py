"""What a probe reads: the shards of a run, or of another data set in their place.

In: a run's configuration. Out: the images to fit on, those to judge on, and why they cannot be used where they cannot. Of a
mix, the images to fit on are the data sets with the classes of the validation images.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, Self

from crate_ray import storage
from crate_ray.config import ConfigError, RunConfig
from crate_ray.data import Source, load_index, load_source, with_classes

Split = Literal["validation", "test"]
SplitName = Literal["train", "validation", "test"]

_KEYS: dict[Split, str] = {"validation": "eval", "test": "test"}
_NO_BANK = (
    "no data set of data.mix has the {} classes of data.eval, and the probe fits labelled training images; "
    "evaluate on shards with the classes of one of them"
)
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


class OtherData(NamedTuple):
    """A data set that a run was not trained on: its name in every number, and the folder with its splits."""

    name: str
    root: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """`NAME=URL`, or the URL alone, whose last part is the name then.

        Raises:
            ConfigError: No name that can stand in the name of a number.
        """
        name, separator, root = text.partition("=")
        if not separator or "/" in name:
            name, root = text.rstrip("/").rpartition("/")[2].lower().replace("_", "-"), text
        if not _NAME.fullmatch(name) or not root:
            raise ConfigError(
                f"--data '{text}': give NAME=FOLDER, a name of small letters, digits and - that stands in the names of its "
                "numbers, and the folder that holds train, validation and test: --data cifar10=/data/cifar10"
            )
        return cls(name, storage.absolute(root))

    def in_place_of(self, config: RunConfig) -> RunConfig:
        """The configuration with these shards instead of its own; a split that is not there is not set.

        Raises:
            ConfigError: There are no training shards.
        """
        found = {split: storage.join(self.root, split) for split in ("train", "validation", "test")}
        there = {split: url if storage.exists(url) else None for split, url in found.items()}
        if there["train"] is None:
            raise ConfigError(
                f"--data {self.name}={self.root} has no folder train; give what `crate-ray data build SOURCE OUT` wrote"
            )
        data = {"train": there["train"], "mix": None, "eval": there["validation"], "test": there["test"]}
        return config.model_copy(update={"data": config.data.model_copy(update=data)})

    def require(self, config: RunConfig, splits: Iterable[Split]) -> None:
        """Refuses a folder without one of these splits.

        Args:
            config: From `in_place_of`.
            splits: That will be read.

        Raises:
            ConfigError: Names the split, and what needs none.
        """
        missing = sorted(split for split in splits if getattr(config.data, _KEYS[split]) is None)
        if missing:
            raise ConfigError(
                f"--data {self.name}={self.root} has no folder {missing[0]}, which this reads; `--protocol published --test` "
                "reads train and test alone, every other protocol chooses or measures on validation"
            )


def split_source(config: RunConfig, split: SplitName) -> Source:
    """Where the images of a split lie.

    Raises:
        ConfigError: The split is not set, or no data set of the mix has its classes.
    """
    return _bank(config) if split == "train" else split_url(config, split)


def split_url(config: RunConfig, split: Split) -> str:
    """The shards of a split that is judged.

    Raises:
        ConfigError: It is not set.
    """
    key = _KEYS[split]
    url = getattr(config.data, key)
    if url is None:
        raise ConfigError(f"data.{key} is not set; the probe reads it: give the run a data.{key}")
    return str(url)


def without_labels(config: RunConfig, *, split: Split, chosen_on: Sequence[Split] = ("validation",)) -> str | None:
    """Why the data of a run cannot be probed for want of labels, by the indexes alone; None where it can.

    Args:
        config: Of the run.
        split: Judged on.
        chosen_on: Splits that are needed besides.

    Raises:
        ConfigError: A split is not set, or has no index.
    """
    if config.task == "classify":  # refused without labels before it trained
        return None
    for which in dict.fromkeys((*chosen_on, split)):
        url = split_url(config, which)
        reason = _unlabelled(f"data.{_KEYS[which]} = '{url}'", url)
        if reason is not None:
            return reason
    source = _labelled_like_validation(config)
    if source is None:
        return _NO_BANK.format(load_index(split_url(config, "validation")).num_classes)
    return _unlabelled(f"data.train = '{config.data.train}'" if config.data.mix is None else "data.mix", source)


def _unlabelled(name: str, source: Source) -> str | None:
    labels = load_source(source).labels
    missing = int((labels < 0).sum())
    if missing == len(labels):
        return f"{name} has no labels"
    return f"{name}: {missing:,} of {len(labels):,} images have no label" if missing else None


def _bank(config: RunConfig) -> Source:
    """The training images that a probe fits."""
    found = _labelled_like_validation(config)
    if found is None:
        raise ConfigError(_NO_BANK.format(load_index(split_url(config, "validation")).num_classes))
    return found


def _labelled_like_validation(config: RunConfig) -> Source | None:
    """As `_bank`; None where no data set of the mix has these classes."""
    if config.data.mix is None:
        return config.data.source
    return with_classes(config.data.source, load_index(split_url(config, "validation")).num_classes)
