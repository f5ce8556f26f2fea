"""Copies of a trainer's state in host memory, in buffers that every save uses again."""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.cuda import _pin_memory_utils
from torch.distributed._state_dict_utils import _copy_state_dict
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
    8 s every time. To touch and pin them takes longer than that, and a step beside it was longer by as much; so
    ``reserve`` is for when nobody trains yet, and huge pages are asked for, of which there are 512 times fewer.
    """

    def __init__(self) -> None:
        self._copies: dict[str, Any] | None = None
        self._reserving: threading.Thread | None = None

    def reserve(self, state: dict[str, Any]) -> None:
        """Begin to allocate the buffers, in a thread. Only the first call does anything."""
        if not self.is_reserved:
            self._copies = _allocate(state)
            arguments = ([*tensors_of(self._copies)],)
            self._reserving = threading.Thread(target=_pin_all, args=arguments, name="staging", daemon=True)
            self._reserving.start()

    @property
    def is_reserved(self) -> bool:
        """Whether ``reserve`` or ``copy`` has been called."""
        return self._copies is not None

    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state (of nested dictionaries) with its tensors on the CPU. Valid until the next call.

        The keys and the tensors' shapes must be those of the first call.
        """
        self.reserve(state)
        assert self._copies is not None and self._reserving is not None
        self._reserving.join()
        is_cuda = torch.cuda.is_available()
        copies = _copy_state_dict(state, self._copies, non_blocking=is_cuda, type_check=False)
        if is_cuda:
            torch.cuda.current_stream().synchronize()
        return copies


def _allocate(state: Any) -> Any:
    """The same with empty tensors on the CPU, of which nothing is touched."""
    if isinstance(state, dict):
        return {key: _allocate(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(_allocate, state))
    if isinstance(state, DTensor):
        # Torch's `_create_cpu_state_dict` copies all bytes first; `from_local` would move them to the mesh's device.
        return DTensor(_allocate(state._local_tensor), state._spec, requires_grad=False)
    if isinstance(state, torch.Tensor):
        return torch.empty(state.shape, dtype=state.dtype)
    return state


def _pin_all(tensors: Sequence[torch.Tensor]) -> None:
    """On a GPU's host touch all of them, and pin them."""
    for tensor in tensors:
        _ask_for_huge_pages(tensor)
        if torch.cuda.is_available():
            tensor.zero_()
            _pin(tensor)


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
