"""Dr. GRPO: GRPO done right (https://arxiv.org/abs/2503.20783)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from forge_hpc.losses.ppo import PPOLoss


@dataclass(frozen=True, kw_only=True)
class DrGRPOLoss(PPOLoss):
    """GRPO without its two biases: no division by a sequence's length, and none by the group's standard deviation.

        loss = 1/N sum_i 1/max_tokens sum_t -min(r_it A_i, clip(r_it, 1 - clip_low, 1 + clip_high) A_i)

    The second half is the advantage: ``group_mean``. The paper's formula has no 1/max_tokens (here: 1), its code
    the token budget; it scales the loss and nothing else.
    """

    advantage: ClassVar[str] = "group_mean"
    normalization: str = "constant"
