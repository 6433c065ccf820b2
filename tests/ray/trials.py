"""Trials of a sweep over tiny runs on the digits, as Tune would configure them."""

from collections.abc import Callable
from dataclasses import replace
from json import dumps
from typing import Any

from crate_ray.config import RunConfig, SweepConfig, resume_parts
from crate_ray.config.identity import digest
from crate_ray.runs import RunFolder, read_trial, write_trial
from crate_ray.training.prepare import absolute_paths, data_digest

MakeTrial = Callable[..., dict[str, Any]]


def trial_of(config: RunConfig, root: str, *, sweep: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Tune's configuration of one trial; `sweep` holds keys of the sweep."""
    config = absolute_paths(config)
    identity = digest(resume_parts(config, data_digest(config)))[:8]
    every = config.eval.every_steps or 1
    whole = SweepConfig.parse(
        {
            "name": "tiny",
            "base": "digits_crate_mae",
            "tune": {"optimizer.lr": {"grid": [5e-4]}},
            "report_every_steps": every,
            **sweep,
        }
    )
    return {
        "run": dumps(config.model_dump(mode="json")),
        "sweep": dumps(whole.model_dump(mode="json")),
        "point": {"arm": "crate", "values": {}, "seed": config.train.seed, "stage": "screen"},
        "folder": f"{root}/trials/crate-{identity}",
        "study": "tiny",
        "parent_uid": None,
        "quantities": {"params_m": 0.1},
        **more,
    }


def mark_stopped(uri: str) -> None:
    """Writes into trial.json what a sweep's driver writes when the scheduler has ended the trial."""
    folder = RunFolder(uri)
    row = read_trial(folder)
    assert row is not None
    write_trial(folder, replace(row, state="STOPPED", reason=None))
