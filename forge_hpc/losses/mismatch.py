"""Correction for the mismatch between generator and trainer: two programs, two log-probabilities for one token.

The generator's kernels, precision and sampling options make it sample from another distribution than the trainer
computes, even with the same weights; under staleness the weights differ too. Importance sampling puts that right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from forge_hpc.config.registry import MISMATCH_LEVELS as LEVELS
from forge_hpc.losses.base import log_ratio
from forge_hpc.losses.reduction import Sequences


@dataclass(frozen=True)
class MismatchCorrection:
    """Weights each token's policy term by w = pi_trainer / pi_generator, truncated and masked.

    - level: of ``sequence``, w is the product over the trained tokens of the token's sequence, which has no bias and
      whose variance grows with the length; of ``token`` the token's own;
    - cap: w is at most this: truncated importance sampling (https://doi.org/10.1198/106186008X320456, for language
      models https://fengyao.notion.site/off-policy-rl); None leaves it as it is;
    - token_bounds: tokens whose own ratio is outside [low, high] are left out (IcePop,
      https://arxiv.org/abs/2510.18855);
    - sequence_bounds: sequences are left out whose ratio is outside [low, high] in the geometric mean over their
      trained tokens, the ratio of GSPO;
    - product_bounds: those whose ratio is outside as a product: masked importance sampling of sequences (Liu, Li et al.
      2025, "When Speed Kills Stability"); with ``level: sequence`` and no cap, its whole estimator;
    - veto: sequences with a token whose ratio is below this are left out, since no generator that is right draws it.

    What is left out weighs 0 and still counts in the normalizer.
    """

    cap: float | None = None
    token_bounds: tuple[float, float] | None = None
    sequence_bounds: tuple[float, float] | None = None
    level: str = "token"
    product_bounds: tuple[float, float] | None = None
    veto: float | None = None

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"level is {self.level!r}, it must be one of {', '.join(LEVELS)}")

    def weights(
        self, trainer_logprobs: torch.Tensor, generator_logprobs: torch.Tensor, sequences: Sequences
    ) -> torch.Tensor:
        """The factor of each token: [B, T], without gradient."""
        difference = (trainer_logprobs - generator_logprobs).detach()
        ratio = _ratio(difference)
        weights = ratio if self.level == "token" else _ratio(sequences.total(difference))
        weights = weights if self.cap is None else weights.clamp(max=self.cap)
        if self.token_bounds is not None:
            weights = torch.where(_is_within(ratio, self.token_bounds), weights, 0)
        if self.sequence_bounds is not None:
            within = _is_within(_ratio(sequences.mean(difference)), self.sequence_bounds)
            weights = torch.where(within, weights, 0)
        if self.product_bounds is not None:
            within = _is_within(_ratio(sequences.total(difference)), self.product_bounds)
            weights = torch.where(within, weights, 0)
        if self.veto is not None:
            weights = torch.where(sequences.total((ratio < self.veto).to(ratio.dtype)) == 0, weights, 0)
        return weights


def off_policy_mask(
    logprobs: torch.Tensor,
    generator_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    sequences: Sequences,
    threshold: float,
) -> torch.Tensor:
    """[B, T]: False for the tokens of a sequence that was worse than others and that the policy has moved away from.

        keep = A >= 0 or 1/|o| sum_t log pi_generator(o_t) / pi(o_t) <= threshold

    Off-policy sequence masking (DeepSeek-V3.2, https://arxiv.org/abs/2512.02556): what is unlikely by now teaches
    little and unsettles much as a bad example; as a good one it is kept.
    """
    moved = sequences.mean((generator_logprobs - logprobs).detach())
    return (advantages >= 0) | (moved <= threshold)


def weight_metrics(weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Per token, to be averaged over the step; ``add_effective_sample_size`` makes the rest of them."""
    return {
        "mismatch/weight_mean": weights,
        "mismatch/weight_square_mean": weights.square(),
        "mismatch/masked_fraction": (weights == 0).float(),
    }


def add_effective_sample_size(metrics: dict[str, float]) -> dict[str, float]:
    """The step's metrics with ``mismatch/ess``, where a correction made weights.

    mean(w)^2 / mean(w^2), from 0 to 1: the share of the tokens that as many equally weighted ones would be worth (Kish
    1965). Shares of it do not add up over microbatches, those of the two means do: it is taken from the step's.
    """
    square = metrics.get("mismatch/weight_square_mean")
    if square is None:
        return metrics
    return metrics | {"mismatch/ess": metrics["mismatch/weight_mean"] ** 2 / square if square else 0.0}


def _ratio(log: torch.Tensor) -> torch.Tensor:
    return log_ratio(log, torch.zeros_like(log)).exp()


def _is_within(ratio: torch.Tensor, bounds: tuple[float, float]) -> torch.Tensor:
    return (ratio >= bounds[0]) & (ratio <= bounds[1])
