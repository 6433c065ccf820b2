"""Device and precision of a worker, chosen once and written down."""

import logging
import os
import shutil

import torch

from crate_ray.config import ConfigError, RunConfig

log = logging.getLogger(__name__)


def choose_device(use_gpu: bool | str, local_rank: int) -> torch.device:
    """The worker's device.

    Raises:
        ConfigError: A GPU is asked for and there is none.
    """
    if use_gpu is True and not torch.cuda.is_available():
        raise ConfigError(
            "scale.use_gpu = true, but this worker sees no CUDA device; set it to auto or false, or use a GPU node"
        )
    if use_gpu is False or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def resolve_precision(precision: str, device_type: str) -> str:
    """`auto` becomes bfloat16 where the device multiplies it in hardware, else float32.

    That is a GPU, or a CPU with AMX or the AVX-512 bf16 instructions: docs/numerics.md has the measurement.
    """
    if precision != "auto":
        return precision
    if device_type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else "float32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context of forward passes."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what it needs, a C++ compiler on a CPU and a C compiler on a GPU; warns when it has not."""
    names = ("cc", "gcc", "clang") if device.type == "cuda" else ("c++", "g++", "clang++")
    if any(shutil.which(name) for name in (os.environ.get("CC" if device.type == "cuda" else "CXX"), *names) if name):
        return True
    log.warning("train.compile = true needs a compiler (%s) and none is installed; running uncompiled", ", ".join(names))
    return False


def make_deterministic(config: RunConfig) -> None:
    """Seeds torch, and asks for kernels whose sums have one order where the run wants them, and only there.

    On a GPU cuBLAS reads its workspace setting when it is first used in a process, and cuDNN must not race its kernels.
    """
    torch.manual_seed(config.train.seed)
    wanted = config.train.deterministic
    if wanted != torch.are_deterministic_algorithms_enabled():  # the setter alone imports the compiler, a second of CPU time
        torch.use_deterministic_algorithms(wanted)
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
