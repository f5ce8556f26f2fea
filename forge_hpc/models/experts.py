"""A mixture of experts: the experts in the precision of what they are given, and routes that can be replayed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.models.common.moe import GroupedExperts, TokenChoiceTopKRouter


class Experts(GroupedExperts):
    """SwiGLU experts that compute in the dtype of their input.

    TorchTitan 0.3.0's round inputs and weights to bfloat16, also where the model is in float32, as it is on the CPU;
    this class can go when they no longer do.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    def forward(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
        """[tokens, dim], sorted by expert, and how many each expert has; [tokens, dim]."""
        if x_RD.dtype == torch.bfloat16:
            return super().forward(x_RD, num_tokens_per_expert_E)
        w1, w2, w3 = (
            (w.to_local() if isinstance(w, DTensor) else w).to(x_RD.dtype).transpose(-2, -1)
            for w in (self.w1_EFD, self.w2_EDF, self.w3_EFD)
        )
        offsets = torch.cumsum(num_tokens_per_expert_E, dim=0, dtype=torch.int32)
        hidden = F.silu(self._grouped_mm(A=x_RD, B_t=w1, offs=offsets)) * self._grouped_mm(A=x_RD, B_t=w3, offs=offsets)
        return self._grouped_mm(A=hidden, B_t=w2, offs=offsets)


class Router(TokenChoiceTopKRouter):
    """A router that may be told which experts to take; how much of each it still says itself, so that it learns.

    That is Rollout Routing Replay (R3, arXiv 2510.11370): with the experts S that the generator took, the weight of
    expert i in S is softmax(logits)_i over the sum of those of S, as it is without.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(TokenChoiceTopKRouter.Config):
        pass

    routes: torch.Tensor | None = None
    """[R, T, experts a token] of the next forward pass and of its backward pass; below 0: its own choice."""

    def forward(
        self, x_BLD: torch.Tensor, expert_bias_E: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weights and indices of each token's experts, [R, T, k], and the weights of all, [R, T, experts]."""
        weights, ids, scores = super().forward(x_BLD, expert_bias_E)
        if self.routes is None:
            return weights, ids, scores
        ids = torch.where(self.routes < 0, ids, self.routes.long())
        weights = scores.gather(-1, ids)
        if self.route_norm:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.route_scale, ids, scores


def replay_routes(model: nn.Module, routes: torch.Tensor | None) -> None:
    """Have the routers of all layers take the experts ``routes`` [R, T, layers, k]; None: their own choice."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for layer, router in enumerate(routers):
        router.routes = None if routes is None else routes[:, :, layer]
