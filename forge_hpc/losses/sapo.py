"""SAPO: soft adaptive policy optimization (https://arxiv.org/abs/2511.20347)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from forge_hpc.losses.base import log_ratio
from forge_hpc.losses.policy import PolicyLoss, Tokens


@dataclass(frozen=True, kw_only=True)
class SAPOLoss(PolicyLoss):
    """A smooth gate in place of the clip: the further a token's ratio is from 1, the weaker its gradient.

        loss = 1/N sum_i 1/|o_i| sum_t -f(r_it) A_i,        f(r) = 4/tau sigmoid(tau (r - 1))

    with tau = tau_pos where A > 0, tau_neg elsewhere. f'(1) = 1, so on-policy the gradient is that of GRPO.
    """

    tau_pos: float = 1.0
    """Temperature for positive advantages: the higher, the narrower the gate."""
    tau_neg: float = 1.05
    """Temperature for negative advantages, a little higher since they are what makes training unstable."""
    normalization: str = "sequence"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.tau_pos > 0 and self.tau_neg > 0):
            raise ValueError(f"tau_pos and tau_neg must be above 0, they are {self.tau_pos} and {self.tau_neg}")

    def term(self, x: Tokens) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        ratio = log_ratio(x.logprobs, x.old_logprobs).exp()
        tau = torch.full_like(x.advantages, self.tau_neg).masked_fill(x.advantages > 0, self.tau_pos)
        gate = torch.sigmoid(tau * (ratio - 1)) * 4 / tau
        return -gate * x.advantages, {"ratio/mean": ratio}
