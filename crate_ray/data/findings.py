"""What can be wrong with shards, by name: one finding says where, what and how to repair it.

In: what a walk or a comparison met. Out: `Finding`, for people as a sentence and for programs as a dictionary.
How far a fault reaches is a property of its kind: a whole shard, one sample, or nothing that indexing has to leave out.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from crate_ray.config import ConfigError

_SHOWN = 3  # of one kind
_MAX_FINDINGS = 10_000  # of one kind over all shards, some 4 MB; the others are counted


class Fault(StrEnum):
    """The kinds of faults."""

    # The shard cannot be trusted from some byte on.
    TRUNCATED = "truncated"
    HEADER = "corrupt-header"
    NOT_A_TAR = "not-a-tar"
    EMPTY = "empty"
    TRAILING = "trailing-data"
    UNSUPPORTED = "unsupported"
    NO_SHARD = "missing-shard"
    UNREADABLE = "unreadable"
    # One sample cannot be told.
    DUPLICATE = "duplicate-key"
    SEVERAL_IMAGES = "several-images"
    LABEL = "bad-label"
    # The sample can be indexed, or left out without a doubt; `data verify` reports it.
    NO_IMAGE = "no-image"
    NO_LABEL = "no-label"
    CODE = "ignored-member"
    IMAGE = "bad-image"
    CHANGED = "changed-bytes"
    LOST = "missing-sample"
    UNINDEXED = "not-indexed"


DAMAGED_SHARD = frozenset(list(Fault)[: list(Fault).index(Fault.DUPLICATE)])
DAMAGED_SAMPLE = frozenset({Fault.DUPLICATE, Fault.SEVERAL_IMAGES, Fault.LABEL})

_FIXES = {
    Fault.NO_SHARD: "copy it back, or name only the shards that are there",
    Fault.UNREADABLE: "see that the store answers and that it may be read",
    Fault.UNSUPPORTED: "repack it with plain tar",
    Fault.NOT_A_TAR: "download or write it again",
    Fault.TRAILING: "join archives with `tar --concatenate`, or cut what follows the end",
    Fault.DUPLICATE: "give every sample of a shard its own key",
    Fault.SEVERAL_IMAGES: "keep one image a sample; keys end at the first dot of the file name",
    Fault.LABEL: "write a whole number from 0, or choose the field with --label-field",
    Fault.NO_IMAGE: "add a member KEY.jpg, .jpeg, .jpe, .png or .webp",
    Fault.NO_LABEL: "label all samples or none",
    Fault.CODE: "leave it out; it is never opened, for reading it could run code",
    Fault.IMAGE: "replace the image; training puts its neighbour in its place (data.on_error)",
    Fault.CHANGED: "copy the shard again from where it was indexed; if it was changed on purpose, index it again",
    Fault.LOST: "copy the shard again from where it was indexed; if it was changed on purpose, index it again",
    Fault.UNINDEXED: "run `crate-ray data index` again",
}
_REWRITE = "write or copy it again"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        fault: Its kind.
        shard: Name of the shard.
        what: What was met, as a clause.
        key: The sample; empty where the whole shard is meant.
        offset: Byte of the shard, where there is one.
    """

    fault: Fault
    shard: str
    what: str
    key: str = ""
    offset: int | None = None

    @property
    def fix(self) -> str:
        """What to do about it."""
        return _FIXES.get(self.fault, _REWRITE)

    def as_dict(self) -> dict[str, Any]:
        """Every field and the fix, for `--json`."""
        return {**asdict(self), "fault": str(self.fault), "fix": self.fix}

    @property
    def place(self) -> str:
        """Shard, sample and byte."""
        sample = f", sample {self.key!r}" if self.key else ""
        return f"shard {self.shard}{sample}" + ("" if self.offset is None else f" at byte {self.offset}")

    def __str__(self) -> str:
        return f"{self.place}: {self.what} ({self.fault}); {self.fix}"


class FindingLog:
    """The findings of many shards, held in memory of bounded size.

    Attributes:
        counts: Findings of each kind, also those that are not held.
    """

    def __init__(self) -> None:
        self.counts: Counter[Fault] = Counter()
        self._held: list[Finding] = []
        self._first_beyond: dict[Fault, str] = {}

    def add(self, findings: Iterable[Finding]) -> None:
        """Count findings, and hold them while there are few of their kind."""
        for finding in findings:
            self.counts[finding.fault] += 1
            if self.counts[finding.fault] <= _MAX_FINDINGS:
                self._held.append(finding)
            else:
                self._first_beyond.setdefault(finding.fault, finding.shard)

    def sorted(self) -> list[Finding]:
        """By shard and byte; one more for each kind of which there are more than are held."""
        beyond = [
            Finding(fault, shard, f"{self.counts[fault] - _MAX_FINDINGS} more of this kind, here and in other shards")
            for fault, shard in self._first_beyond.items()
        ]
        return sorted(self._held, key=lambda finding: (finding.shard, finding.offset or 0)) + beyond


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun; the plural ends in s unless it is given."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def by_kind(findings: Iterable[Finding]) -> dict[Fault, list[Finding]]:
    """The findings of each kind, in the order in which kinds come."""
    kinds: dict[Fault, list[Finding]] = {}
    for finding in findings:
        kinds.setdefault(finding.fault, []).append(finding)
    return kinds


def first_of(findings: list[Finding]) -> tuple[list[Finding], int]:
    """The first findings of one kind, for people, and how many more there are."""
    shown = findings if len(findings) == _SHOWN + 1 else findings[:_SHOWN]  # one more needs no more room than saying so
    return shown, len(findings) - len(shown)


class DamagedDataError(ConfigError):
    """Shards that were refused; `findings` says why, one by one, and the message, if `listed`, the first of each kind."""

    def __init__(self, heading: str, findings: Iterable[Finding], *, listed: bool = True) -> None:
        self.findings = list(findings)
        lines = [heading]
        for fault, found in by_kind(self.findings if listed else ()).items():
            shown, more = first_of(found)
            lines += [f"  {finding}" for finding in shown]
            lines += [f"  and {more:,} more {fault}; --json gives all"] if more else []
        super().__init__("\n".join(lines))
