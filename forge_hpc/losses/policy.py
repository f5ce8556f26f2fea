"""What all policy losses share: the KL penalty, the entropy bonus, the mismatch correction and the normalisation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from forge_hpc.losses.base import LossOutput
from forge_hpc.losses.kl import KL_ESTIMATORS, k2, weighted
from forge_hpc.losses.mismatch import MismatchCorrection, off_policy_mask, weight_metrics
from forge_hpc.losses.reduction import NORMALIZATIONS, Sequences, step_means


class Tokens(NamedTuple):
    """What a policy term is made of: [B, T] each, finite everywhere, 0 where nothing is trained."""

    logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    sequences: Sequences
    columns: Mapping[str, torch.Tensor] = {}
    """Those that the loss names."""


@dataclass(frozen=True, kw_only=True)
class PolicyLoss(ABC):
    """A policy term per token, and what is added to it:

        loss = mean( v w term ) + kl_coef mean( KL(pi || pi_ref) ) + old_kl_coef mean( (log r)^2 / 2 )
               - entropy_coef mean( H )                                                   r = pi / pi_old

    A subclass gives the term and says which mean is its own. Example of one:

        @dataclass(frozen=True)
        class MyLoss(PolicyLoss):
            scale: float = 1.0

            def term(self, x):
                return -self.scale * x.advantages * x.logprobs, {}
    """

    columns: ClassVar[tuple[str, ...]] = ()
    """Columns of the documents that the term takes, from ``x.columns``."""
    advantage: ClassVar[str] = "group_mean_std"
    """The advantage that belongs to the loss, where ``algorithm.advantage`` is null."""
    kl_coef: float = 0.0
    """Weight of the KL penalty against the reference model; its gradient goes through the estimator."""
    kl_estimator: str = "k3"
    """k1, k2 or k3: see ``kl``."""
    kl_weighted: bool = False
    """Weight it by the ratio pi / pi_old, for tokens that an older policy sampled: see ``kl``."""
    old_kl_coef: float = 0.0
    """Weight of a penalty on the distance to pi_old, k2 of their KL, whose gradient pulls a token back wherever it is
    (Kimi K2.5, https://arxiv.org/abs/2602.02276); a clip takes a token's gradient away."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    normalization: str = "token"
    """What the means are over: token, sequence or constant, see ``reduction.step_means``."""
    max_tokens: int = 1
    """The constant of ``normalization="constant"``: the token budget of a response."""
    mismatch: MismatchCorrection | None = None
    """Makes w; without it w = 1. v are the documents' own weights, where they have such a column."""
    off_policy_mask_threshold: float | None = None
    """Sequences with a negative advantage are left out whose tokens the policy has come to find less likely than the
    generator by more than this, in nats, on average: see ``mismatch.off_policy_mask``. None leaves none out."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("normalization", self.normalization, NORMALIZATIONS),
            ("kl_estimator", self.kl_estimator, tuple(KL_ESTIMATORS)),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, it must be one of {', '.join(known)}")

    @property
    def old_logprobs_from(self) -> str:
        """``generator``: the ratio spans staleness and mismatch. With a correction, which covers both, ``trainer``: the
        policy before the step, so that the ratio is 1 unless the step takes several optimizer steps."""
        return "generator" if self.mismatch is None else "trainer"

    @abstractmethod
    def term(self, x: Tokens) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The policy term to be minimised and metrics to be averaged, per token: [B, T] each."""

    def __call__(
        self,
        *,
        logprobs: torch.Tensor,
        old_logprobs: torch.Tensor,
        advantages: torch.Tensor,
        mask: torch.Tensor,
        generator_logprobs: torch.Tensor | None = None,
        ref_logprobs: torch.Tensor | None = None,
        entropy: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        normalizer: float | torch.Tensor | None = None,
        **columns: torch.Tensor | None,
    ) -> LossOutput:
        """See ``forge_hpc.losses.base``.

        Raises:
            ValueError: an input that is not finite at a trained token, by its name, or one that an option needs and
                that is not given.
        """
        mask = mask.bool()
        if advantages.dim() == 1:
            advantages = advantages[:, None]
        given = {
            "logprobs": logprobs,
            "old_logprobs": old_logprobs,
            "advantages": advantages.expand_as(mask),
            "generator_logprobs": generator_logprobs,
            "ref_logprobs": ref_logprobs,
            "entropy": entropy,
            "weights": weights,
        }
        given |= {name: _needed(columns, name, "columns") for name in self.columns}
        x = _trained(mask, {name: values for name, values in given.items() if values is not None})
        sequences = Sequences(mask, segment_ids)
        loss_mean, mean = step_means(sequences, self.normalization, self.max_tokens, normalizer)

        term, per_token = self.term(
            Tokens(
                x["logprobs"],
                x["old_logprobs"],
                x["advantages"],
                sequences,
                {name: x[name] for name in self.columns},
            )
        )
        if term.shape != mask.shape:
            raise ValueError(
                f"{type(self).__name__}.term() gives a term of shape {[*term.shape]}, and tokens have {[*mask.shape]}: "
                "it is a value for each, of which the loss takes the mean"
            )
        if "weights" in x:
            term = term * x["weights"]
        if self.mismatch is not None:
            generator = _needed(x, "generator_logprobs", "mismatch")
            corrections = self.mismatch.weights(x["old_logprobs"], generator, sequences)
            term = term * corrections
            per_token = per_token | weight_metrics(corrections)
        if self.off_policy_mask_threshold is not None:
            generator = _needed(x, "generator_logprobs", "off_policy_mask_threshold")
            keeps = off_policy_mask(
                x["logprobs"], generator, x["advantages"], sequences, self.off_policy_mask_threshold
            )
            term = torch.where(keeps, term, 0)
            per_token = per_token | {"mismatch/off_policy_fraction": (~keeps).to(term.dtype)}
        loss = loss_mean(term)
        metrics = {name: mean(values.detach()) for name, values in per_token.items()}
        if self.kl_coef or "ref_logprobs" in x:
            kl = KL_ESTIMATORS[self.kl_estimator](x["logprobs"], _needed(x, "ref_logprobs", "kl_coef"))
            if self.kl_weighted:
                sampled_by = x.get("generator_logprobs", x["old_logprobs"])  # a correction's old ones are the trainer's
                kl = weighted(self.kl_estimator, kl, x["logprobs"], sampled_by)
            metrics["kl/mean"] = mean(kl.detach())
            loss = loss + self.kl_coef * loss_mean(kl)
        if self.old_kl_coef:
            moved = k2(x["logprobs"], x["old_logprobs"])
            metrics["kl/old"] = mean(moved.detach())
            loss = loss + self.old_kl_coef * loss_mean(moved)
        if self.entropy_coef:
            loss = loss - self.entropy_coef * loss_mean(_needed(x, "entropy", "entropy_coef"))
        return LossOutput(loss, metrics)


def _trained(mask: torch.Tensor, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs with 0 where nothing is trained; ValueError where one is not finite at a trained token.

    On a GPU that is not asked, which would have it wait for each microbatch: the loss is then not finite either, and
    the engine refuses it.
    """
    if mask.device.type == "cpu":
        num_bad = torch.stack([(mask & ~values.isfinite()).sum() for values in inputs.values()]).tolist()
        for name, num in zip(inputs, num_bad, strict=True):
            if num:
                raise ValueError(f"{name}: {num} of {int(mask.sum())} trained tokens are not finite")
    return {name: torch.where(mask, values, 0) for name, values in inputs.items()}


def _needed(inputs: Mapping[str, torch.Tensor | None], name: str, option: str) -> torch.Tensor:
    values = inputs.get(name)
    if values is None:
        raise ValueError(f"the option {option} of the loss needs {name}, which are not given")
    return values
