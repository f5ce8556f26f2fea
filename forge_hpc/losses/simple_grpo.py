"""GRPO for one optimizer step a batch, as torchforge has it (https://github.com/meta-pytorch/torchforge)."""

from __future__ import annotations

from typing import ClassVar

import torch

from forge_hpc.losses.mismatch import MismatchCorrection
from forge_hpc.losses.policy import PolicyLoss, Tokens


class SimpleGRPOLoss(PolicyLoss):
    """GRPO whose old policy is the current one, so that there is a gradient and nothing to clip:

    loss = 1/N sum_i 1/|o_i| sum_t -( exp(log pi - sg(log pi)) A - beta KL(pi || pi_ref) )
    """

    renamed: ClassVar[dict[str, str]] = {"kl_coef": "beta"}

    def __init__(
        self,
        beta: float = 0.1,
        *,
        kl_estimator: str = "k3",
        kl_weighted: bool = False,
        old_kl_coef: float = 0.0,
        entropy_coef: float = 0.0,
        normalization: str = "sequence",
        max_tokens: int = 1,
        mismatch: MismatchCorrection | None = None,
        off_policy_mask_threshold: float | None = None,
    ) -> None:
        """``beta`` is torchforge's name for ``kl_coef``."""
        super().__init__(
            kl_coef=beta,
            kl_estimator=kl_estimator,
            kl_weighted=kl_weighted,
            old_kl_coef=old_kl_coef,
            entropy_coef=entropy_coef,
            normalization=normalization,
            max_tokens=max_tokens,
            mismatch=mismatch,
            off_policy_mask_threshold=off_policy_mask_threshold,
        )

    def term(self, x: Tokens) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return -(x.logprobs - x.logprobs.detach()).exp() * x.advantages, {}
