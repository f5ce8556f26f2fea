"""What every loss is: a callable, its result, and the ratio of two policies.

A loss is called ``loss_fn(*, logprobs, old_logprobs, advantages, mask, generator_logprobs=None, ref_logprobs=None,
entropy=None, segment_ids=None, normalizer=None) -> LossOutput``. Tensors are per token, [B, T], padded or packed:

- logprobs: of the policy that is trained, with gradient; old_logprobs: of the policy that the ratio is taken against;
- advantages: of the token's sequence; for padded rows [B] or [B, 1] will do;
- mask: True where a token is trained; what the others hold never matters;
- generator_logprobs, ref_logprobs: as the generator sampled it, and of the reference model;
- entropy: of the policy's distribution, with gradient;
- segment_ids: the token's sequence within its row (see ``reduction.Sequences``); None: one sequence a row;
- normalizer: what sums are divided by, counted over all microbatches and ranks of the step, so that losses and metrics
  add up to the step's. By default counted here.

Two attributes tell the engine what to hand over; a loss may leave them out:

- normalization: ``token`` (the default) has the step's trained tokens as normalizer, ``sequence`` and ``constant`` its
  sequences with a trained token;
- old_logprobs_from: ``generator`` (the default) or ``trainer``, whose log-probabilities ``old_logprobs`` are.
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
    """Scalars without gradient, the same names in each call. They are added up over microbatches and ranks, so they are
    sums over trained tokens divided by the normalizer: means of the step."""


def log_ratio(logprobs: torch.Tensor, old_logprobs: torch.Tensor) -> torch.Tensor:
    """log(pi / pi_old), kept within +-20 so that its exponential stays finite."""
    return (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
