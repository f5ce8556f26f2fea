"""Estimators of KL(policy || reference) from the sampled tokens alone (http://joschu.net/blog/kl-approx.html).

With d = log(pi / pi_ref) of a token that the policy sampled:

    k1 = d                    unbiased, noisy, often negative; as a loss its gradient is zero on average: a figure only
    k2 = d^2 / 2              biased, never negative; its gradient is the unbiased one (https://arxiv.org/abs/2506.09477)
    k3 = exp(-d) - 1 + d      unbiased, never negative; GRPO's

All that is said of tokens of the policy itself. Of tokens that an older one sampled, r = pi / pi_old times the estimate
is unbiased where that was, and so is its gradient: for k1 and k3 with r's own, for k2 with r as a constant
(DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, with k3):

    grad (r k1) = r (d + 1) grad log pi     grad (r k3) = r d grad log pi     r grad k2 = r d grad log pi

whose means are all the gradient of the KL, since r grad log pi has the mean 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from forge_hpc.config import registry
from forge_hpc.losses.base import log_ratio


def k1(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """d, per token."""
    return log_ratio(logprobs, ref_logprobs)


def k2(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """d^2 / 2, per token."""
    return log_ratio(logprobs, ref_logprobs).square() / 2


def k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """exp(-d) - 1 + d, per token."""
    d = log_ratio(ref_logprobs, logprobs)
    return d.exp() - d - 1


def weighted(name: str, kl: torch.Tensor, logprobs: torch.Tensor, old_logprobs: torch.Tensor) -> torch.Tensor:
    """r times the estimate of that name, per token."""
    ratio = log_ratio(logprobs, old_logprobs).exp()
    return (ratio.detach() if name == "k2" else ratio) * kl


KL_ESTIMATORS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    name: globals()[place.rpartition(":")[2]] for name, place in registry.KL_ESTIMATORS.items()
}
