"""Supervised fine-tuning: negative log-likelihood of the trained tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from forge_hpc.losses.base import LossOutput, TokenMean


@dataclass(frozen=True)
class SFTLoss:
    """loss = mean( -log pi(token) ) over all trained tokens of the step, in nats."""

    def __call__(
        self,
        *,
        logprobs: torch.Tensor,
        old_logprobs: torch.Tensor,
        advantages: torch.Tensor,
        mask: torch.Tensor,
        generator_logprobs: torch.Tensor | None = None,
        ref_logprobs: torch.Tensor | None = None,
        entropy: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        normalizer: float | torch.Tensor | None = None,
    ) -> LossOutput:
        return LossOutput(TokenMean(mask, normalizer)(-logprobs))
