"""Interventions: where a run was taken back to a checkpoint, and what it did differently from there on.

In and out: `interventions.json` of a run folder, and the same list in the manifests of checkpoints. An intervention is a rule
over (step, cursor), so a restarted run that reads the list takes the same path again. The price of one is that the run is no
longer the run of its configuration: comparisons, reports and listings flag it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from crate_ray.runs.folder import RunFolder

_FILE = "interventions.json"


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """One rollback.

    Attributes:
        from_step: Step of the checkpoint that the run went back to; 0 for the first weights.
        first_step: The first of the steps that gave no finite loss or gradient.
        last_step: The last of them.
        skipped_steps: How many they were.
        pass_over: First cursor and end of the batches that are not read again.
        lr_factor: What the learning rate is multiplied by from `from_step` on.
        lr_steps: For so many steps.
        finding: What was not finite first, and where.
        time: Unix seconds.
        attempt: Start of the run in which it happened.
    """

    from_step: int
    first_step: int
    last_step: int
    skipped_steps: int
    pass_over: tuple[int, int]
    lr_factor: float
    lr_steps: int
    finding: str
    time: float
    attempt: int

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Self:
        """From JSON; keys that another release wrote are passed over."""
        known = {item.name: body[item.name] for item in fields(cls) if item.name in body}
        return cls(**known | {"pass_over": tuple(body["pass_over"])})

    def as_dict(self) -> dict[str, Any]:
        """The inverse of `of`."""
        return asdict(self) | {"pass_over": list(self.pass_over)}

    def sentence(self) -> str:
        """What happened, for a person."""
        return (
            f"rolled back from step {self.last_step} to {self.from_step} after {self.skipped_steps} steps without a finite "
            f"loss or gradient, from step {self.first_step} on; {self.finding}"
        )


def read_interventions(folder: RunFolder) -> tuple[Intervention, ...]:
    """Those of a run, oldest first; empty for a run that was left alone."""
    return interventions_of(folder.read_json(_FILE) or {})


def interventions_of(body: Mapping[str, Any]) -> tuple[Intervention, ...]:
    """Those that a mapping holds under `interventions`, as the file of a run and the state in a checkpoint do."""
    return tuple(Intervention.of(item) for item in body.get("interventions", ()))


def write_interventions(folder: RunFolder, interventions: Iterable[Intervention]) -> None:
    """Writes the whole list, atomically."""
    folder.write_json(_FILE, {"interventions": [item.as_dict() for item in interventions]})


def intervention_text(interventions: Sequence[Intervention]) -> str:
    """All of a run's in a few words: `2 rollbacks (from step 50 to 40, from step 70 to 60)`."""
    places = ", ".join(f"from step {item.last_step} to {item.from_step}" for item in interventions)
    return f"{len(interventions)} rollback{'s' if len(interventions) > 1 else ''} ({places})"
