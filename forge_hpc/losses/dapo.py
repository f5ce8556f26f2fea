"""DAPO: decoupled clip and dynamic sampling (https://arxiv.org/abs/2503.14476)."""

from __future__ import annotations

from dataclasses import dataclass

from forge_hpc.losses.ppo import PPOLoss


@dataclass(frozen=True)
class DAPOLoss(PPOLoss):
    """The clipped surrogate with more room above, so that unlikely tokens can rise, as a mean over all tokens:

        loss = mean( -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) )        clip_low 0.2, clip_high 0.28, no KL

    The rest of DAPO is elsewhere. Advantages: ``group_mean_std``. Dynamic sampling: ``algorithm.dynamic_sampling``.
    Overlong shaping: the reward ``length``.
    """

    clip_high: float = 0.28
