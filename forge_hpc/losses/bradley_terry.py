"""The loss of a reward model: pairs after Bradley and Terry (https://doi.org/10.2307/2334029), as in
https://arxiv.org/abs/1706.03741."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import softplus

from forge_hpc.losses.base import LossOutput
from forge_hpc.losses.reduction import Sequences


@dataclass(frozen=True)
class BradleyTerryLoss:
    """A pair is a group of two documents with one trained token each, whose value r is what the document is worth: y+
    with ``side`` 1, y- with -1. As a mean over the step's pairs:

    loss = -log sigmoid( r(y+) - r(y-) ) + center (r(y+) + r(y-))^2
    """

    normalization: ClassVar[str] = "group"
    columns: ClassVar[tuple[str, ...]] = ("side",)
    center: float = 0.0
    """Keeps values around 0, which the first term leaves open (https://arxiv.org/abs/2312.09244)."""

    def __call__(
        self,
        *,
        values: torch.Tensor,
        side: torch.Tensor,
        mask: torch.Tensor,
        group_ids: torch.Tensor,
        normalizer: float | torch.Tensor,
        **unused: torch.Tensor | None,
    ) -> LossOutput:
        """See ``forge_hpc.losses.base``."""
        pairs = Sequences(mask, group_ids)
        margins, sums = pairs.sums(side * values), pairs.sums(values)  # [pairs]
        loss = softplus(-margins) + self.center * sums.square()
        right = (margins.detach() > 0).to(margins.dtype).sum()
        metrics = {"preference/accuracy": right / normalizer, "preference/margin": margins.detach().sum() / normalizer}
        return LossOutput(loss.sum() / normalizer, metrics)
