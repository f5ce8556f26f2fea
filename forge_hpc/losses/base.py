"""What losses share: their result, means over the step, the KL estimate.

Every loss is called ``loss_fn(*, logprobs, old_logprobs, advantages, mask, generator_logprobs=None, ref_logprobs=None,
entropy=None, segment_ids=None, normalizer=None)``. All tensors are per token, [B, T], padded or packed:

- logprobs: of the policy that is trained, with gradient; old_logprobs: of the policy that the ratio is taken against;
- advantages: of the token's sequence; mask: True where a token is trained;
- generator_logprobs, ref_logprobs: as the generator sampled it, and of the reference model;
- entropy: of the policy's distribution, with gradient; segment_ids: the token's document in a packed row;
- normalizer: what sums are divided by, the step's global token count, so that the losses and metrics of its
  microbatches and ranks add up to those of the step. By default the mask's own count.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

MAX_LOG_RATIO = 20.0


@dataclass
class LossOutput:
    """A microbatch's share of the step's loss and metrics."""

    loss: torch.Tensor
    """Scalar with gradient."""
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    """Scalars without gradient, divided by the normalizer: they add up over microbatches and ranks."""


class TokenMean:
    """Sums values over the mask and divides by the normalizer: a microbatch's share of the step's mean."""

    def __init__(self, mask: torch.Tensor, normalizer: float | torch.Tensor | None) -> None:
        self.mask = mask
        self.normalizer = mask.sum().clamp(min=1) if normalizer is None else normalizer

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        # where, not a product: padding may hold anything, and 0 * inf is NaN
        return torch.where(self.mask, values, 0).sum() / self.normalizer


def log_ratio(logprobs: torch.Tensor, old_logprobs: torch.Tensor) -> torch.Tensor:
    """log(pi / pi_old), kept within +-20 so that its exponential stays finite."""
    return (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def kl_k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """KL(policy || reference) per token, estimated as exp(d) - d - 1 with d = log(pi_ref / pi): unbiased, never
    negative (k3 of http://joschu.net/blog/kl-approx.html)."""
    d = log_ratio(ref_logprobs, logprobs)
    return d.exp() - d - 1
