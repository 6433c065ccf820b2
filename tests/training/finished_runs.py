"""Runs that went to their end in this process."""

from crate_ray.config import RunConfig
from crate_ray.runs import Lease, RunFolder
from crate_ray.training.loop import LocalContext, run_training
from crate_ray.training.prepare import prepare_run


def train(config: RunConfig) -> RunFolder:
    """Prepares a run, trains it and says that it is finished."""
    config, folder = prepare_run(config, device_type="cpu")
    lease = Lease.take(folder)
    run_training(config, folder, LocalContext(lease.attempt))
    lease.end("FINISHED")
    return folder
