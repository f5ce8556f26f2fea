"""Copies of a trainer's state in host memory, in buffers that every save uses again."""

from __future__ import annotations

import ctypes
import logging
import mmap
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch.cuda import _pin_memory_utils
from torch.distributed._state_dict_utils import _copy_state_dict, _create_cpu_state_dict
from torch.distributed.tensor import DTensor

logger = logging.getLogger(__name__)
_PIN_FROM_BYTES = 1 << 20
"""Below it the copy's time is that of the call."""
_HUGE_PAGE = 2 << 20
"""Of x86, and of ARM with pages of 4 KiB; the kernel takes what parts of a range it can."""


class Staging:
    """What a save writes while the training goes on.

    It holds as much host memory as the state takes, from the first copy on. Where there is a GPU the buffers are
    pinned, so that the copy runs at the speed of the bus: 15 GB in 0.27 s on an H200, where into new memory it takes
    8 s every time. To allocate them in pages of 4 KiB takes 0.8 s a GB, by which a step beside it was longer; so
    ``reserve`` is for when nobody trains yet, and huge pages are asked for, of which there are 512 times fewer to
    touch and to pin.
    """

    def __init__(self) -> None:
        self._copies: dict[str, Any] | None = None
        self._reserving: Future[dict[str, Any]] | None = None

    def reserve(self, state: dict[str, Any]) -> None:
        """Begin to allocate the buffers, in a thread. Only the first call does anything."""
        if self._copies is None and self._reserving is None:
            pool = ThreadPoolExecutor(1, thread_name_prefix="staging")
            self._reserving = pool.submit(_allocate, state)
            pool.shutdown(wait=False)

    @property
    def is_reserved(self) -> bool:
        """Whether ``reserve`` or ``copy`` has been called."""
        return self._copies is not None or self._reserving is not None

    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state (of nested dictionaries) with its tensors on the CPU. Valid until the next call.

        The keys and the tensors' shapes must be those of the first call.
        """
        is_cuda = torch.cuda.is_available()
        if self._copies is None:
            reserving, self._reserving = self._reserving, None
            self._copies = _allocate(state) if reserving is None else reserving.result()
        copies = _copy_state_dict(state, self._copies, non_blocking=is_cuda, type_check=False)
        if is_cuda:
            torch.cuda.current_stream().synchronize()
        return copies


def _allocate(state: dict[str, Any]) -> dict[str, Any]:
    """Buffers for the state; on a GPU's host each is touched, and then pinned."""
    copies = _create_cpu_state_dict(state)
    for tensor in tensors_of(copies):
        _ask_for_huge_pages(tensor)
    if torch.cuda.is_available():
        for tensor in tensors_of(copies):
            tensor.zero_()
            _pin(tensor)
    return copies


def _ask_for_huge_pages(tensor: torch.Tensor) -> None:
    """Have the kernel back untouched memory by transparent huge pages, where it does so on request; else nothing."""
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    first = begin + -begin % _HUGE_PAGE
    if (num_bytes := (end - first) // _HUGE_PAGE * _HUGE_PAGE) > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(num_bytes), mmap.MADV_HUGEPAGE)


def _pin(tensor: torch.Tensor) -> None:
    """Page-lock the tensor's own bytes: PyTorch's allocator of pinned memory would round up to a power of two."""
    if tensor.nbytes < _PIN_FROM_BYTES:
        return
    try:
        _pin_memory_utils.pin_memory(tensor.data_ptr(), tensor.nbytes)
    except RuntimeError as error:  # the host's limit: slower, not wrong
        logger.warning("cannot pin %d bytes of host memory: %s", tensor.nbytes, error)
    else:
        unpin = weakref.finalize(tensor.untyped_storage(), _pin_memory_utils.unpin_memory, tensor.data_ptr())
        unpin.atexit = False  # CUDA may be gone by then


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """This rank's tensors in nested dictionaries, of DTensors the shards."""
    if isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, DTensor):
        yield from tensors_of(value.to_local())
    elif isinstance(value, torch.Tensor):
        yield value
