"""GMPO: geometric-mean policy optimization (https://arxiv.org/abs/2507.20673)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from forge_hpc.losses.base import log_ratio
from forge_hpc.losses.policy import PolicyLoss, Tokens


@dataclass(frozen=True, kw_only=True)
class GMPOLoss(PolicyLoss):
    """The geometric mean of the clipped ratios of a sequence in place of their arithmetic one: outliers count less.

        l_it = log pi(o_it) / pi_old(o_it), at most log_clip where A_i > 0, at least -log_clip where A_i < 0
        loss = 1/N sum_i -exp( 1/|o_i| sum_t l_it ) A_i

    Unlike GSPO's clip, which takes the gradient of a whole sequence or none of it, this one is each token's own. The
    paper's clip is wide, ratios from e^-0.4 to e^0.4. The advantage must be that of the sequence.
    """

    log_clip: float = 0.4
    """Log-ratios are clipped at this, in the direction that the advantage pulls."""
    normalization: str = "sequence"

    def term(self, x: Tokens) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        log = log_ratio(x.logprobs, x.old_logprobs)
        sign = torch.full_like(log, -1).masked_fill(x.advantages > 0, 1)
        clipped = sign * (sign * log).clamp(max=self.log_clip)
        ratio = x.sequences.mean(clipped).exp()
        is_clipped = (sign * log > self.log_clip).to(log.dtype)
        return -ratio * x.advantages, {"ratio/mean": ratio, "ratio/clip_fraction": is_clipped}
