"""PPO's clipped surrogate (https://arxiv.org/abs/1707.06347), for advantages that are given."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from forge_hpc.losses.base import log_ratio
from forge_hpc.losses.policy import PolicyLoss, Tokens


@dataclass(frozen=True)
class PPOLoss(PolicyLoss):
    """Policy gradient inside a trust region. With r = pi(token) / pi_old(token), over all trained tokens of the step:

        loss = mean( -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) )

    There is no critic here: the advantage of a token is that of its sequence. ``dual_clip`` bounds what a bad token can
    cost (dual-clip PPO, https://arxiv.org/abs/1912.09729; the two-sided clip of https://arxiv.org/abs/2505.07291):

        loss = mean( -min(min(r, dual_clip) A, clip(r, 1 - clip_low, 1 + clip_high) A) )
    """

    clip_low: float = 0.2
    """The ratio is clipped from below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped from above at 1 + clip_high."""
    dual_clip: float | None = None
    """Where A < 0, which clip_high does not hold, the ratio is clipped at this, usually 3; None: not at all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            raise ValueError(f"dual_clip is {self.dual_clip}, it must be above 1 + clip_high = {1 + self.clip_high}")

    def term(self, x: Tokens) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        ratio = log_ratio(x.logprobs, x.old_logprobs).exp()
        return clipped_surrogate(ratio, x.advantages, self.clip_low, self.clip_high, self.dual_clip)


def clipped_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-min(r A, clip(r) A) per token, and how often the clipped side is the smaller one: those have no gradient."""
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    capped = ratio if dual_clip is None else ratio.clamp(max=dual_clip)
    term = -torch.minimum(capped * advantages, clipped * advantages)
    is_clipped = (clipped * advantages < ratio * advantages) | ((capped < ratio) & (advantages < 0))
    return term, {"ratio/mean": ratio, "ratio/clip_fraction": is_clipped.float()}
