"""What the first stage of a sweep says of the second: how much each arm was tuned, and in which place a confirmed point stood.

In: a sweep's folder. Out: counts and places. It costs the rows of all its trials, so who reads many runs reads it once a sweep.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from crate_ray.config import SweepConfig, order_key
from crate_ray.runs.folder import RunFolder
from crate_ray.runs.trials import TrialRow, list_trials, read_sweep

Identity = tuple[str, str]
"""Arm and spelling of a point."""


@dataclass(frozen=True)
class Screening:
    """The first stage of one sweep.

    Attributes:
        sweep: Its configuration.
        tried: Trials of each arm that are over: what its tuning cost.
        places: Of finished trials in the order of their arm, from 1, by point.
    """

    sweep: SweepConfig
    tried: Mapping[str, int]
    places: Mapping[Identity, int]

    def place_of(self, trial: TrialRow) -> int | None:
        """Where the point of a trial stood; None where it was not screened to its end."""
        return self.places.get(point_identity(trial, self.sweep))


def read_screening(folder: RunFolder) -> Screening | None:
    """The screening of a sweep; None where the folder is none."""
    sweep = read_sweep(folder)
    return screening_of(sweep, list_trials(folder.uri)) if sweep is not None else None


def screening_of(sweep: SweepConfig, trials: Sequence[TrialRow]) -> Screening:
    """The screening of a sweep from the rows of its trials, of any stage."""
    screened = [trial for trial in trials if trial.stage == "screen"]
    keyed = [(key, trial) for trial in screened if trial.state == "FINISHED" and (key := order_key(sweep, trial)) is not None]
    places: dict[Identity, int] = {}
    seen = Counter[str]()
    for _, trial in sorted(keyed, key=lambda pair: pair[0]):
        seen[trial.arm] += 1
        places.setdefault(point_identity(trial, sweep), seen[trial.arm])
    return Screening(sweep, Counter(trial.arm for trial in screened if trial.is_over), places)


def point_identity(trial: TrialRow, sweep: SweepConfig) -> Identity:
    """The same for a point's trials of both stages, whose length may differ, and with it the keys that follow it."""
    domains = sweep.domains_of(trial.arm)
    chosen = {key: value for key, value in trial.values.items() if key not in domains or not domains[key].is_dependent}
    return trial.arm, json.dumps(chosen, sort_keys=True)
