"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685) by TorchTitan's converter, merged wherever weights leave.

A linear layer computes W x + (alpha / rank) B A x with W frozen: A [rank, in] random, B [out, rank] zero at first. The
generators and the export know nothing of it: they get W + (alpha / rank) B A.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torchtitan.components.checkpointer.utils import canonical_fqn
from torchtitan.components.lora import LoRAConverter

from forge_hpc.config.schema import LoRAConfig
from forge_hpc.models.spec import ModelSpec
from forge_hpc.training.accumulation import forget_passes

_A, _B = ".lora_a.weight", ".lora_b.weight"
_SCALING = "_lora_scaling"
"""alpha / rank, as an attribute of torchtitan 0.3.0's layers."""


def add_adapters(spec: ModelSpec, lora: LoRAConfig) -> ModelSpec:
    """The model with adapters beside its linear layers; all else is frozen."""
    converter = LoRAConverter.Config(rank=lora.rank, alpha=lora.alpha, target_modules=list(lora.target_modules))
    return dataclasses.replace(spec, config=LoRAConverter(converter).convert(spec.config))


@torch.no_grad()
def init_adapters(model: nn.Module, seed: int) -> None:
    """Draw every A from the seed and its name, the same values on any number of ranks, however sharded; every B is 0.

    On the CPU torch 2.13 draws each shard of a DTensor by itself, so that they would depend on the ranks.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(_B):
            parameter.zero_()
        if name.endswith(_A):
            digest = hashlib.sha256(f"{seed}/{canonical_fqn(name)}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            values = torch.empty(parameter.shape)
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
            _local(parameter).copy_(values[_local_slices(parameter)])


class Bench:
    """Sets of adapters that take turns in one model, on one frozen base: one is in place, copies of the others wait.

    The parameters stay what they are, so that each set has an optimizer of its own over the same ones. Adapters are
    copied when another set's turn begins: some MB. Gradients are not: every optimizer step begins with none.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._placed: object = None
        self._aside: dict[object, list[torch.Tensor]] = {}

    @torch.no_grad()
    def place(self, owner: object, lora: LoRAConfig) -> None:
        """Put the set of ``owner`` into the model; one that was never there begins with what it finds."""
        if self._placed is owner:
            return
        forget_passes(self._model)  # what it has gathered of the adapters is the others'
        trained = [_local(parameter) for parameter in self._model.parameters() if parameter.requires_grad]
        if self._placed is not None:
            self._aside[self._placed] = [tensor.clone() for tensor in trained]
        for tensor, own in zip(trained, self._aside.pop(owner, trained), strict=True):
            if own is not tensor:
                tensor.copy_(own)
        self._placed = owner
        for module in self._model.modules():
            if hasattr(module, _SCALING):
                setattr(module, _SCALING, lora.alpha / lora.rank)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """In the body every linear layer computes W x. The adapters are scaled by 0, as they are before the first step."""
    layers = [module for module in model.modules() if hasattr(module, _SCALING)]
    before = [getattr(layer, _SCALING) for layer in layers]
    try:
        for layer in layers:
            setattr(layer, _SCALING, 0.0)
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            setattr(layer, _SCALING, scaling)


@torch.no_grad()
def merge_adapters(
    state: Mapping[str, torch.Tensor], lora: LoRAConfig, *, in_place: bool = False
) -> dict[str, torch.Tensor]:
    """A model's state dict as if it had been trained without adapters. A collective call; computed in float32.

    Args:
        in_place: overwrite the weights, which then need no second place in memory.

    Returns:
        Every weight W with an adapter replaced by W + (alpha / rank) B A, sharded as W; all others as they are.
    """
    merged = {name: tensor for name, tensor in state.items() if not name.endswith((_A, _B))}
    for prefix, (a, b) in adapters_of(state).items():
        a, b, weight = whole(a), whole(b), merged[f"{prefix}.weight"]
        rows, columns = _local_slices(weight)
        local = _local(weight)
        update = b[rows].float() @ a[:, columns].float()
        result = (local.float() + lora.alpha / lora.rank * update).to(weight.dtype)
        if in_place:
            local.copy_(result)
            continue
        if isinstance(weight, DTensor):
            result = DTensor.from_local(
                result, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
            )
        merged[f"{prefix}.weight"] = result
    return merged


def adapters_of(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A [rank, in] and B [out, rank] of each linear layer that has them, by the layer's name in TorchTitan."""
    return {
        prefix: (a, state[prefix + _B])
        for name, a in state.items()
        if name.endswith(_A) and (prefix := name.removesuffix(_A))
    }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of it, on every rank. A collective call where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of it that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_slices(tensor: torch.Tensor) -> tuple[slice, ...]:
    """Which part of the whole tensor this rank holds."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
