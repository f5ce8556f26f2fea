"""GSPO: group sequence policy optimization (https://arxiv.org/abs/2507.18071)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from forge_hpc.losses.base import log_ratio
from forge_hpc.losses.policy import PolicyLoss, Tokens
from forge_hpc.losses.ppo import clipped_surrogate


@dataclass(frozen=True, kw_only=True)
class GSPOLoss(PolicyLoss):
    """The clipped surrogate with one ratio for a whole sequence, in the geometric mean over its trained tokens:

        s_i  = exp( 1/|o_i| sum_t log pi(o_it) / pi_old(o_it) )
        loss = 1/N sum_i -min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i)

    Means of ratios lie close to 1, hence the narrow clips (the paper's). The advantage must be that of the sequence.
    """

    clip_low: float = 3e-4
    """The ratio is clipped from below at 1 - clip_low."""
    clip_high: float = 4e-4
    """The ratio is clipped from above at 1 + clip_high."""
    normalization: str = "sequence"

    def term(self, x: Tokens) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mean = x.sequences.mean(x.logprobs - x.old_logprobs)
        ratio = log_ratio(mean, torch.zeros_like(mean)).exp()
        return clipped_surrogate(ratio, x.advantages, self.clip_low, self.clip_high)
