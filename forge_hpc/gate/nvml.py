"""The health of this node's GPUs, as the NVIDIA driver tells it without root: no context is made on them.

NVML is called by ctypes: the supervisor imports nothing heavy, and the library comes with the driver.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any

LIBRARY = "libnvidia-ml.so.1"
_THROTTLED = {0x8: "hardware slowdown", 0x40: "thermal slowdown", 0x80: "power brake"}
_MAX_USED = 0.5
RETURN_S = 8.0
"""The memory of processes that were killed comes back seconds later: those of a run that has just been cancelled, or of
this run's own earlier start."""
_LOOK_S = 0.1


class GpuHealth:
    """What the driver says of the GPUs that CUDA_VISIBLE_DEVICES names.

    Attributes:
        working: how many of them answer; None where there is no driver.
        problems: what is wrong with those that do, a line a GPU. Memory in use is one when it is so for ``return_s``.
    """

    def __init__(
        self, gpus: Sequence[str], load: Callable[[str], Any] = ctypes.CDLL, return_s: float = RETURN_S
    ) -> None:
        self._until = time.monotonic() + return_s
        self.working: int | None = None
        self.problems: list[str] = []
        if not gpus:
            return
        try:
            self._nvml = load(LIBRARY)
        except OSError:
            return
        if self._nvml.nvmlInit_v2() != 0:
            return
        try:
            self.working = sum(self._look(gpu) for gpu in gpus)
        finally:
            self._nvml.nvmlShutdown()

    def _look(self, gpu: str) -> bool:
        """Note what is wrong with a GPU; False where it does not answer at all."""
        handle = ctypes.c_void_p()
        if gpu.isdecimal():
            code = self._nvml.nvmlDeviceGetHandleByIndex_v2(int(gpu), ctypes.byref(handle))
        else:
            code = self._nvml.nvmlDeviceGetHandleByUUID(gpu.encode(), ctypes.byref(handle))
        memory = (ctypes.c_ulonglong * 3)()  # total, free, used
        while (code := code or self._nvml.nvmlDeviceGetMemoryInfo(handle, memory)) == 0:
            if memory[2] <= _MAX_USED * memory[0]:
                break
            if time.monotonic() > self._until:
                self.problems.append(f"GPU {gpu}: {memory[2] / 2**30:.1f} of {memory[0] / 2**30:.1f} GiB are in use")
                break
            time.sleep(_LOOK_S)
        if code != 0:
            return False
        correctable, uncorrectable, pending, failed = (ctypes.c_uint() for _ in range(4))
        rows = (correctable, uncorrectable, pending, failed)
        if self._nvml.nvmlDeviceGetRemappedRows(handle, *map(ctypes.byref, rows)) == 0:  # from Ampere on
            if failed.value:
                self.problems.append(f"GPU {gpu}: a faulty row of its memory could not be remapped")
            elif pending.value:
                self.problems.append(f"GPU {gpu}: a faulty row of its memory waits for a reset to be remapped")
        retiring = ctypes.c_int()
        if self._nvml.nvmlDeviceGetRetiredPagesPendingStatus(handle, ctypes.byref(retiring)) == 0 and retiring.value:
            self.problems.append(f"GPU {gpu}: a faulty page of its memory waits for a reset to be retired")
        reasons = ctypes.c_ulonglong()
        if self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle, ctypes.byref(reasons)) == 0:
            self.problems += [f"GPU {gpu}: {name}" for bit, name in _THROTTLED.items() if reasons.value & bit]
        return True
