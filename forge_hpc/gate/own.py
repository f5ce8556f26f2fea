"""What a node finds out by itself: a few milliseconds, in its supervisor."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forge_hpc.cluster.folders import remove_left_over
from forge_hpc.cluster.given_gpus import cpu_build, cuda_build
from forge_hpc.cluster.worker import other_order
from forge_hpc.config import Config
from forge_hpc.config.recipes import needs_of
from forge_hpc.gate.environment import environment
from forge_hpc.gate.memory import available_memory, memory_limit
from forge_hpc.gate.nvml import GpuHealth
from forge_hpc.gate.orphans import end_orphans

MIN_SCRATCH_BYTES = 64 << 20
"""What sockets, logs of libraries and compiled code of a small run take."""
MIN_MEMORY_BYTES = 512 << 20
"""Less than the imports of one process take."""
SHARED_MEMORY = Path("/dev/shm")


def look_at_node(shared: Path, tls: Path, start: str, gpus: list[str], config: Config, alone: bool) -> dict[str, Any]:
    """The node's report, as JSON.

    Args:
        shared: a folder of the run directory that is this start's.
        tls: the run's folder of certificates.
        start: names this start in it.
        gpus: names of the GPUs that the node gives the run, which uses the first ``cluster.gpus_per_node``.
        alone: there are no other nodes to compare with.
    """
    orphans = end_orphans(tls, start)  # first: they hold what is looked at next
    remove_left_over()
    used = gpus[: config.cluster.gpus_per_node]
    health = GpuHealth(used, engine_share(config))
    memory, (limit, is_cgroups) = available_memory(), memory_limit()
    looks: list[Callable[[], str | None]] = [
        lambda: full(Path(tempfile.gettempdir()), "its temporary directory", MIN_SCRATCH_BYTES),
        lambda: full(SHARED_MEMORY, "its shared memory", MIN_SCRATCH_BYTES) if SHARED_MEMORY.is_dir() else None,
        lambda: short_of_memory(memory),
    ]
    return {
        "problems": [problem for look in looks if (problem := look()) is not None] + health.problems,
        "orphans": orphans,
        "gpus": len(gpus),
        "working_gpus": health.working,
        "gpu_kinds": health.kinds,
        "gpu_order": other_order(used),
        "gpu_names": gpus,
        "cpu_build": cpu_build() if gpus else None,
        "cuda_build": cuda_build() if gpus else None,
        "cuda_driver": health.cuda,
        "memory_bytes": memory,
        "memory_limit": {"num_bytes": limit, "is_cgroups": is_cgroups},
        "clock_s": 0.0 if alone else clock_offset_s(shared),
        "environment": {} if alone else environment(),
    }


def engine_share(config: Config) -> float:
    """The largest share of a GPU that an engine of the run takes: vLLM refuses to start where less is free. 0 for a run
    of trainers alone, who plan with what is free, on all GPUs with the least."""
    engines = [one.engine for one in config.served]
    if needs_of(config).generators != "none":
        engines.append(config.generator.engine)
    return max((engine.gpu_memory_utilization for engine in engines), default=0.0)


def full(folder: Path, what: str, min_bytes: int) -> str | None:
    """Why nothing can be kept in ``folder``. Written to the disk and not only asked: a quota does not tell."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="forge-hpc-gate-") as file:
            file.write(os.urandom(1 << 16))
            file.flush()
            os.fsync(file.fileno())
        found = os.statvfs(folder)
    except OSError as error:
        return f"{what} {folder} cannot be written: {error.strerror}"
    if (free := found.f_bavail * found.f_frsize) < min_bytes:
        return f"{what} {folder} is full: {free / 2**20:.0f} MiB are free"
    return None


def short_of_memory(num_bytes: int) -> str | None:
    if num_bytes >= MIN_MEMORY_BYTES:
        return None
    return f"it is short of memory: {num_bytes / 2**20:.0f} MiB are available"


def clock_offset_s(shared: Path, now: Callable[[], float] = time.time) -> float:
    """How far this node's clock is before the file server's, which is the same for all nodes."""
    with tempfile.NamedTemporaryFile(dir=shared, prefix=".clock-") as file:
        file.write(b"tick")
        file.flush()
        os.fsync(file.fileno())
        return now() - os.fstat(file.fileno()).st_mtime
