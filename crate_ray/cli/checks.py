"""The checks of `crate-ray doctor`: each gives rows of what was found and how to mend it.

In: this machine. Out: `Check` rows; nothing is changed but a test file that is removed again. Torch and a Ray cluster are
asked in processes of their own: a broken binary then ends that process, and a silent server is left behind.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from crate_ray import storage
from crate_ray.config import ConfigError

PACKAGE = "crate-ray"
TESTED_PYTHON = ((3, 11), (3, 12))
IMPORT_TIMEOUT_S = 100.0
JOIN_TIMEOUT_S = 12.0
CONNECT_TIMEOUT_S = 5.0
_GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One finding: `fail` will stop a run, `warn` may slow or limit one; `fix` is empty when all is well."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""


def check_python() -> list[Check]:
    """The interpreter, against what is required and what is tested."""
    version = ".".join(str(part) for part in sys.version_info[:3])
    tested = " and ".join(f"{major}.{minor}" for major, minor in TESTED_PYTHON)
    if sys.version_info[:2] < TESTED_PYTHON[0]:
        return [Check("Python", "fail", f"{version}, too old", f"make an environment with Python {tested}")]
    if sys.version_info[:2] not in TESTED_PYTHON:
        return [Check("Python", "warn", f"{version}, not tested", f"tested with {tested}")]
    return [Check("Python", "ok", version)]


def check_packages() -> list[Check]:
    """Installed versions against the ranges that this package declares: one row for each outside of its range."""
    from packaging.requirements import Requirement

    try:
        declared = [Requirement(text) for text in metadata.requires(PACKAGE) or []]
    except metadata.PackageNotFoundError:
        return [Check("packages", "warn", f"{PACKAGE} is not installed, so its ranges are unknown", "pip install -e .")]
    needed = [r for r in declared if r.marker is None or r.marker.evaluate({"extra": ""})]
    rows = []
    for requirement in needed:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            rows.append(Check(requirement.name, "fail", "not installed", f"pip install '{requirement}'"))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found = f"{version}, outside of {requirement.specifier}"
            rows.append(Check(requirement.name, "fail", found, f"pip install '{requirement}'"))
    return rows or [Check("packages", "ok", f"{len(needed)} packages within the tested ranges")]


_TORCH_PROBE = """
import json, torch, torchvision
from torchvision.ops import nms
nms(torch.zeros(1, 4), torch.ones(1), 0.5)
from crate_ray.training.precision import resolve_precision
cuda = torch.cuda.is_available()
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if cuda else []
print(json.dumps({
    "torch": torch.__version__, "torchvision": torchvision.__version__, "cuda_build": torch.version.cuda,
    "gpus": [[d.name, d.total_memory] for d in devices],
    "precision": resolve_precision("auto", "cuda" if cuda else "cpu"),
}))
"""


def check_torch() -> list[Check]:
    """Whether torch and torchvision work together, the GPUs that they see, and the precision that `auto` becomes."""
    answer = _python(_TORCH_PROBE, timeout_s=IMPORT_TIMEOUT_S)
    if isinstance(answer, str):
        return [_torch_fault(answer)]
    return [
        Check("torch", "ok", f"{answer['torch']} with torchvision {answer['torchvision']}"),
        _gpus(answer["gpus"], answer["cuda_build"]),
        _precision(answer["precision"], bool(answer["gpus"])),
    ]


def _torch_fault(error: str) -> Check:
    pair = " and ".join(f"{name} {_version(name)}" for name in ("torch", "torchvision"))
    if "torchvision::" in error:  # torchvision's binary did not register its operators with this torch
        error = f"they do not fit together ({error})"
    fix = "install both from one index in one command: pip install --force-reinstall torch torchvision"
    return Check("torch", "fail", f"{pair}: {error}", fix)


def _gpus(gpus: list[list[Any]], cuda_build: str | None) -> Check:
    if gpus:
        names = ", ".join(f"{name} ({memory / _GIB:.0f} GiB)" for name, memory in gpus)
        return Check("GPUs", "ok", f"{len(gpus)}: {names}")
    if not Path("/dev/nvidia0").exists() and shutil.which("nvidia-smi") is None:
        return Check("GPUs", "ok", "none; runs use the CPU")
    found = f"this machine has an NVIDIA GPU that torch does not see (torch built for CUDA {cuda_build or 'none'})"
    return Check("GPUs", "warn", found, "install a torch built for CUDA, and a driver that is new enough for it")


def _precision(precision: str, on_gpu: bool) -> Check:
    device = "the GPU" if on_gpu else "the CPU"
    has = "in hardware" if precision == "bfloat16" else "not in hardware"
    return Check("bfloat16", "ok", f"{has} on {device}; train.precision=auto becomes {precision}")


def check_compiler() -> list[Check]:
    """What torch.compile needs on a CPU."""
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if found:
        return [Check("C++ compiler", "ok", found)]
    fix = "install g++ or clang++ if you set train.compile=true on a CPU; without it runs go on uncompiled"
    return [Check("C++ compiler", "warn", "none", fix)]


def check_machine() -> list[Check]:
    """CPUs that this process may use, and memory."""
    import psutil

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory()
    total = min(memory.total, _container_memory() or memory.total)
    free = min(memory.available, total)
    text = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
    few_cpus, little_memory = cpus < 2, free < 2 * _GIB
    return [
        Check("CPUs", "warn" if few_cpus else "ok", str(cpus), "Ray and a worker share one core" if few_cpus else ""),
        Check(
            "memory", "warn" if little_memory else "ok", text, "free some: Ray alone takes about 1 GiB" if little_memory else ""
        ),
    ]


def _container_memory() -> int | None:
    """The memory limit of this container (cgroup v2), in bytes."""
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no such file outside of containers; the word "max" without a limit
        return None


def check_limits() -> list[Check]:
    """Limits that Ray runs into: open files, shared memory."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < 4096
    rows = [Check("open files", "warn" if few else "ok", f"limit {soft}", "ulimit -n 65536 before the start" if few else "")]
    shared = Path("/dev/shm")
    if shared.is_dir():
        total = shutil.disk_usage(shared).total
        small = total < 2 * _GIB
        fix = "give the container more (docker run --shm-size=8g, or an emptyDir of medium Memory): Ray keeps objects there"
        rows.append(Check("/dev/shm", "warn" if small else "ok", f"{total / _GIB:.1f} GiB", fix if small else ""))
    return rows


