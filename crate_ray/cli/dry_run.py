"""`crate-ray train --dry-run`: what a run would be, need and write, before anything is started.

In: a configuration, and the share of the peak to expect. Out: facts, as a screen in sections or as one JSON object. Sizes and
operations are closed forms (`models.cost`, `models.memory`); what they leave out is said beside them. Checks write no more
than a test file that is removed again, and ask a cluster only where RAY_ADDRESS names one: none is started.
"""

import inspect
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import typer

from crate_ray.cli import checks
from crate_ray.cli.checks import Check
from crate_ray.cli.dry_run_screen import print_plan
from crate_ray.cli.output import print_json
from crate_ray.cli.study import workers_in_words
from crate_ray.config import ConfigError, RunConfig
from crate_ray.runs import RunFolder, is_finished
from crate_ray.storage import bytes_in_words

if TYPE_CHECKING:
    from crate_ray.launch.capacity import Capacity

_FLOAT32_BYTES = 4


def dry_run(config: RunConfig, *, mfu: float, as_json: bool) -> None:
    """Prints what a run would be; reads the data's index, and leaves nothing behind.

    Args:
        config: As loaded.
        mfu: Share of the peak that the model's operations reach, 0 to 1.
        as_json: One JSON object instead of the screen.

    Raises:
        ConfigError: What the run would be refused for: data, labels, names, first weights.
        typer.Exit: With code 2, when a check failed.
    """
    from crate_ray.training.prepare import absolute_paths, locate_run

    config = absolute_paths(config)
    folder = locate_run(config)
    device, rows = _find_device(config)
    facts = _facts(config, folder, device, mfu=mfu)
    storage_rows = [row for row in checks.check_storage(config.storage.path) if row.name != "disk"]  # judged for this run below
    rows = [*storage_rows, *_check_room(config, folder, facts), *rows]
    found = {**facts, "checks": [asdict(row) for row in rows]}
    if as_json:
        print_json({**found, "config": config.model_dump(mode="json")})
    else:
        print_plan(config, found, rows)
    if any(row.state == "fail" for row in rows):
        raise typer.Exit(2)


def _facts(config: RunConfig, folder: RunFolder, device: str, *, mfu: float) -> dict[str, Any]:
    from crate_ray.data import load_source
    from crate_ray.training.precision import resolve_precision
    from crate_ray.training.schedule import total_steps, warmup_steps

    samples = load_source(config.data.source).num_samples
    steps, batch, scale = total_steps(config, samples), config.train.global_batch, config.scale
    rows = math.ceil(batch / scale.min_workers)
    is_gpu = device != "CPU"
    # A GPU that is not here is taken for one with bfloat16, as all of the table are.
    auto = "bfloat16" if is_gpu else resolve_precision("auto", "cpu")
    precision = auto if config.train.precision == "auto" else config.train.precision
    mix = _mix(config, steps * batch)
    return {
        "run": folder.name,
        "folder": folder.uri,
        **_state(folder),
        "task": config.task,
        **({"starts_from": config.train.init_from} if config.train.init_from else {}),
        "samples": samples,
        **({"mix": mix} if mix else {}),
        "steps": steps,
        "epochs": round(steps * batch / samples, 2),
        "warmup_steps": warmup_steps(config, samples),
        "peak_lr": config.optimizer.peak_lr(batch),
        "device": device,
        "workers": f"{scale.min_workers} to {scale.max_workers}" if scale.is_elastic else scale.max_workers,
        "parallel": scale.parallel,
        "precision": precision,
        "batch_per_worker": rows,
        "micro_batches": math.ceil(rows / (config.train.micro_batch or rows)),
        **_cost(config, steps * batch),
        **_hours(config, device, precision, steps * batch, mfu=mfu),
        "memory_bytes": _memory(config, rows, precision),
        **_checkpoints(config),
        "writes": _writes(config, folder),
    }


