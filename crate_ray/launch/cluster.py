"""The Ray cluster: connect to the one that RAY_ADDRESS names, or start one on this machine.

In: the environment. Out: a connected driver, and the resources that work could ever get. The checks
here turn Ray's endless waits (no cluster, too few CPUs) into an error in the first second.
"""

import logging
import math
import os
import socket

from crate_ray.config import ConfigError, RunConfig, ScaleConfig
from crate_ray.config.sweep import TrialResources
from crate_ray.launch.capacity import Capacity, amounts_in_words

log = logging.getLogger(__name__)

# Quiet by default: our progress is the driver's output. Each may be set by the user.
_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
CONNECT_TIMEOUT_S = 10.0
GPU_LOOK_S = 30.0


NODE_WAIT_S = 900.0  # so long nodes are waited for that an autoscaler still has to start
ELASTIC_TIMEOUT_S = 15  # so long for room that was just seen; then the cluster is looked at again
_START_MARGIN_S = 60.0  # the driver, which knows more to say, gives up before the group does
_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


def connect() -> str:
    """Connects this process as a driver, once.

    Returns:
        The address of the cluster.

    Raises:
        ConfigError: RAY_ADDRESS names a cluster that does not answer.
    """
    import ray

    if not ray.is_initialized():
        set_environment()
        address = os.environ.get("RAY_ADDRESS")
        if address:
            check_address(address)
        else:  # Ray gives a cluster of our own a token by itself, and says so in three lines
            logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
        try:
            # "local" always starts one: the default would join whatever cluster happens to run on this machine.
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ConfigError(f"{_said(address)}: {error}") from None
    return str(ray.get_runtime_context().gcs_address)


def set_environment() -> None:
    """Our defaults of Ray's settings for this process and what it starts."""
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)


def _said(address: str | None) -> str:
    if address is None:
        return "cannot start Ray on this machine"
    return (
        f"cannot join the Ray cluster at RAY_ADDRESS = '{address}' (one that was started with a token wants "
        "RAY_AUTH_MODE=token and the same token here)"
    )


def check_address(address: str) -> None:
    """Refuses an address where nothing answers, within CONNECT_TIMEOUT_S.

    Raises:
        ConfigError: Not host:port, or nobody listens there.
    """
    if address in ("auto", "local"):
        return
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit() or "://" in address:
        raise ConfigError(
            f"RAY_ADDRESS = '{address}' is not host:port of a cluster's head, as `ray start --head` prints it; a ray:// client "
            "address cannot run training: start the command on the cluster instead (`ray job submit`)"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(
            f"RAY_ADDRESS = '{address}': no Ray cluster answers there ({error}); start one with `ray start --head`, "
            "correct the address, or unset RAY_ADDRESS to use this machine"
        ) from None


def capacity(scale: ScaleConfig | None = None) -> Capacity:
    """What the cluster has, and may get where it has an autoscaler.

    Args:
        scale: Its node_wait_s says that nodes may come even where nobody names them.
    """
    import ray

    from crate_ray.launch.autoscaler import node_groups

    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    groups, num_left = node_groups(nodes)
    is_open = not groups and scale is not None and scale.node_wait_s is not None
    return Capacity(tuple(dict(node["Resources"]) for node in nodes), groups, num_left, is_open)


def node_wait_s(scale: ScaleConfig, have: Capacity) -> float:
    """How long to wait for nodes that have yet to come; endless where none would come by themselves.

    Args:
        scale: Of the run.
        have: What the cluster has.
    """
    return (scale.node_wait_s or NODE_WAIT_S) if have.may_grow else math.inf


def this_machine() -> Capacity:
    """What a cluster of this machine alone would have."""
    import torch
    from ray._private.utils import get_num_cpus

    return Capacity(({"CPU": float(get_num_cpus()), "GPU": float(torch.cuda.device_count())},))


def worker_need(scale: ScaleConfig) -> dict[str, float]:
    """Ray resources of one worker."""
    return {"CPU": scale.cpus_per_worker} | ({"GPU": 1.0} if scale.use_gpu is True else {})


def resolve_scale(scale: ScaleConfig) -> ScaleConfig:
    """Settles `use_gpu: auto`, and refuses what can never fit; of a range, its least.

    Raises:
        ConfigError: More CPUs or GPUs are asked for than the cluster can have.
    """
    have = capacity(scale)
    least = scale.min_workers
    gpus = have.total_at_most("GPU")
    if scale.use_gpu == "auto" and have.is_open and gpus < least:
        log.warning("no GPUs are there yet, so the workers take CPUs; set scale.use_gpu=true to wait for nodes that have some")
    scale = scale.model_copy(update={"use_gpu": gpus >= least if scale.use_gpu == "auto" else scale.use_gpu})
    need = worker_need(scale)
    _set_start_timeout(scale, have)
    if have.may_fit(need, least):
        return scale
    room = have.workers_at_most(need)
    fix = f"use at most {room} workers, or lower scale.cpus_per_worker" if room else "lower scale.cpus_per_worker, or add nodes"
    if scale.use_gpu and gpus < least:
        fix += ", or set scale.use_gpu=false"
    key = "scale.num_workers.min" if scale.is_elastic else "scale.num_workers"
    raise ConfigError(
        f"{key} = {least} of {amounts_in_words(need)} each do not fit: {have.described(need)}, room for {room}; "
        f"{fix}{_open_fix(have)}"
    )


def _open_fix(have: Capacity) -> str:
    """For a cluster whose autoscaler names no nodes, as under KubeRay."""
    return "" if have.groups else ", or give scale.node_wait_s, seconds to wait, where an autoscaler may start nodes that fit"


def _set_start_timeout(scale: ScaleConfig, have: Capacity) -> None:
    """How long a group waits for its room: for nodes that an autoscaler starts; briefly, where fewer workers would do."""
    if scale.is_elastic:
        os.environ.setdefault(_START_TIMEOUT, str(ELASTIC_TIMEOUT_S))
    elif have.may_grow:
        os.environ.setdefault(_START_TIMEOUT, str(node_wait_s(scale, have) + _START_MARGIN_S))


def check_preprocessing(config: RunConfig) -> None:
    """Refuses a run whose workers leave no CPU for the actors that decode for them; they would wait for ever.

    Args:
        config: With its scale resolved.

    Raises:
        ConfigError: Fewer CPUs than the workers and one actor each take.
    """
    if config.data.preprocess is None:
        return
    have, scale = capacity(config.scale), config.scale
    cpus = have.total_at_most("CPU")
    workers = scale.max_workers  # room for fewer would be filled by workers, and none left for their actors
    need = workers * (scale.cpus_per_worker + 1)
    if cpus < need and not have.is_open:
        raise ConfigError(
            f"data.preprocess = ray_data decodes on CPUs beside those of the workers: {workers} workers of "
            f"{scale.cpus_per_worker:g} CPU and one actor of 1 CPU for each need {need:g}, and the cluster has {cpus:g}; add "
            "nodes, lower scale.num_workers, or leave data.preprocess out"
        )


def trial_need(resources: TrialResources) -> dict[str, float]:
    """Ray resources of one worker of a trial."""
    return {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})


