"""REINFORCE (Williams 1992, https://doi.org/10.1007/BF00992696)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from forge_hpc.losses.base import LossOutput, TokenMean, kl_k3


@dataclass(frozen=True)
class ReinforceLoss:
    """Plain policy gradient, for data of the current policy.

    With the mean over all trained tokens of the step:

        loss = mean( -A log pi(token) + kl_coef KL(pi || pi_ref) - entropy_coef H )
    """

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
        loss = mean(-advantages * logprobs)
        metrics = {}
        if ref_logprobs is not None:
            kl = mean(kl_k3(logprobs, ref_logprobs))
            metrics["kl/mean"] = kl.detach()
            loss = loss + self.kl_coef * kl
        if entropy is not None and self.entropy_coef:
            loss = loss - self.entropy_coef * mean(entropy)
        return LossOutput(loss, metrics)
