"""DPPO: divergence proximal policy optimization (https://arxiv.org/abs/2602.04879)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from forge_hpc.losses.base import log_ratio
from forge_hpc.losses.policy import PolicyLoss, Tokens


@dataclass(frozen=True)
class DPPOLoss(PolicyLoss):
    """PPO whose trust region is a bound on the probability that has moved, not on the ratio: a rare token may rise by
    more than a factor, and a likely one may not fall by as much as the ratio's clip allows.

        loss = mean( -M r A ),    M = 0 where A > 0 and pi - pi_old > clip_high, or A < 0 and pi_old - pi > clip_low

    |pi - pi_old| of the sampled token is the binary total variation (the paper's "Binary-TV"), a lower bound of that of
    the whole distribution.
    """

    clip_low: float = 0.15
    """A token may lose this much probability in a step."""
    clip_high: float = 0.15
    """A token may gain this much."""

    def term(self, x: Tokens) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        moved = (x.logprobs.exp() - x.old_logprobs.exp()).detach()
        is_out = torch.where(x.advantages > 0, moved > self.clip_high, -moved > self.clip_low)
        ratio = log_ratio(x.logprobs, x.old_logprobs).exp()
        term = torch.where(is_out, 0, -ratio * x.advantages)
        is_clipped = (is_out & (x.advantages != 0)).to(ratio.dtype)
        return term, {"ratio/mean": ratio, "ratio/clip_fraction": is_clipped}
