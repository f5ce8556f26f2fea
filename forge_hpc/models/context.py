"""Context parallelism: attention of rows that several ranks hold together, and their outputs put together again.

Each rank has its share of every row (``data.row_shares``). Keys and values travel: every rank gets those of all slots,
keeps those of documents that it has a piece of, and attends with its own queries; the gradients of keys and values go
back to the ranks that they came from, which add them up. That is one collective a layer each for keys and values in
both passes, and no rank ever holds more of anything else than its share.

TorchTitan 0.3.0 does the same with flex attention, and refuses packed rows of other kernels; here the kernels are those
of a row on one rank: varlen on CUDA, whose causal mask is that of the last key where a piece has fewer queries than
keys, and plain attention elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group
from torch.nn.attention import current_flash_attention_impl
from torch.nn.attention.varlen import varlen_attn
from torchtitan.models.common.attention import VarlenAttention, VarlenMetadata

from forge_hpc.data.row_shares import pieces, row_shares
from forge_hpc.models.device import to_device


class SharedRows(NamedTuple):
    """What a rank knows of the rows of a microbatch that it holds a share of: N of their C * N slots."""

    slots: np.ndarray
    """[N] int64: the slots that are its own, numbered through all rows."""
    places: np.ndarray
    """[C * N] int64: the place of each slot in what is gathered, rank by rank."""
    on_device: tuple[torch.Tensor, torch.Tensor]
    """The same two."""
    group: str
    """The name of the ranks' process group."""

    def own(self, rows: np.ndarray) -> np.ndarray:
        """[R, T / C] of rows [R, T]: this rank's slots."""
        return rows.reshape(-1)[self.slots].reshape(len(rows), -1)

    def whole(self, values: torch.Tensor) -> torch.Tensor:
        """[C * N] of all slots from [N] of this rank's, for what every rank then computes alike: the gradient of each
        rank's part is its own, and none is added up."""
        return _Whole.apply(values, self)


class ContextInputs(NamedTuple):
    """What a rank's attention needs to know, the same for all layers of a forward pass."""

    keys: torch.Tensor
    """[M] int64: where the keys of its pieces are in what is gathered."""
    group: str
    lengths: VarlenMetadata | tuple[tuple[int, int], ...]
    """Queries and keys of each piece: for varlen kernels, or in plain numbers."""


def shared_rows(positions: np.ndarray, group: dist.ProcessGroup, device: torch.device) -> SharedRows:
    """Cut rows for the ranks of a group. ``positions``: [R, T], restarting at 0 at each document."""
    shares = row_shares(positions, group.size())
    places = np.empty(positions.size, np.int64)
    places[shares.reshape(-1)] = np.arange(positions.size)
    slots = shares[group.rank()]
    on_device = to_device(slots, device), to_device(places, device)
    return SharedRows(slots, places, on_device, group.group_name)


def context_inputs(positions: np.ndarray, shared: SharedRows, *, varlen: bool) -> ContextInputs:
    """What the attention of this rank takes, for kernels that know varlen or for plain ones."""
    own, device = pieces(positions, shared.slots), shared.on_device[0].device
    keys = to_device(shared.places[own.keys], device)
    if not varlen:
        lengths = zip(own.num_queries.tolist(), own.num_keys.tolist(), strict=True)
        return ContextInputs(keys, shared.group, tuple(lengths))
    bounds = (np.append(0, np.cumsum(n)).astype(np.int32) for n in (own.num_queries, own.num_keys))
    cu_q, cu_k = (to_device(each, device) for each in bounds)
    longest_q, longest_k = int(own.num_queries.max()), int(own.num_keys.max())
    return ContextInputs(keys, shared.group, VarlenMetadata(cu_q, cu_k, longest_q, longest_k))


