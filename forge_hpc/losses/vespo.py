"""VESPO: variational sequence-level soft policy optimization (https://arxiv.org/abs/2602.10693)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from forge_hpc.losses.base import MAX_LOG_RATIO, log_ratio
from forge_hpc.losses.policy import PolicyLoss, Tokens

_MIN_LOG = math.log(1e-8)


@dataclass(frozen=True, kw_only=True)
class VESPOLoss(PolicyLoss):
    """REINFORCE with a smooth weight by the importance of the whole sequence, which falls on both sides of 1:

        w_i  = prod_t pi(o_it) / pi_old(o_it)
        f(w) = w^k exp(lambda (1 - w)),    f(1) = 1
        loss = mean( -sg(f(w_i)) A_i log pi(o_it) )

    with k and lambda by the advantage's sign. The mean is over all tokens. Long sequences have weights far from 1 where
    generator and trainer differ by little a token: it is for samples that are old, or trained on more than once.
    """

    k_pos: float = 2.0
    """k where A >= 0."""
    lambda_pos: float = 3.0
    """lambda where A >= 0: the larger, the faster the weight falls above 1."""
    k_neg: float = 3.0
    """k where A < 0: the larger, the faster the weight falls below 1."""
    lambda_neg: float = 2.0
    """lambda where A < 0."""

    def term(self, x: Tokens) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        ratios = log_ratio(x.logprobs, x.old_logprobs).detach()
        log_w = x.sequences.total(ratios).clamp(_MIN_LOG, MAX_LOG_RATIO)
        is_pos = x.advantages >= 0
        k = torch.full_like(log_w, self.k_neg).masked_fill(is_pos, self.k_pos)
        lam = torch.full_like(log_w, self.lambda_neg).masked_fill(is_pos, self.lambda_pos)
        weight = (k * log_w + lam * (1 - log_w.exp())).exp()
        return -weight * x.advantages * x.logprobs, {"ratio/mean": log_w.exp(), "ratio/weight_mean": weight}
