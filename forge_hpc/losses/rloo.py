"""RLOO: REINFORCE with a leave-one-out baseline (https://arxiv.org/abs/2402.14740)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from forge_hpc.losses.policy import PolicyLoss, Tokens


@dataclass(frozen=True, kw_only=True)
class RLOOLoss(PolicyLoss):
    """REINFORCE in which the whole answer is one action: its log-probability is the sum over its tokens.

        loss = 1/N sum_i 1/max_tokens sum_t -A_i log pi(o_it)

    The other half is the advantage: ``leave_one_out``. There is no 1/max_tokens in the paper (here: 1); it scales
    the loss and nothing else. The paper puts the KL into the reward; here it is a penalty in the loss.
    """

    advantage: ClassVar[str] = "leave_one_out"
    normalization: str = "constant"

    def term(self, x: Tokens) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return -x.advantages * x.logprobs, {}
