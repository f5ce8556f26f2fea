"""DAPO: decoupled clip and dynamic sampling (https://arxiv.org/abs/2503.14476)."""

from __future__ import annotations

from dataclasses import dataclass

from forge_hpc.losses.ppo import PPOLoss


@dataclass(frozen=True)
class DAPOLoss(PPOLoss):
    """The clipped surrogate with more room above, so that unlikely tokens can rise, as a mean over all tokens:

        loss = mean( -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) )        clip_low 0.2, clip_high 0.28, no KL

    The rest of DAPO is elsewhere. Advantages: ``group_mean_std``. Overlong shaping: the reward ``length``. Dynamic
    sampling: ``algorithm.drop_zero_signal_groups`` leaves groups without a signal out and ``groups/zero_signal`` counts
    them; unlike the paper's, it draws no further prompts in their place, so such a step trains on fewer groups.
    """

    clip_high: float = 0.28
