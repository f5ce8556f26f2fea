"""vLLM's operations as the trainer has them: norms, rotations, and attention that adds up alike for one query and for
many (``model.batch_invariant``).

vLLM 0.32's own batch-invariant mode has its own kernels for norms and for all matrix products, which no trainer
computes with, and its rotation knows cosines in bfloat16 alone. Here vLLM's classes are replaced through its
registries, in the process that builds the engine, before it does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def replace_operations() -> None:
    """Have engines of this process built from the operations of this module. Harmless when repeated."""
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.rotary_embedding import Llama3RotaryEmbedding, RotaryEmbedding
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if RMSNorm.__name__ in op_registry_oot:
        return
    RMSNorm.register_oot(_norm_class(RMSNorm))
    for base in (RotaryEmbedding, Llama3RotaryEmbedding):
        base.register_oot(_rotation_class(base))
    if torch.cuda.is_available():
        register_backend(AttentionBackendEnum.FLASH_ATTN, "forge_hpc.generation.invariant_attention.Backend")


def _norm_class(base: Any) -> Any:
    class Norm(base):
        """torch's own norm, after the sum of the residual stream has been rounded."""

        def forward_native(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
            if residual is not None:
                x = residual = x + residual
            normed = F.rms_norm(x, (x.shape[-1],), self.weight, self.variance_epsilon)
            return normed if residual is None else (normed, residual)

        forward_cuda = forward_cpu = forward_native

    return Norm


def _rotation_class(base: Any) -> Any:
    class Rotation(base):
        """Cosines and sines in float32, multiplied in float32: TorchTitan's ``CosSinRoPE``."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            if not self.is_neox_style or self.rotary_dim != self.head_size:
                raise ValueError("model.batch_invariant knows rotations of the whole head, by halves")

        def _compute_cos_sin_cache(self) -> torch.Tensor:
            angles = torch.outer(torch.arange(self.max_position_embeddings).float(), self._compute_inv_freq(self.base))
            angles = torch.cat([angles, angles], -1)
            self.register_buffer("cosines", angles.cos(), persistent=False)
            self.register_buffer("sines", angles.sin(), persistent=False)
            return torch.empty(0)

        def forward_native(self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None) -> Any:
            cos, sin = (x.index_select(0, positions.flatten())[:, None] for x in (self.cosines, self.sines))

            def rotate(x: torch.Tensor) -> torch.Tensor:
                by_head = x.view(len(cos), -1, self.head_size).float()
                first, second = by_head.chunk(2, -1)
                return (by_head * cos + torch.cat((-second, first), -1) * sin).to(x.dtype).view(x.shape)

            return rotate(query), None if key is None else rotate(key)

        forward_cuda = forward_cpu = forward_native

    return Rotation
