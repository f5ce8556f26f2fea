"""GPUs by the names that sites give them in Slurm (``gres:gpu:h100:8``): their memory, and how fast they are."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import cache

logger = logging.getLogger(__name__)

PEAK_FLOPS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800 PCIe": 756e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
}
"""Dense 16-bit FLOP/s (without sparsity) by a part of the name that CUDA gives a GPU; of its maker's data sheets."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str
    """As ``PEAK_FLOPS`` has it."""
    memory_gib: float
    """That CUDA shows: less than is printed on the box."""
    bytes_per_s: float
    """Of its memory, by its maker's data sheet; 0 where it is not known."""


_GPUS = {
    "gb200": Gpu("GB200", 184.0, 8.0e12),
    "b200": Gpu("B200", 178.0, 8.0e12),
    "h200": Gpu("H200", 139.8, 4.8e12),
    "h100": Gpu("H100", 79.1, 3.35e12),
    "h800": Gpu("H800", 79.1, 3.35e12),
    "h20": Gpu("H20", 95.0, 4.0e12),
    "a100": Gpu("A100", 0.0, 1.555e12),  # of 40 or of 80 GB: only a name that says which has a memory
    "a800": Gpu("A800", 79.1, 2.0e12),
    "l40s": Gpu("L40S", 44.4, 0.864e12),
    "l4": Gpu("L4", 22.0, 0.3e12),
    "a10": Gpu("A10", 22.0, 0.6e12),
}
_SHOWN = 0.985
"""Share of the GB in a name that CUDA shows in GiB: 79.1 of 80."""


def gpu_named(name: str) -> Gpu | None:
    """The GPU that a name such as ``nvidia_h100_80gb_hbm3`` stands for; None for one that is not in the table.

    ``memory_gib`` is 0 where the name leaves it open. A part of a GPU (``h100_1g.10gb``) has its own memory.
    """
    words = re.split(r"[^a-z0-9.]+", name.lower())
    found = next((_GPUS[word] for word in words if word in _GPUS), None)
    if found is None:
        return None
    said = [float(size) for word in words for size in re.findall(r"(?:^|\.)(\d+)gb?$", word)]
    return Gpu(found.name, round(said[-1] * _SHOWN, 1), found.bytes_per_s) if said else found


@cache
def peak_flops(gpu: str) -> float | None:
    """Dense 16-bit FLOP/s of a GPU by its name; None where it is not in the table, which is logged once."""
    words = gpu.replace("-", " ").split()
    for name, flops in PEAK_FLOPS.items():
        if all(word in words for word in name.split()):
            return flops
    logger.info("the peak FLOP/s of a %s are not known here (sizing/gpus.py): there is no perf/mfu", gpu)
    return None
