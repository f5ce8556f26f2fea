"""Buckets that processes of one host share instead of sending.

A bucket lies in a memfd: memory with a file descriptor and no name. The message to the other process carries only
``/proc/PID/fd/FD``; the receiver opens and maps it while the sender still holds it. There is nothing to clean up: the
kernel frees the memory when the last process that maps it ends, however it ends. Only processes of the same user can
open it, and the size of /dev/shm does not matter.
"""

from __future__ import annotations

import functools
import mmap
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from forge_hpc.weights.compat import TransportBuffer

# The open descriptor of each tensor that `allocate` or `_map` made in this process; closed when its mapping ends.
_descriptors = WeakTensorKeyDictionary()


@functools.cache
def host_identity() -> str:
    """Equal in two processes if and only if one can map the other's memory: same kernel, host name, namespaces, user.

    The host name keeps emulated hosts on one kernel apart.
    """
    if sys.platform != "linux":
        return f"unshared-{os.getpid()}"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespaces = [str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in ("pid", "user")]
    return ":".join([boot, os.uname().nodename, *namespaces, str(os.getuid())])


def allocate(num_bytes: int) -> torch.Tensor:
    """A zeroed uint8 tensor [num_bytes] that other processes of this host can map."""
    descriptor = os.memfd_create("forge_hpc_weights", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, num_bytes)
    return _map(descriptor, num_bytes, mmap.ACCESS_WRITE)


def path_of(tensor: torch.Tensor) -> str:
    """Where other processes of this host find a tensor of ``allocate``, as long as it lives."""
    return f"/proc/{os.getpid()}/fd/{_descriptors[tensor]}"


def map_path(path: str, num_bytes: int) -> torch.Tensor:
    """Map what another process allocated; writes to it stay in this process (copy on write). Raises OSError."""
    return _map(os.open(path, os.O_RDWR | os.O_CLOEXEC), num_bytes, mmap.ACCESS_COPY)


def _map(descriptor: int, num_bytes: int, access: int) -> torch.Tensor:
    mapping = mmap.mmap(descriptor, num_bytes, access=access)
    weakref.finalize(mapping, os.close, descriptor)
    tensor = torch.frombuffer(mapping, dtype=torch.uint8)  # holds the mapping
    _descriptors[tensor] = descriptor
    return tensor


class SharedMemoryBuffer(TransportBuffer):
    """TorchStore's transport between processes of one host.

    A tensor that is not shared memory (it came to the volume from another host) travels in the message.
    """

    def __init__(self) -> None:
        self.path: str | None = None
        self.num_bytes = 0
        self.tensor: torch.Tensor | None = None

    def allocate(self, tensor_like: Any) -> None:
        """Nothing to prepare: the sender's memory is used as it is."""

    async def write_from(self, tensor: torch.Tensor | None) -> None:
        """Offer a tensor to the other side."""
        descriptor = None if tensor is None else _descriptors.get(tensor)
        if tensor is None or descriptor is None:
            self.tensor = tensor
        else:
            self.path, self.num_bytes = f"/proc/{os.getpid()}/fd/{descriptor}", tensor.numel()

    async def read_into(self, tensor: torch.Tensor | None = None) -> torch.Tensor | None:
        """Map what the other side offers; writes to it stay in this process (copy on write)."""
        assert tensor is None, "buckets are never read in place"
        if self.path is None:
            return self.tensor
        return map_path(self.path, self.num_bytes)

    def update(self, other_buffer: TransportBuffer) -> None:
        """Take over what the volume answered."""
        super().update(other_buffer)
        assert isinstance(other_buffer, SharedMemoryBuffer)
        self.path, self.num_bytes, self.tensor = other_buffer.path, other_buffer.num_bytes, other_buffer.tensor
