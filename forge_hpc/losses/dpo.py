"""DPO: direct preference optimization (https://arxiv.org/abs/2305.18290), and IPO (https://arxiv.org/abs/2310.12036)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import softplus

from forge_hpc.losses.base import LossOutput
from forge_hpc.losses.reduction import Sequences


@dataclass(frozen=True)
class DPOLoss:
    """A pair is a group of two documents: y+ with ``side`` 1, y- with -1. With the log-ratios to the reference, d(y) =
    sum over the tokens of y of log pi - log pi_ref, as a mean over the step's pairs:

    loss = -log sigmoid( beta (d(y+) - d(y-)) )
    """

    normalization: ClassVar[str] = "group"
    columns: ClassVar[tuple[str, ...]] = ("side",)
    beta: float = 0.1
    """How strongly the policy is held to the reference."""

    def __call__(
        self,
        *,
        logprobs: torch.Tensor,
        ref_logprobs: torch.Tensor,
        side: torch.Tensor,
        mask: torch.Tensor,
        segment_ids: torch.Tensor,
        group_ids: torch.Tensor,
        normalizer: float | torch.Tensor,
        **unused: torch.Tensor | None,
    ) -> LossOutput:
        """See ``forge_hpc.losses.base``."""
        ratios = side * (logprobs - ref_logprobs)
        margins = Sequences(mask, group_ids).sums(self.scaled(ratios, Sequences(mask, segment_ids)))  # [pairs]
        right = (margins.detach() > 0).to(margins.dtype).sum()
        metrics = {"dpo/accuracy": right / normalizer, "dpo/margin": margins.detach().sum() / normalizer}
        return LossOutput(self.of_margins(margins).sum() / normalizer, metrics)

    def scaled(self, ratios: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        """[B, T]: what is summed over a pair's tokens."""
        return ratios

    def of_margins(self, margins: torch.Tensor) -> torch.Tensor:
        """[pairs]: the loss of each, from d(y+) - d(y-)."""
        return softplus(-self.beta * margins)


@dataclass(frozen=True)
class IPOLoss(DPOLoss):
    """The margin is drawn to 1/(2 beta), and no further; d is a mean over tokens, as in most implementations:

    loss = ( d(y+) - d(y-) - 1/(2 beta) )^2
    """

    def scaled(self, ratios: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        """[B, T]: what is summed over a pair's tokens."""
        return ratios / sequences.lengths

    def of_margins(self, margins: torch.Tensor) -> torch.Tensor:
        """[pairs]: the loss of each, from d(y+) - d(y-)."""
        return (margins - 1 / (2 * self.beta)).square()