def check_storage(uri: str) -> list[Check]:
    """Whether runs can be written, and how much room is left."""
    missing = _missing_folders(storage.local_path(uri)) if storage.is_local(uri) else []
    start = time.monotonic()
    try:
        storage.check_writable(uri)
    except ConfigError as error:
        return [Check("storage", "fail", str(error), "give another folder or bucket: --set storage.path=PATH")]
    rows = [Check("storage", "ok", f"{uri} can be written ({time.monotonic() - start:.2f} s)")]
    if storage.is_local(uri):
        rows.append(_disk(shutil.disk_usage(storage.local_path(uri)).free))
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
    return rows


def _missing_folders(path: Path) -> list[Path]:
    """What a look makes, the deepest first, and takes away again."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def _disk(free: int) -> Check:
    found = f"{free / _GIB:.1f} GiB free"
    if free < 10 * _GIB:
        fix = "checkpoints take 12 bytes a parameter each; free some, or use another storage.path"
        return Check("disk", "fail" if free < _GIB else "warn", found, fix)
    return Check("disk", "ok", found)


def check_tracking(storage_path: str, uri: str | None) -> list[Check]:
    """Whether MLflow's store answers, and how fast. Runs do not need it, so that a silent server is a warning."""
    from crate_ray.tracking.client import absolute_uri, database_path, default_uri, open_client, public_uri

    store = absolute_uri(uri or default_uri(storage_path))
    database = database_path(store)
    if database is not None and not database.exists():
        return [_new_database(database)]
    start = time.monotonic()
    silence = None if database else _server_silence(public_uri(store))
    if silence is not None:
        found = f"{public_uri(store)} does not answer ({silence}; {time.monotonic() - start:.1f} s)"
        fix = "start the server or correct tracking.uri; runs go on without it, and `crate-ray tracking sync` catches up"
        return [Check("tracking", "warn", found, fix)]
    client = open_client(store, timeout_s=CONNECT_TIMEOUT_S)  # imports for seconds, which are not the store's
    start = time.monotonic()
    try:
        client.search_experiments(max_results=1)
    except Exception as error:  # noqa: BLE001 - MLflow passes on what its database drivers raise
        found = f"{public_uri(store)} refuses after {time.monotonic() - start:.1f} s: {' '.join(str(error).split())[:200]}"
        fix = "check its version and your access to it, or use another store: --set tracking.uri=sqlite:///PATH/mlflow.db"
        return [Check("tracking", "fail" if database else "warn", found, fix)]
    return [Check("tracking", "ok", f"{public_uri(store)} answers ({time.monotonic() - start:.2f} s)")]


