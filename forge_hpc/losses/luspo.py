"""LUSPO: length-unbiased sequence policy optimization (https://arxiv.org/abs/2602.05261)."""

from __future__ import annotations

from dataclasses import dataclass

from forge_hpc.losses.gspo import GSPOLoss


@dataclass(frozen=True, kw_only=True)
class LUSPOLoss(GSPOLoss):
    """GSPO with each sequence weighted by its length, which takes away the pull towards short answers:

        loss = 1/N sum_i |o_i| / max_tokens -min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i)

    with GSPO's s_i. There is no 1/max_tokens in the paper (here: 1); it scales the loss and nothing else.
    """

    normalization: str = "constant"