class ContextAttention(VarlenAttention):
    """Causal attention within each document of packed rows, of this rank's queries to the keys of all ranks."""

    @dataclass(kw_only=True, slots=True)
    class Config(VarlenAttention.Config):
        varlen: bool = False
        """Whether there are kernels for it here."""

    def forward(
        self,
        q_BLNH: torch.Tensor,
        k_BLNH: torch.Tensor,
        v_BLNH: torch.Tensor,
        *,
        attention_masks: ContextInputs,
        scale: float | None = None,
        enable_gqa: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[R, T / C, heads, head_dim] to the same shape; key and value may have fewer heads (``enable_gqa``)."""
        inputs = attention_masks
        q = q_BLNH.flatten(0, 1)
        k, v = (_gather(x.flatten(0, 1), inputs.keys, inputs.group) for x in (k_BLNH, v_BLNH))
        attend = _varlen if isinstance(inputs.lengths, VarlenMetadata) else _plain
        return attend(q, k, v, inputs.lengths, scale, enable_gqa).view(q_BLNH.shape)


def _varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Any, scale: float | None, enable_gqa: bool
) -> torch.Tensor:
    # As TorchTitan's VarlenAttention calls it: FlashAttention 2 has to be told the number of splits.
    splits = {"num_splits": 1} if current_flash_attention_impl() in (None, "FA2") else {}
    q_, k_, v_ = (x.to(torch.bfloat16) for x in (q, k, v))
    causal: Any = {"window_size": (-1, 0), "scale": scale, "enable_gqa": enable_gqa, **splits}
    bounds = lengths.cu_seq_q, lengths.cu_seq_k, lengths.max_q, lengths.max_k
    return varlen_attn(q_, k_, v_, *bounds, **causal).to(q.dtype)  # type: ignore[union-attr]


def _plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Any, scale: float | None, enable_gqa: bool
) -> torch.Tensor:
    repeats = q.shape[1] // k.shape[1] if enable_gqa else 1
    if repeats > 1:  # the CPU's fused kernel has no grouped queries
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    num_queries, num_keys = (list(numbers) for numbers in zip(*lengths, strict=True))
    outputs = []
    for piece in zip(q.split(num_queries), k.split(num_keys), v.split(num_keys), strict=True):
        q_NLH, k_NLH, v_NLH = (x.transpose(0, 1) for x in piece)
        before = k_NLH.shape[1] - q_NLH.shape[1]
        mask = torch.ones(q_NLH.shape[1], k_NLH.shape[1], dtype=torch.bool, device=q.device).tril(before)
        out = F.scaled_dot_product_attention(q_NLH[None], k_NLH[None], v_NLH[None], attn_mask=mask, scale=scale)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


# ---- collectives; those of layers are operators, which torch.compile leaves as they are


@torch.library.custom_op("forge_hpc::gather_keys", mutates_args=())
def _gather(x: torch.Tensor, keys: torch.Tensor, group: str) -> torch.Tensor:
    """[M, …] from the [N, …] of each rank: what is at ``keys`` [M] of all of it."""
    return _all_gather(x, _resolve_process_group(GroupName(group))).index_select(0, keys)


@_gather.register_fake
def _(x: torch.Tensor, keys: torch.Tensor, group: str) -> torch.Tensor:
    return x.new_empty(keys.shape[0], *x.shape[1:])


@torch.library.custom_op("forge_hpc::gather_keys_backward", mutates_args=())
def _gather_backward(grad: torch.Tensor, keys: torch.Tensor, num_own: int, group: str) -> torch.Tensor:
    """[N, …]: the sum over all ranks and pieces of the gradients of this rank's keys."""
    ranks = _resolve_process_group(GroupName(group))
    # A slot is a key of at most two pieces of a rank, and the sum of two does not depend on their order.
    whole = grad.new_zeros(ranks.size() * num_own, *grad.shape[1:]).index_add_(0, keys, grad)
    own = grad.new_empty(num_own, *grad.shape[1:])
    dist.reduce_scatter_single(own, whole, group=ranks)
    return own


@_gather_backward.register_fake
def _(grad: torch.Tensor, keys: torch.Tensor, num_own: int, group: str) -> torch.Tensor:
    return grad.new_empty(num_own, *grad.shape[1:])


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    x, keys, ctx.group = inputs
    ctx.num_own = x.shape[0]
    ctx.save_for_backward(keys)


def _to_owners(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return _gather_backward(grad.contiguous(), *ctx.saved_tensors, ctx.num_own, ctx.group), None, None


_gather.register_autograd(_to_owners, setup_context=_remember)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, shared: SharedRows) -> torch.Tensor:
        slots, places = shared.on_device
        ctx.save_for_backward(slots)
        return _all_gather(values, _resolve_process_group(GroupName(shared.group))).index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (slots,) = ctx.saved_tensors
        return grads[0].index_select(0, slots), None


def _all_gather(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    whole = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    dist.all_gather_single(whole, x.contiguous(), group=group)
    return whole