def _state(folder: RunFolder) -> dict[str, Any]:
    """Where the same command would go on."""
    from crate_ray.training.checkpoint import latest_checkpoint

    held = latest_checkpoint(folder)
    return {"is_finished": is_finished(folder), "resumes_from_step": held.step if held else None}


def _cost(config: RunConfig, images: int) -> dict[str, Any]:
    from crate_ray.models.cost import count_parameters, training_flops_per_image

    parameters, flops = count_parameters(config.model), training_flops_per_image(config.model)
    return {
        "params_trainable": parameters.trainable,
        "params_encoder": parameters.encoder,
        "training_gflops_per_image": float(f"{flops / 1e9:.4g}"),
        "training_pflops_in_all": float(f"{flops * images / 1e15:.4g}"),
    }


def _hours(config: RunConfig, device: str, precision: str, images: int, *, mfu: float) -> dict[str, Any]:
    """Hours at a share of the peak, of the most workers; None where no peak is known."""
    from crate_ray.models.cost import training_flops_per_image
    from crate_ray.models.peaks import peak_tflops

    peak = config.scale.peak_tflops or peak_tflops(device, precision)
    flops = training_flops_per_image(config.model) * images
    hours = None if peak is None else flops / (config.scale.max_workers * peak * 1e12 * mfu) / 3600
    return {"mfu": mfu, "peak_tflops": peak, "hours": hours and float(f"{hours:.4g}")}


def _memory(config: RunConfig, rows: int, precision: str) -> dict[str, int]:
    """Bytes of one worker: on its device, and beside Python and torch on its host.

    Sharded state is divided by the fewest workers; with hybrid_shard, where it depends on the nodes, it is counted whole.

    Args:
        config: Of the run.
        rows: Images a step of one worker.
        precision: Resolved.
    """
    from crate_ray.models import memory
    from crate_ray.training.disk_space import checkpoint_bytes

    model, scale = config.model, config.scale
    at_once = min(config.train.micro_batch or rows, rows)
    shards = scale.min_workers if scale.parallel == "fsdp" and not scale.hybrid_shard else 1
    state = memory.run_state_bytes(config) // shards
    product: memory.Precision = "bfloat16" if precision == "bfloat16" else "float32"
    activations = at_once * memory.run_activation_bytes(config, precision=product)
    pixels = 3 * model.image_size**2
    noise = model.num_patches if config.task == "pretrain" else 0
    return {
        "state": state,
        "activations": activations,
        "device": state + activations,
        "batches_read_ahead": _batches_read_ahead() * rows * _FLOAT32_BYTES * (pixels + noise),
        "checkpoint_copy": checkpoint_bytes(config) // shards,
    }


def _checkpoints(config: RunConfig) -> dict[str, Any]:
    """Size of one, how many are kept, and the bytes of all while the next is written."""
    from crate_ray.training.disk_space import checkpoint_bytes

    size = checkpoint_bytes(config)
    kept = config.checkpoint.keep_last + (config.checkpoint.keep_best or 0)
    pinned = 1 if config.schedule.cooldown_fraction is not None else 0
    return {
        "checkpoint_bytes": size,
        "checkpoints_kept": kept + pinned,
        "checkpoint_bytes_in_all": size * (kept + pinned + 1),
    }


def _writes(config: RunConfig, folder: RunFolder) -> dict[str, str]:
    from crate_ray import tracking

    return {
        "run folder": folder.uri,
        "checkpoints": folder.path("checkpoints"),
        "records": folder.path("metrics.jsonl" if folder.is_local else "metrics"),
        "MLflow": config.tracking.uri or tracking.default_uri(config.storage.path),
        **({"shard cache": config.data.cache_dir} if config.data.cache_dir else {}),
    }


def _mix(config: RunConfig, images: int) -> list[dict[str, Any]]:
    """What a run of so many images reads of each data set of its mix; nothing of a run without a mix."""
    from crate_ray.data import load_index

    parts = config.data.mix or ()
    total = sum(part.weight for part in parts)
    sizes = [load_index(part.train).num_samples for part in parts]
    return [
        {"train": part.train, "samples": size, "share": part.weight / total, "epochs": images * part.weight / total / size}
        for part, size in zip(parts, sizes, strict=True)
    ]


