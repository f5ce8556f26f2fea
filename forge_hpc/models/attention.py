"""Attention that keeps the documents of a packed row apart.

A row holds several documents one after the other; ``positions`` restart at 0 with each. On CUDA TorchTitan's varlen
kernels do this. On the CPU, where varlen and flex do not train, ``DocumentAttention`` regroups the tokens of a
microbatch into small batches of documents of similar length and runs plain causal attention on each: no [T, T] mask,
and the cost is that of the documents, not of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torchtitan.models.common.attention import VarlenAttention, VarlenMetadata
from torchtitan.protocols.module import Module

from forge_hpc.models.context import ContextAttention, SharedRows, context_inputs
from forge_hpc.models.device import device_type, to_device

_SHORT_TOKENS = 32  # documents up to this length are batched together: padding them costs less than another kernel


class DocumentBatches(NamedTuple):
    """How the N = R * T tokens of a microbatch are regrouped; shared by all layers of a forward pass."""

    slots: torch.Tensor
    """[M] int64, M >= N: the token in each slot of all batches laid end to end; padding repeats a document's last."""
    token_slots: torch.Tensor
    """[N] int64: the slot of each token."""
    shapes: tuple[tuple[int, int], ...]
    """(documents, length) of each batch."""


def document_batches(positions: np.ndarray, device: torch.device) -> DocumentBatches:
    """Regroup packed rows by document.

    Args:
        positions: [R, T] int, restarting at 0 at each document; every row begins with 0.
    """
    flat = positions.reshape(-1)
    starts = np.flatnonzero(flat == 0)
    lengths = np.diff(np.append(starts, flat.size))
    order = np.argsort(-lengths, kind="stable")
    slots, shapes = [], []
    token_slots = np.empty(flat.size, dtype=np.int64)
    num_slots = 0
    while order.size:
        longest = lengths[order[0]]
        # Documents of at least half the longest share its batch, so padding never doubles the work.
        num = order.size if longest <= _SHORT_TOKENS else int(np.count_nonzero(2 * lengths[order] >= longest))
        batch, order = order[:num], order[num:]
        offsets = np.minimum(np.arange(longest), lengths[batch, None] - 1)
        tokens = starts[batch, None] + offsets
        real = np.arange(longest) < lengths[batch, None]
        token_slots[tokens[real]] = num_slots + np.flatnonzero(real)
        slots.append(tokens.reshape(-1))
        shapes.append((num, int(longest)))
        num_slots += tokens.size
    return DocumentBatches(to_device(np.concatenate(slots), device), to_device(token_slots, device), tuple(shapes))


class _ToSlots(torch.autograd.Function):
    """Tokens to slots. Padding slots come after their document, causal attention never reads them, so their gradient
    is zero and the backward pass is a gather too (a scatter with duplicates is slow on the CPU)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, slots: torch.Tensor, token_slots: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(token_slots)
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (token_slots,) = ctx.saved_tensors
        return grads[0].index_select(0, token_slots), None, None


class DocumentAttention(Module):
    """Causal attention within each document of packed rows, on any device and in any dtype."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        pass

    def __init__(self, config: Config) -> None:
        super().__init__()

    def forward(
        self,
        q_BLNH: torch.Tensor,
        k_BLNH: torch.Tensor,
        v_BLNH: torch.Tensor,
        *,
        attention_masks: DocumentBatches,
        scale: float | None = None,
        enable_gqa: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[R, T, heads, head_dim] to the same shape; key and value may have fewer heads (``enable_gqa``)."""
        batches = attention_masks
        q, k, v = (
            _ToSlots.apply(x.flatten(0, 1), batches.slots, batches.token_slots) for x in (q_BLNH, k_BLNH, v_BLNH)
        )
        repeats = q.shape[1] // k.shape[1] if enable_gqa else 1
        if repeats > 1:  # the CPU's fused kernel has no grouped queries
            k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
        sizes = [num * length for num, length in batches.shapes]
        outputs = []
        for shape, *qkv in zip(batches.shapes, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
            q_DNLH, k_DNLH, v_DNLH = (x.unflatten(0, shape).transpose(1, 2) for x in qkv)
            out = F.scaled_dot_product_attention(q_DNLH, k_DNLH, v_DNLH, is_causal=True, scale=scale)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, batches.token_slots).view(q_BLNH.shape)


def inner_attention_config(param_dtype: torch.dtype, context_parallel: int = 1) -> Module.Config:
    """varlen on CUDA in bfloat16 (its kernels know no float32), DocumentAttention elsewhere; ContextAttention, which
    takes kernels of either kind, where several ranks share a row."""
    knows_varlen = device_type() == "cuda" and param_dtype == torch.bfloat16
    if context_parallel > 1:
        return ContextAttention.Config(varlen=knows_varlen)
    return VarlenAttention.Config() if knows_varlen else DocumentAttention.Config()


def attention_inputs(
    config: Module.Config, positions: np.ndarray, device: torch.device, shared: SharedRows | None = None
) -> Any:
    """What the model's forward takes as ``attention_masks``: built once for all layers.

    Args:
        config: the inner attention's, from ``inner_attention_config``.
        positions: [R, T] int, restarting at 0 at each document.
        shared: this rank's share of the rows, where others hold the rest.
    """
    if isinstance(config, ContextAttention.Config):
        assert shared is not None
        return context_inputs(positions, shared, varlen=config.varlen)
    if isinstance(config, VarlenAttention.Config):
        # From the host's numbers: the GPU is not waited for.
        flat = positions.reshape(-1)
        bounds = np.append(np.flatnonzero(flat == 0), flat.size).astype(np.int32)
        longest = int(np.diff(bounds).max())
        offsets = to_device(bounds, device)
        return VarlenMetadata(offsets, offsets, longest, longest)
    return document_batches(positions, device)
