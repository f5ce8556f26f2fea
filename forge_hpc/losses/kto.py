"""KTO: Kahneman-Tversky optimization, on answers that are good or bad by themselves (https://arxiv.org/abs/2402.01306)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from forge_hpc.losses.base import LossOutput
from forge_hpc.losses.reduction import Sequences


@dataclass(frozen=True)
class KTOLoss:
    """With ``side`` s = 1 of a good answer and -1 of a bad one, d = the sum over its tokens of log pi - log pi_ref, and
    z (the column ``kl``) the divergence of the policy from the reference, as a mean over the step's documents:

    loss = w_s (1 - sigmoid( s beta (d - z) ))
    """

    normalization: ClassVar[str] = "sequence"
    columns: ClassVar[tuple[str, ...]] = ("side", "kl")
    beta: float = 0.1
    """How strongly the policy is held to the reference."""
    desirable_weight: float = 1.0
    """w of good answers."""
    undesirable_weight: float = 1.0
    """w of bad ones."""

    def __call__(
        self,
        *,
        logprobs: torch.Tensor,
        ref_logprobs: torch.Tensor,
        side: torch.Tensor,
        kl: torch.Tensor,
        mask: torch.Tensor,
        segment_ids: torch.Tensor | None = None,
        normalizer: float | torch.Tensor,
        **unused: torch.Tensor | None,
    ) -> LossOutput:
        """See ``forge_hpc.losses.base``."""
        sequences = Sequences(mask, segment_ids)
        ratios = sequences.sums(logprobs - ref_logprobs)  # [sequences]
        sides, kls = (sequences.sums(column / sequences.lengths) for column in (side, kl))
        weights = torch.where(sides > 0, self.desirable_weight, self.undesirable_weight)
        losses = weights * (1 - torch.sigmoid(self.beta * sides * (ratios - kls)))
        right = (sides * (ratios.detach() - kls) > 0).to(losses.dtype).sum()
        return LossOutput(losses.sum() / normalizer, {"kto/accuracy": right / normalizer})
