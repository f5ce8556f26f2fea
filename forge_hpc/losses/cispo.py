"""CISPO: clipped importance sampling (MiniMax-M1, https://arxiv.org/abs/2506.13585)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from forge_hpc.losses.reinforce import ReinforceLoss


@dataclass(frozen=True)
class CISPOLoss(ReinforceLoss):
    """REINFORCE with clipped importance weights: every token keeps its gradient, also where PPO would clip it away.

        loss = mean( -sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi(token) )

    The mean is over all tokens. The paper sets no lower bound (clip_low 1: r >= 0) and does not tell its upper one; r
    at most 5 is from the middle of what https://arxiv.org/abs/2510.13786 found to work.
    """

    advantage: ClassVar[str] = "group_mean_std"
    clip_low: float | None = 1.0
    clip_high: float | None = 4.0
