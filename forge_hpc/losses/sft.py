"""Supervised fine-tuning: negative log-likelihood of the trained tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from forge_hpc.losses.base import LossOutput
from forge_hpc.losses.reduction import Sequences, step_means


@dataclass(frozen=True)
class SFTLoss:
    """loss = mean( -v log pi(token) ) over all trained tokens of the step, in nats; v are the documents' ``weights``, 1
    where they have no such column."""

    def __call__(
        self,
        *,
        logprobs: torch.Tensor,
        mask: torch.Tensor,
        weights: torch.Tensor | None = None,
        normalizer: float | torch.Tensor | None = None,
        **unused: torch.Tensor | None,
    ) -> LossOutput:
        """See ``forge_hpc.losses.base``."""
        mean, _ = step_means(Sequences(mask), "token", 1, normalizer)
        return LossOutput(mean(-logprobs if weights is None else -weights * logprobs))
