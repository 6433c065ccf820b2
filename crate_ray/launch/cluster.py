"""The Ray cluster: connect to the one that RAY_ADDRESS names, or start one on this machine.

In: the environment. Out: a connected driver, and the resources that work could ever get. The checks
here turn Ray's endless waits (no cluster, too few CPUs) into an error in the first second.
"""

import logging
import os
import socket
from dataclasses import dataclass

from crate_ray.config import ConfigError, ScaleConfig

log = logging.getLogger(__name__)

# Quiet by default: our progress is the driver's output. Each may be set by the user.
_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Capacity:
    """CPUs and GPUs of the cluster at its largest."""

    cpus: float
    gpus: float


def connect() -> str:
    """Connects this process as a driver, once.

    Returns:
        The address of the cluster.

    Raises:
        ConfigError: RAY_ADDRESS names a cluster that does not answer.
    """
    import ray

    if not ray.is_initialized():
        for key, value in _ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        address = os.environ.get("RAY_ADDRESS")
        if address:
            _check_reachable(address)
        try:
            # "local" always starts one: the default would join whatever cluster happens to run on this machine.
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
        except (ConnectionError, RuntimeError) as error:
            raise ConfigError(f"cannot join the Ray cluster at RAY_ADDRESS = '{address}': {error}") from None
    return str(ray.get_runtime_context().gcs_address)


def _check_reachable(address: str) -> None:
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(
            f"RAY_ADDRESS = '{address}': no Ray cluster answers there ({error}); start one with `ray start --head`, "
            "correct the address, or unset RAY_ADDRESS to use this machine"
        ) from None


def capacity() -> Capacity:
    """What the cluster has, or could grow to where it has an autoscaler."""
    import ray
    from ray._private.state import state

    now = ray.cluster_resources()  # type: ignore[no-untyped-call]
    limit = state.get_max_resources_from_cluster_config() or {}
    return Capacity(cpus=max(now.get("CPU", 0.0), limit.get("CPU", 0.0)), gpus=max(now.get("GPU", 0.0), limit.get("GPU", 0.0)))


def resolve_scale(scale: ScaleConfig) -> ScaleConfig:
    """Settles `use_gpu: auto`, and refuses what can never fit.

    Raises:
        ConfigError: More CPUs or GPUs are asked for than the cluster can have.
    """
    have = capacity()
    use_gpu = have.gpus >= scale.num_workers if scale.use_gpu == "auto" else scale.use_gpu
    needed_cpus = scale.num_workers * scale.cpus_per_worker
    if needed_cpus > have.cpus:
        fit = int(have.cpus // scale.cpus_per_worker)
        raise ConfigError(
            f"scale.num_workers = {scale.num_workers} needs {needed_cpus:g} CPUs, the cluster has {have.cpus:g}; "
            f"use at most {fit} workers, or set scale.cpus_per_worker lower"
        )
    if use_gpu and scale.num_workers > have.gpus:
        raise ConfigError(
            f"scale.num_workers = {scale.num_workers} with scale.use_gpu = true needs as many GPUs, the cluster has "
            f"{have.gpus:g}; use fewer workers, or scale.use_gpu=false"
        )
    return scale.model_copy(update={"use_gpu": use_gpu})
