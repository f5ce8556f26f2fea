"""The loss of a critic: the squared distance of its values to the returns (https://arxiv.org/abs/1707.06347)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from forge_hpc.losses.base import LossOutput
from forge_hpc.losses.reduction import Sequences, step_means


@dataclass(frozen=True)
class ValueLoss:
    """With values V and returns R, over all trained tokens of the step:

    loss = mean( (V - R)^2 / 2 )
    """

    columns: ClassVar[tuple[str, ...]] = ("returns",)

    def __call__(
        self,
        *,
        values: torch.Tensor,
        mask: torch.Tensor,
        returns: torch.Tensor,
        normalizer: float | torch.Tensor | None = None,
        **unused: torch.Tensor | None,
    ) -> LossOutput:
        """See ``forge_hpc.losses.base``."""
        mean, _ = step_means(Sequences(mask), "token", 1, normalizer)
        error = values - returns
        return LossOutput(
            mean(error.square() / 2), {"value/mean": mean(values.detach()), "value/error": mean(error.detach().abs())}
        )
