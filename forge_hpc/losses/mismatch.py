"""Correction for the mismatch between generator and trainer: two programs, two log-probabilities for one token.

The generator's kernels, precision and sampling options make it sample from another distribution than the trainer
computes, even with the same weights; under staleness the weights differ too. Importance sampling puts that right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from forge_hpc.losses.base import log_ratio
from forge_hpc.losses.reduction import Sequences


@dataclass(frozen=True)
class MismatchCorrection:
    """Weights each token's policy term by w = pi_trainer / pi_generator, truncated and masked.

    - cap: w is at most this: truncated importance sampling (https://doi.org/10.1198/106186008X320456, for language
      models https://fengyao.notion.site/off-policy-rl); None leaves it as it is;
    - token_bounds: tokens whose w is outside (low, high) are left out (IcePop, https://arxiv.org/abs/2510.18855);
    - sequence_bounds: sequences are left out whose w is outside (low, high) in the geometric mean over their trained
      tokens, the ratio of GSPO.

    What is left out weighs 0 and still counts in the normalizer.
    """

    cap: float | None = None
    token_bounds: tuple[float, float] | None = None
    sequence_bounds: tuple[float, float] | None = None

    def weights(
        self, trainer_logprobs: torch.Tensor, generator_logprobs: torch.Tensor, sequences: Sequences
    ) -> torch.Tensor:
        """The factor of each token: [B, T], without gradient."""
        difference = (trainer_logprobs - generator_logprobs).detach()
        ratio = log_ratio(difference, torch.zeros_like(difference)).exp()
        weights = ratio if self.cap is None else ratio.clamp(max=self.cap)
        if self.token_bounds is not None:
            weights = torch.where(_is_within(ratio, self.token_bounds), weights, 0)
        if self.sequence_bounds is not None:
            mean = sequences.mean(difference)
            sequence_ratio = log_ratio(mean, torch.zeros_like(mean)).exp()
            weights = torch.where(_is_within(sequence_ratio, self.sequence_bounds), weights, 0)
        return weights


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


def _is_within(ratio: torch.Tensor, bounds: tuple[float, float]) -> torch.Tensor:
    return (ratio >= bounds[0]) & (ratio <= bounds[1])