def _batches_read_ahead() -> int:
    """Per worker, as the reader does by default."""
    from crate_ray.data import open_reader

    return int(inspect.signature(open_reader).parameters["prefetch"].default)


def _find_device(config: RunConfig) -> tuple[str, list[Check]]:
    """What workers compute on, and whether they fit: on the cluster that RAY_ADDRESS names, else on this machine.

    Returns:
        `CPU`, or the name of a GPU, which is `GPU` where nobody says it.
    """
    from crate_ray.launch import cluster

    is_cluster = os.environ.get("RAY_ADDRESS", "") not in ("", "local")
    rows = checks.check_ray() if is_cluster else []
    have = cluster.this_machine()
    if is_cluster and all(row.state != "fail" for row in rows):
        try:
            cluster.connect()
        except ConfigError as error:
            return _device_of(config, have), [Check("Ray", "fail", str(error), "correct RAY_ADDRESS, or unset it")]
        have = cluster.capacity(config.scale)
        rows = [*rows, _check_workers(config, have, where="the cluster", state="fail"), *_check_decoding(config)]
        return _device_of(config, have), rows
    if is_cluster:
        return _device_of(config, have), rows
    return _device_of(config, have), [_check_workers(config, have, where="this machine", state="warn")]


def _device_of(config: RunConfig, have: "Capacity") -> str:
    if not _uses_gpu(config, have):
        return "CPU"
    kinds = [key.partition(":")[2] for node in have.nodes for key in node if key.startswith("accelerator_type:")]
    if kinds:
        return kinds[0]
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "GPU"


def _uses_gpu(config: RunConfig, have: "Capacity") -> bool:
    if config.scale.use_gpu == "auto":
        return have.total_at_most("GPU") >= config.scale.min_workers
    return config.scale.use_gpu


def _check_workers(config: RunConfig, have: "Capacity", *, where: str, state: Literal["warn", "fail"]) -> Check:
    from crate_ray.launch.cluster import worker_need

    need = worker_need(config.scale.model_copy(update={"use_gpu": _uses_gpu(config, have)}))
    room = have.workers_at_most(need)
    each = " and ".join(f"{amount:g} {key}" for key, amount in need.items())
    found = f"{workers_in_words(config.scale)} of {each} each; {where} has room for {room}"
    if have.is_open:
        found += " now, and may get nodes for more"
    if have.may_fit(need, config.scale.min_workers):
        return Check("workers", "ok", found)
    ask = "" if state == "fail" else "; RAY_ADDRESS asks the cluster that is to run it"
    return Check("workers", state, found, f"lower scale.num_workers or scale.cpus_per_worker, or add nodes{ask}")


def _check_decoding(config: RunConfig) -> list[Check]:
    """A row where workers leave no CPU of the cluster to those that decode for them."""
    from crate_ray.launch.cluster import check_preprocessing

    try:
        check_preprocessing(config)
    except ConfigError as error:
        return [Check("decoding", "fail", str(error))]
    return []


def _check_room(config: RunConfig, folder: RunFolder, facts: Mapping[str, Any]) -> list[Check]:
    """A row where the checkpoints do not fit on the disk."""
    from crate_ray import storage
    from crate_ray.training.disk_space import held_bytes

    free = storage.free_bytes(config.storage.path)
    if free is None:
        return []
    room = free + held_bytes(folder)
    if room >= facts["checkpoint_bytes_in_all"]:
        return []
    found = (
        f"checkpoints take {bytes_in_words(facts['checkpoint_bytes_in_all'])}, and {bytes_in_words(room)} are there for them"
    )
    state: Literal["warn", "fail"] = "fail" if room < 2 * facts["checkpoint_bytes"] else "warn"  # as the run itself has it
    return [Check("disk", state, found, "free some, lower checkpoint.keep_last, or use another storage.path")]
