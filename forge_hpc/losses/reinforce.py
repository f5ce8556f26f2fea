"""REINFORCE (Williams 1992, https://doi.org/10.1007/BF00992696), with an importance weight on request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from forge_hpc.losses.base import log_ratio
from forge_hpc.losses.policy import PolicyLoss, Tokens


@dataclass(frozen=True)
class ReinforceLoss(PolicyLoss):
    """Plain policy gradient, for data of the current policy. Over all trained tokens of the step:

        loss = mean( -A log pi(token) )

    With a clip each token is weighted by its ratio r = pi / pi_old, kept in bounds and without gradient:

        loss = mean( -sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi(token) )

    Unlike PPO's clip, which takes the gradient away from tokens outside, this one only limits their weight.
    """

    advantage: ClassVar[str] = "group_mean_batch_std"
    clip_low: float | None = None
    """The ratio is at least 1 - clip_low; None: no lower bound where clip_high is given."""
    clip_high: float | None = None
    """The ratio is at most 1 + clip_high; None: no upper bound where clip_low is given."""

    def term(self, x: Tokens) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        term = -x.advantages * x.logprobs
        if self.clip_low is None and self.clip_high is None:
            return term, {}
        ratio = log_ratio(x.logprobs, x.old_logprobs).exp().detach()
        low = 0.0 if self.clip_low is None else 1 - self.clip_low
        high = None if self.clip_high is None else 1 + self.clip_high
        clipped = ratio.clamp(low, high)
        return clipped * term, {"ratio/mean": ratio, "ratio/clip_fraction": (clipped != ratio).float()}
