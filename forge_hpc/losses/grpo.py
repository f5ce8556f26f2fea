"""GRPO (https://arxiv.org/abs/2402.03300)."""

from __future__ import annotations

from dataclasses import dataclass

from forge_hpc.losses.ppo import PPOLoss


@dataclass(frozen=True)
class GRPOLoss(PPOLoss):
    """PPO's clipped surrogate with advantages from the group (``group_mean_std``) and a KL penalty in the loss:

        loss = mean( -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef KL(pi || pi_ref) - entropy_coef H )

    The mean is over tokens. The paper's is over sequences (``normalization="sequence"``), in which a token of a long
    answer counts less than one of a short answer.
    """
