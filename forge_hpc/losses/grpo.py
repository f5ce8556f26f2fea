"""GRPO (https://arxiv.org/abs/2402.03300) with token normalisation and asymmetric clips
(https://arxiv.org/abs/2503.14476)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from forge_hpc.losses.base import LossOutput, TokenMean, kl_k3, log_ratio


@dataclass(frozen=True)
class GRPOLoss:
    """Clipped policy gradient with group advantages.

    With r = pi(token) / pi_old(token) and the mean over all trained tokens of the step:

        loss = mean( -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef KL(pi || pi_ref) - entropy_coef H )
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    entropy_coef: float = 0.0

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
        mean = TokenMean(mask, normalizer)
        ratio = log_ratio(logprobs, old_logprobs).exp()
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        loss = mean(-torch.minimum(ratio * advantages, clipped * advantages))
        metrics = {
            "ratio/mean": mean(ratio.detach()),
            "ratio/clip_fraction": mean((clipped * advantages < ratio * advantages).float()),
        }
        if ref_logprobs is not None:
            kl = mean(kl_k3(logprobs, ref_logprobs))
            metrics["kl/mean"] = kl.detach()
            loss = loss + self.kl_coef * kl
        if entropy is not None and self.entropy_coef:
            loss = loss - self.entropy_coef * mean(entropy)
        return LossOutput(loss, metrics)
