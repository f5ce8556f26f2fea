"""What makes a trainer's model compute what vLLM's does, to the last bit (``model.batch_invariant``): attention by the
kernel that vLLM uses. Its matrix products are fixed as vLLM's are (``invariance``), its log-probabilities come from the
kernels of vLLM's sampler (``head``), and the other operations are replaced on vLLM's side (``generation.invariant``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.models.common.attention import VarlenMetadata
from torchtitan.protocols.module import Module


class InvariantAttention(Module):
    """Causal attention within each document of packed rows: forward by vLLM's FlashAttention 3, back by torch's 2."""

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
        attention_masks: VarlenMetadata,
        scale: float | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[R, T, heads, head_dim] to the same shape; key and value may have fewer heads."""
        q, k, v = (x.flatten(0, 1) for x in (q_BLNH, k_BLNH, v_BLNH))
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return _Attention.apply(q, k, v, attention_masks.cu_seq_q, attention_masks.max_q, scale).view(q_BLNH.shape)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int, scale: float
    ) -> torch.Tensor:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        out, log_sums = flash_attn_varlen_func(
            q, k, v, longest, bounds, longest, cu_seqlens_k=bounds, softmax_scale=scale, causal=True,
            return_softmax_lse=True, num_splits=1, fa_version=3,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, log_sums, bounds)
        ctx.longest, ctx.scale = longest, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, log_sums, bounds = ctx.saved_tensors
        nothing = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, of which there is none
        q_grad, k_grad, v_grad = torch.ops.aten._flash_attention_backward(
            grads[0].contiguous(), q, k, v, out, log_sums, bounds, bounds, ctx.longest, ctx.longest, 0.0, True,
            nothing, torch.empty(0, device=q.device), scale=ctx.scale,
        )  # fmt: skip
        return q_grad, k_grad, v_grad, None, None, None