def _server_silence(url: str) -> str | None:
    """Why nobody answers at a server's address; None when somebody does, or when it is no web address."""
    if not url.startswith(("http://", "https://")):
        return None
    try:
        urllib.request.urlopen(f"{url}/health", timeout=CONNECT_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return None  # an answer, if only that a password is needed
    except OSError as error:
        return str(getattr(error, "reason", error))
    return None


def _new_database(path: Path) -> Check:
    above = next(folder for folder in path.parents if folder.exists())
    if os.access(above, os.W_OK):
        return Check("tracking", "ok", f"{path} will be created by the first run")
    return Check(
        "tracking", "fail", f"{path} cannot be created: {above} is not writable", "--set tracking.uri=sqlite:///PATH/mlflow.db"
    )


# Ray checks versions only once a driver joins, and then says little; the cluster's own note is read instead.
_RAY_PROBE = """
import json, sys
from ray._raylet import GcsClient
from ray._common.usage.usage_lib import get_cluster_metadata
print(json.dumps(get_cluster_metadata(GcsClient(address=sys.argv[1]))))
"""


def check_ray() -> list[Check]:
    """Whether the cluster that RAY_ADDRESS names answers and runs the same Ray and Python."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        return [
            Check("Ray", "ok", f"{_version('ray')}; RAY_ADDRESS is not set: a run starts a cluster of its own on this machine")
        ]
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():
        return [Check("Ray", "ok", f"{_version('ray')}; RAY_ADDRESS = {address}: looked up when a run starts")]
    start = time.monotonic()
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        found = f"RAY_ADDRESS = {address} does not answer ({error}; {time.monotonic() - start:.1f} s)"
        return [Check("Ray", "fail", found, "start it with `ray start --head`, correct the address, or unset RAY_ADDRESS")]
    if address.startswith("ray://"):
        return [Check("Ray", "ok", f"{_version('ray')}; {address} answers; its versions are compared when a run starts")]
    return [_same_versions(address, _python(_RAY_PROBE, address, timeout_s=JOIN_TIMEOUT_S))]


def _same_versions(address: str, cluster: dict[str, Any] | str) -> Check:
    if isinstance(cluster, str) and "AuthenticationError" in cluster:
        fix = "export RAY_AUTH_MODE=token, with the cluster's token in ~/.ray/auth_token (`ray get-auth-token` there prints it)"
        return Check("Ray", "fail", f"{address} wants a token that this machine does not send", fix)
    if isinstance(cluster, str):
        found = f"{address} answers, but not as a Ray cluster ({cluster})"
        return Check("Ray", "fail", found, "point RAY_ADDRESS at the cluster's GCS port, 6379 by default")
    here = {"ray_version": _version("ray"), "python_version": ".".join(str(part) for part in sys.version_info[:3])}
    differences = [
        f"{key.removesuffix('_version')} {cluster[key]} there, {value} here"
        for key, value in here.items()
        if cluster[key] != value
    ]
    if differences:
        fix = "install the same Ray and Python on every machine of the cluster and here"
        return Check("Ray", "fail", f"{address}: {'; '.join(differences)}", fix)
    return Check("Ray", "ok", f"{address} runs Ray {here['ray_version']} on Python {here['python_version']}, as here")


def _python(code: str, *arguments: str, timeout_s: float) -> dict[str, Any] | str:
    """What a Python process of its own prints as JSON, or what went wrong in one line."""
    command = [sys.executable, "-c", code, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout_s:g} s"
    if done.returncode:
        return _last_line(done.stderr) or f"the process ended with status {done.returncode}"
    answer: dict[str, Any] = json.loads(_last_line(done.stdout))
    return answer


def _last_line(text: str) -> str:
    lines: Iterator[str] = (line.strip() for line in reversed(text.splitlines()))
    return next((line for line in lines if line), "")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"
