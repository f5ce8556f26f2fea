"""vLLM's loading of weights, written down once and repeated as plain copies.

What ``load_weights`` of a model does is decided by names and shapes alone: which part of which tensor goes to which
part of which parameter. For a small model finding that out takes longer than the copies. So the first load is watched,
and if it has done nothing but copy, the next ones are one call for all copies, straight out of the trainers' shards:
a tensor that FSDP has cut need not be put together first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from forge_hpc.weights.snapshots import Opened

_WRITES_PADDING = {"aten::fill_", "aten::zero_"}
"""What they write does not depend on the weights, and is repeated with them: an engine that has slept has lost it."""


@dataclass(frozen=True)
class _Copy:
    """A box of a full tensor, and where it goes."""

    name: str
    start: tuple[int, ...]
    target: torch.Tensor


class Recorder(TorchDispatchMode):
    """Watches how a model loads full tensors; ``tensors`` is what it is to load from.

    Example:
        >>> with Recorder(model) as recorder:
        ...     model.load_weights(recorder.tensors(pairs))
        >>> copies = recorder.copies()  # None: it did more than copy
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._own = _storages(model)
        self._copies: list[_Copy] | None = []
        self._current: tuple[str, torch.Tensor] | None = None
        self.padding: list[tuple[torch.Tensor, Any]] = []
        """What was filled, and with what."""

    def tensors(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors, each remembered while the model loads it."""
        pairs = iter(named_tensors)
        while True:
            self._current = None  # the next may have to be put together first
            if (pair := next(pairs, None)) is None:
                return
            self._current = pair
            yield pair

    def copies(self) -> list[_Copy] | None:
        """What was done; None where that was not copies alone."""
        return self._copies if self._own == _storages(self._model) else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in _WRITES_PADDING and self._is_own(args):
            if args[0].numel():
                self.padding.append((args[0].detach(), args[1] if len(args) > 1 else 0))
        elif func._schema.is_mutable and self._is_own(args):
            copy = self._copy(args[0], args[1]) if name == "aten::copy_" else None
            if copy is None:
                self._copies = None
            elif self._copies is not None:
                self._copies.append(copy)
        return func(*args, **(kwargs or {}))

    def _is_own(self, args: Any) -> bool:
        is_tensor = bool(args) and isinstance(args[0], torch.Tensor)
        return not is_tensor or args[0].untyped_storage().data_ptr() in self._own

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> _Copy | None:
        if self._current is None or target.shape != source.shape:
            return None
        name, whole = self._current
        start = _place(source, whole)
        return None if start is None else _Copy(name, start, target.detach())


def _place(part: torch.Tensor, whole: torch.Tensor) -> tuple[int, ...] | None:
    """The first index of ``part`` in the contiguous ``whole``; None where it is no box of it."""
    same_layout = part.dim() == whole.dim() and all(
        size == 1 or a == b for size, a, b in zip(part.shape, part.stride(), whole.stride(), strict=True)
    )
    offset, rest = divmod(part.data_ptr() - whole.data_ptr(), whole.itemsize)
    is_inside = not rest and 0 <= offset < whole.numel()
    if not (is_inside and same_layout and whole.is_contiguous() and part.dtype == whole.dtype):
        return None
    start = []
    for stride in whole.stride():
        index, offset = divmod(offset, stride)
        start.append(index)
    fits = all(a + n <= size for a, n, size in zip(start, part.shape, whole.shape, strict=True))
    return tuple(start) if fits else None


class Replay:
    """The copies of a load, for weights that lie as those did which were watched.

    Args:
        copies, padding: a ``Recorder``'s.
        layout: of the places that were loaded from.
    """

    def __init__(
        self,
        model: nn.Module,
        copies: list[_Copy],
        padding: list[tuple[torch.Tensor, Any]],
        layout: bytes,
    ) -> None:
        self._places, self._layout = _places(model), layout
        self._copies, self._padding = copies, padding
        self._pairs: list[tuple[torch.Tensor, int, int, tuple[int, ...], tuple[int, ...]]] | None = None

    def fits(self, model: nn.Module, layout: bytes) -> bool:
        """Whether the parameters and the weights are still where they were."""
        return self._layout == layout and self._places == _places(model)

    def load(self, weights: Opened, dtype: torch.dtype) -> None:
        """Write everything. ``dtype`` is that of the weights where they were watched."""
        if self._pairs is None:
            self._pairs = [pair for copy in self._copies for pair in _pairs(copy, weights)]
        blocks = [data.view(dtype) for data in weights.data]
        sources = [
            blocks[rank].as_strided(shape, stride, start // dtype.itemsize)
            for _, rank, start, shape, stride in self._pairs
        ]
        for target, value in self._padding:
            target.fill_(value)
        torch._foreach_copy_([target for target, *_ in self._pairs], sources)


def _pairs(copy: _Copy, weights: Opened) -> Iterator[tuple[torch.Tensor, int, int, tuple[int, ...], tuple[int, ...]]]:
    """For each shard that a copy touches: the part of the target, rank, first byte, shape and strides in its block."""
    for rank, start_bytes, shard in weights.shards(copy.name):
        low = [max(a, b) for a, b in zip(copy.start, shard.offsets, strict=True)]
        high = [
            min(a + n, b + m)
            for a, n, b, m in zip(copy.start, copy.target.shape, shard.offsets, shard.shape, strict=True)
        ]
        shape = tuple(last - first for first, last in zip(low, high, strict=True))
        if any(size <= 0 for size in shape):
            continue
        strides = tuple(math.prod(shard.shape[dim + 1 :]) for dim in range(len(shard.shape)))
        skipped = sum((a - b) * n for a, b, n in zip(low, shard.offsets, strides, strict=True))
        box = tuple(slice(first - a, last - a) for first, last, a in zip(low, high, copy.start, strict=True))
        yield copy.target[box], rank, start_bytes + skipped * shard.dtype.itemsize, shape, strides


def _places(model: nn.Module) -> tuple[int, ...]:
    return tuple(parameter.data_ptr() for parameter in model.parameters())


def _storages(model: nn.Module) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
