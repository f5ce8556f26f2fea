"""The GPUs of this machine, for a run that starts here: their memory, as the NVIDIA driver tells it."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from forge_hpc.cluster.worker import visible_gpus
from forge_hpc.config.schema import Config
from forge_hpc.files import in_thread
from forge_hpc.gate.nvml import GpuHealth
from forge_hpc.sizing.gpus import Gpu

ANSWER_S = 5.0
"""A driver that has not answered by then tells nothing here: the run looks at its node itself (``gate``)."""
load: Callable[[str], Any] = ctypes.CDLL


def num_gpus_here(cfg: Config) -> int | None:
    """GPUs of a run on this machine: as many as it is to use, else all that it may; None where it may use none."""
    return len(visible_gpus()) or None if cfg.cluster.gpus_per_node is None else cfg.cluster.gpus_per_node


def gpu_here(cfg: Config) -> Gpu | None:
    """The smallest GPU of a run on this machine, of which the memory alone is known; None where it has none, or more
    than there are, or the driver does not tell. CUDA shows up to 3 % less of it."""
    gpus, num = visible_gpus(), num_gpus_here(cfg) or 0
    sizes = _sizes(gpus[:num]) if num <= len(gpus) else []
    return Gpu("GPU of this machine", round(min(sizes) / 2**30, 1), 0.0) if sizes else None


def _sizes(gpus: Sequence[str]) -> list[int]:
    """Bytes of each of the GPUs that answer, by their names in CUDA_VISIBLE_DEVICES."""
    with contextlib.suppress(TimeoutError):
        health = in_thread(lambda: GpuHealth(gpus, engine_share=0.0, load=load, return_s=0.0), within_s=ANSWER_S)
        return [kind["memory_bytes"] for kind in health.kinds]
    return []