def trial_room(resources: TrialResources, have: Capacity) -> int:
    """How many trials fit side by side: on the live nodes, or on those that an autoscaler may still start.

    The latter, so that demand appears for nodes that are not there yet: one trial more than now where nobody knows how many.
    """
    return have.workers_at_most(trial_need(resources)) // resources.num_workers + have.is_open


def worker_bytes(resources: TrialResources, have: Capacity) -> int | None:
    """Memory that a worker of a trial can have: its part of a GPU, or of the largest node by its CPUs; None if unknown.

    Ray does not know the memory of a GPU, so a worker looks. Where no GPU is free within GPU_LOOK_S, or none is there yet, it
    stays unknown.
    """
    if resources.gpus:
        whole = _gpu_bytes() if have.total("GPU") else None
        return None if whole is None else int(whole * resources.gpus)
    coming = [group.resources for group in have.groups if group.num_left and have.num_left != 0]
    if have.is_open or any("memory" not in node and node.get("CPU", 0.0) >= resources.cpus for node in coming):
        return None  # a node that has yet to come may be larger than those that are there
    nodes = [node for node in (*have.nodes, *coming) if {"memory", "CPU"} <= node.keys()]
    return int(max((node["memory"] * min(1.0, resources.cpus / node["CPU"]) for node in nodes), default=0)) or None


def _gpu_bytes() -> int | None:
    import ray

    look = ray.remote(num_gpus=1, num_cpus=0)(_look_at_gpu).remote()
    try:
        return int(ray.get(look, timeout=GPU_LOOK_S))
    except ray.exceptions.RayError as error:
        log.info("the memory of a GPU is not known: %s", error)
        ray.cancel(look, force=True)
        return None


def _look_at_gpu() -> int:
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)


def check_trial_fits(resources: TrialResources, have: Capacity) -> None:
    """Refuses trials that can never start; Tune would wait for ever, without a word.

    Raises:
        ConfigError: What a trial takes, and what the nodes have.
    """
    if trial_room(resources, have) == 0:
        raise ConfigError(
            f"resources_per_trial: {fit_problem(resources, have)}; lower resources_per_trial.num_workers, .cpus or .gpus, or "
            f"add nodes{_open_fix(have)}"
        )


def fit_problem(resources: TrialResources, have: Capacity) -> str:
    """What a trial takes and the nodes do not have."""
    need = trial_need(resources)
    return (
        f"a trial takes {resources.num_workers} x {amounts_in_words(need)} and never fits: {have.described(need)}, room for "
        f"{have.workers_at_most(need)} such workers"
    )


def check_population_fits(population: int, resources: TrialResources, have: Capacity) -> None:
    """Refuses a population that cannot train side by side: nobody could copy anybody.

    Args:
        population: Trials over all arms.
        resources: Of one trial.
        have: What the cluster has.

    Raises:
        ConfigError: The population and the room for it.
    """
    room = trial_room(resources, have)
    if room < population and not have.is_open:
        raise ConfigError(
            f"scheduler.population: {population} trials over all arms train side by side, and the cluster has room for {room}; "
            "lower scheduler.population or resources_per_trial (cpus: 0.5 shares a CPU), or add nodes"
        )
