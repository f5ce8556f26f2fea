"""What a process's GPUs are doing, as the driver and torch's allocator count it: nothing here waits for the device."""

from __future__ import annotations

import contextlib
import importlib
import logging
from typing import Any

logger = logging.getLogger(__name__)


class GpuMonitor:
    """Mean utilisation of the GPUs of this process since the last look, and their memory, by NVML (``nvidia-ml-py``).

    The driver samples it several times a second and keeps the last samples, so that nothing has to run beside the work.
    Utilisation is the share of the time in which any kernel ran: 1 does not say that it ran well.
    """

    def __init__(self, gpus: list[str]) -> None:
        """``gpus`` are named as in CUDA_VISIBLE_DEVICES: indices or UUIDs."""
        self._nvml: Any = None
        self._handles: list[Any] = []
        self._last: dict[int, int] = {}
        if not gpus:
            return
        try:
            nvml = importlib.import_module("pynvml")
            nvml.nvmlInit()
            for gpu in gpus:
                by_index = gpu.isdecimal()
                handle = nvml.nvmlDeviceGetHandleByIndex(int(gpu)) if by_index else nvml.nvmlDeviceGetHandleByUUID(gpu)
                self._handles.append(handle)
            self._nvml = nvml
        except Exception as error:  # no library, no driver, a GPU that it may not see: there is no figure then
            logger.info("NVML tells nothing of GPU %s: %s", ",".join(gpus), error)

    def utilization(self) -> float | None:
        """Share of the time; None where NVML does not tell."""
        if self._nvml is None:
            return None
        with contextlib.suppress(self._nvml.NVMLError):
            shares = [self._since_last(index, handle) for index, handle in enumerate(self._handles)]
            return sum(shares) / len(shares)
        return None

    def memory_gib(self) -> float | None:
        """In use on the GPU that has most in use, by all processes; None where NVML does not tell."""
        if self._nvml is None:
            return None
        with contextlib.suppress(self._nvml.NVMLError):
            return max(float(self._nvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in self._handles) / 2**30
        return None

    def _since_last(self, index: int, handle: Any) -> float:
        nvml = self._nvml
        try:
            _, samples = nvml.nvmlDeviceGetSamples(handle, nvml.NVML_GPU_UTILIZATION_SAMPLES, self._last.get(index, 0))
        except nvml.NVMLError:  # no new one, or a GPU that keeps none: what it is now
            samples = []
        if not samples:
            return float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100
        self._last[index] = max(int(sample.timeStamp) for sample in samples)
        return float(sum(sample.sampleValue.uiVal for sample in samples)) / len(samples) / 100


def memory_figures() -> dict[str, float]:
    """``perf/trainer_memory_peak_gib`` since the last call, and ``perf/trainer_memory_reserved_gib`` of torch's
    allocator on the current device; nothing on the CPU. The counters are the host's own."""
    import torch

    if not torch.cuda.is_available():
        return {}
    figures = {
        "perf/trainer_memory_peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "perf/trainer_memory_reserved_gib": torch.cuda.memory_reserved() / 2**30,
    }
    torch.cuda.reset_peak_memory_stats()
    return figures
