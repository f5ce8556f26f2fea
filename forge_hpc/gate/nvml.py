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
MAX_USED_SHARE, MIN_USED_BYTES = 0.5, 2 << 30
"""What others may use of a GPU at most, and what they always may: the driver keeps some itself, a desktop has some."""
RETURN_S = 8.0
"""The memory of processes that were killed comes back seconds later: those of a run that has just been cancelled, or of
this run's own earlier start."""
_LOOK_S = 0.1


class GpuHealth:
    """What the driver says of some GPUs.

    Args:
        gpus: as CUDA_VISIBLE_DEVICES names them.
        engine_share: of a GPU's memory, which an engine needs free to start (``gpu_memory_utilization``); 0: there is
            none.

    Attributes:
        working: how many of them answer; None where there is no driver.
        kinds: ``name`` and ``memory_bytes`` of each that does.
        cuda: the newest CUDA that the driver is for, as 1000 times its first number and 10 times its second; None where
            it does not tell. A library for forward compatibility counts, where the loader finds it.
        problems: what is wrong with those that do, a line a GPU. Memory in use is one when it is so for ``return_s``.
    """

    def __init__(
        self,
        gpus: Sequence[str],
        engine_share: float,
        load: Callable[[str], Any] = ctypes.CDLL,
        return_s: float = RETURN_S,
    ) -> None:
        self._share = engine_share
        self._until = time.monotonic() + return_s
        self.working: int | None = None
        self.kinds: list[dict[str, Any]] = []
        self.cuda: int | None = None
        self.problems: list[str] = []
        if not gpus:
            return
        try:
            self._nvml = load(LIBRARY)
        except OSError:
            return
        if (code := self._nvml.nvmlInit_v2()) != 0:
            self.problems.append(f"the driver of its GPUs does not answer (NVML error {code})")
            return
        try:
            version = ctypes.c_int()
            if self._nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(version)) == 0:
                self.cuda = version.value
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
            if memory[2] <= (limit := self._may_be_used(memory[0])):
                break
            if time.monotonic() > self._until:
                total, used, most = (num_bytes / 2**30 for num_bytes in (memory[0], memory[2], limit))
                given = f"with gpu_memory_utilization={self._share:g} " if self._share else ""
                self.problems.append(
                    f"GPU {gpu}: {used:.1f} of {total:.1f} GiB are in use by other processes, "
                    f"{given}at most {most:.1f} may be"
                )
                break
            time.sleep(_LOOK_S)
        if code != 0:
            return False
        name = ctypes.create_string_buffer(96)  # NVML_DEVICE_NAME_V2_BUFFER_SIZE
        known = self._nvml.nvmlDeviceGetName(handle, name, len(name)) == 0
        kind: dict[str, Any] = {"name": name.value.decode() if known else "GPU", "memory_bytes": memory[0]}
        capability = ctypes.c_int(), ctypes.c_int()
        if self._nvml.nvmlDeviceGetCudaComputeCapability(handle, *map(ctypes.byref, capability)) == 0:
            kind["capability"] = [number.value for number in capability]
        self.kinds.append(kind)
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

    def _may_be_used(self, total_bytes: int) -> float:
        """Bytes of a GPU that others may have: what the engines leave."""
        return max(MIN_USED_BYTES, min(MAX_USED_SHARE, 1 - self._share) * total_bytes)
