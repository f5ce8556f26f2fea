"""Memory that another process of this host reads where it lies: a memfd on the CPU, CUDA IPC on a GPU.

A handle is valid as long as its owner keeps the tensor and lives. Nothing here waits for anybody: who reads and who
writes when is the business of ``snapshots``.
"""

from __future__ import annotations

import secrets
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from forge_hpc.weights import shared_memory


class Unreachable(Exception):
    """The memory cannot be opened from here; nothing has been read."""


@dataclass(frozen=True)
class Handle:
    """How to find the memory; picklable."""

    host: str
    """As ``shared_memory.host_identity``; empty: nobody can open it."""
    device: str
    """``cpu`` or ``cuda``."""
    num_bytes: int
    where: Any
    """A path on the CPU, the arguments of ``rebuild_cuda_tensor`` on a GPU."""
    name: str = ""
    """By which the process that made it finds its own memory: CUDA opens none of the same process."""


_own: weakref.WeakValueDictionary[str, torch.Tensor] = weakref.WeakValueDictionary()


def allocate(num_bytes: int, device: torch.device) -> torch.Tensor | None:
    """Bytes [num_bytes] that can be shared; None where a GPU does not have them to spare."""
    if device.type == "cpu":
        return shared_memory.allocate(num_bytes)
    if num_bytes > _spare_bytes(device):
        return None
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return None


def _spare_bytes(device: torch.device) -> int:
    """What a GPU can give up: free, or cached and unused, less a twentieth of it all."""
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached - total // 20


def share(memory: torch.Tensor) -> Handle:
    """A handle of what ``allocate`` returned. Raises Unreachable: CUDA shares no memory between processes here."""
    host = shared_memory.host_identity()
    if memory.device.type == "cpu":
        return Handle(host, "cpu", memory.numel(), shared_memory.path_of(memory))
    from torch.multiprocessing.reductions import reduce_tensor

    try:
        _, arguments = reduce_tensor(memory)
    except RuntimeError as error:
        raise _unreachable(error) from error
    _own[name := secrets.token_hex(8)] = memory
    return Handle(host, "cuda", memory.numel(), arguments, name)


def out_of_reach(memory: torch.Tensor) -> Handle:
    """A handle of what cannot be shared: no process can open it."""
    return Handle("", memory.device.type, memory.numel(), None)


def is_within_reach(handle: Handle, device_type: str) -> bool:
    """Whether ``open_memory`` can succeed in a process that computes on ``device_type``."""
    return handle.host == shared_memory.host_identity() and handle.device == device_type


def open_memory(handle: Handle) -> torch.Tensor:
    """The bytes [num_bytes] behind a handle, without a copy; on the CPU writes to it stay in this process.

    On a GPU the memory may be another GPU's: it is read through the current device, over NVLink or PCIe. What the owner
    wrote is seen if the owner waited for its own writes before it handed the handle out.

    Raises:
        Unreachable: another host or device, IPC not available, no peer access, or the owner is gone.
    """
    try:
        if handle.device == "cpu":
            return shared_memory.map_path(handle.where, handle.num_bytes)
        if (own := _own.get(handle.name)) is not None:
            return own
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        arguments = list(handle.where)
        arguments[6] = torch.cuda.current_device()
        arguments[-1] = False  # no event to wait for
        return rebuild_cuda_tensor(*arguments)
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreachable(error) from error


def _unreachable(error: Exception) -> Unreachable:
    """With its first line: CUDA's go on with hints."""
    return Unreachable(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
