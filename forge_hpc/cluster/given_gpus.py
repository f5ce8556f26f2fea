"""GPUs that a run is given and cannot use.

Those that torch cannot use at all: it would train on the CPU, and complete.

    node      its supervisor reads which build torch is (``cpu_build``, ``cuda_build``), and asks the driver which CUDA
              it is for ─► the gate, before anything starts
    process   its actor asks torch (``models.device.check_gpus``), which tries ─► the controller

Imports no torch.
"""

from __future__ import annotations

import importlib.util
import runpy
from collections.abc import Sequence
from pathlib import Path

from forge_hpc.config.errors import UserError

CPU_BUILD = "it is a build for the CPU"
_HINT = (
    "install a torch that fits the GPUs and their driver (make setup EXTRA=cuda; nvidia-smi shows the driver), "
    "or run on the CPU: cluster.gpus_per_node=0"
)


class UnusableGpus(UserError):
    """GPUs are given, and torch can use none of them. The run ends before it trains, with ``EXIT_USAGE``."""


def unusable(who: str, gpus: Sequence[str], torch_version: str, why: str) -> UnusableGpus:
    """The error, in a line.

    Args:
        who: has the GPUs: a node, or a role on a host.
        gpus: by their names in CUDA_VISIBLE_DEVICES.
    """
    has = f"GPU {gpus[0]}" if len(gpus) == 1 else f"{len(gpus)} GPUs ({','.join(gpus)})"
    return UnusableGpus(f"{who} is given {has}, and torch {torch_version} can use none: {why}", _HINT)


INVARIANT = 9
"""Compute capability, its first number, of GPUs that ``model.batch_invariant`` is for: that of FlashAttention 3."""


def not_invariant(who: str, has: str) -> UserError:
    """The error where a GPU is none for ``model.batch_invariant``: ``who`` has what instead."""
    return UserError(
        f"model.batch_invariant is for GPUs of compute capability {INVARIANT} (H100, H200): {who} {has}",
        "leave it off, or ask Slurm for such GPUs (slurm.gres, slurm.constraint)",
    )


def cpu_build() -> str | None:
    """The version of the installed torch where it is built for the CPU alone, by what its package says of itself; None
    where it is built for GPUs of any maker, or says nothing."""
    version, cuda, hip = _build()
    return version if version is not None and is_cpu_build(cuda, hip) else None


def cuda_build() -> tuple[str, str] | None:
    """The version of the installed torch, and the CUDA that it is built for; None where there is none."""
    version, cuda, _ = _build()
    return (version, cuda) if version is not None and cuda is not None else None


def why_too_old(driver: int | None, build: Sequence[str] | None) -> str | None:
    """What is wrong where a driver is for an older CUDA than torch is built for; None where the two may fit.

    A driver serves builds of the same first number (NVIDIA's minor version compatibility).

    Args:
        driver: as ``gate.nvml.GpuHealth.cuda``.
        build: from ``cuda_build``.
    """
    if driver is None or build is None or driver // 1000 >= int(build[1].partition(".")[0]):
        return None
    return f"their driver is for CUDA {driver // 1000}.{driver % 1000 // 10}, and it is built for {build[1]}"


def _build() -> tuple[str | None, str | None, str | None]:
    """What the package says of itself: its version, CUDA and HIP."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None, None, None
    try:
        build = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    except OSError:
        return None, None, None
    return build["__version__"], build.get("cuda"), build.get("hip")


def is_cpu_build(cuda: str | None, hip: str | None) -> bool:
    """Whether a torch of these (``torch.version``) has no ``torch.cuda``, which stands for AMD's GPUs too."""
    return cuda is None and hip is None
