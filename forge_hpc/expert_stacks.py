"""Stacks: the tensors of all experts of a layer as one, whose first dimension counts them.

That is how TorchTitan keeps what Hugging Face has a tensor each for, and FSDP and expert parallelism cut it by that
dimension. A sharded stack goes by a name with ``{}`` in it, such as ``model.layers.0.mlp.experts.{}.up_proj.weight``,
the same on all ranks; tensor i of it is called ``name.format(i)``.
"""

from __future__ import annotations

import torch

STACKED = "{}"
"""In the name of a tensor: it is a stack."""


def part_names(name: str, tensor: torch.Tensor) -> list[str]:
    """The names of the tensors that a named tensor stands for: its own, or those of a stack."""
    return [name.format(index) for index in range(tensor.shape[0])] if STACKED in name else [name]


def parts(name: str, whole: torch.Tensor) -> dict[str, torch.Tensor]:
    """Those tensors by name; of a stack views. ``whole``: not sharded."""
    return dict(zip(part_names(name, whole), whole if STACKED in name else [whole], strict=True))
