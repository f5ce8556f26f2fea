"""What an evaluation says: accuracy, pass@k and mean reward from graded answers, with 95 % confidence intervals.

Pure functions; who asks the generators and the rewards is ``Session.evaluate``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from forge_hpc.generation.seeds import sample_seed

Z_95 = 1.959963984540054
"""Half of the 95 % interval of a normal distribution, in standard deviations."""
NUM_RESAMPLES = 2000
_BLOCK = 100
"""Resamples drawn at once: memory stays small however many prompts there are."""
_SEED_PLACE = -1
"""In the place of a prompt's position, which is never negative: no evaluation has the seed of a training sample."""


def evaluation_seed(run_seed: int, step: int) -> int:
    """Seed of the sampled answers of the evaluation after ``step``; from it, prompt and sample give each one's own."""
    return sample_seed(run_seed, _SEED_PLACE, step)


def wilson_interval(num_right: int, num: int) -> tuple[float, float]:
    """95 % interval of a share of which ``num_right`` of ``num`` were seen (Wilson 1927,
    https://doi.org/10.1080/01621459.1927.10502953). Within [0, 1], and never empty, not even at 0 of ``num``."""
    share, z2 = num_right / num, Z_95 * Z_95
    center = (share + z2 / (2 * num)) / (1 + z2 / num)
    half = Z_95 / (1 + z2 / num) * math.sqrt(share * (1 - share) / num + z2 / (4 * num * num))
    return max(0.0, min(center - half, share)), min(1.0, max(center + half, share))


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Unbiased estimate of the probability that one of ``k`` answers is right, where ``num_right`` of ``num_samples``
    were: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, https://arxiv.org/abs/2107.03374).

    Raises:
        ValueError: not 1 <= k <= num_samples.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples: k must be from 1 to {num_samples}")
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def bootstrap_interval(values: Sequence[float], seed: int) -> tuple[float, float]:
    """95 % interval of the mean of ``values`` in [0, 1], one a prompt: the percentiles of ``NUM_RESAMPLES`` resamples
    of the prompts. It says how far another choice of prompts could have moved the mean.

    Where all values are equal there is nothing to resample, which does not mean certainty: then Wilson's interval.
    """
    array = np.asarray(values, dtype=np.float64)
    if np.ptp(array) == 0:
        mean = float(array[0])
        low, high = wilson_interval(round(mean * len(array)), len(array))
        return min(low, mean), max(high, mean)
    draws = np.random.default_rng(seed)
    num = len(array)
    means = [array[draws.integers(0, num, (_BLOCK, num))].mean(axis=1) for _ in range(NUM_RESAMPLES // _BLOCK)]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def greedy_figures(right: Sequence[bool], rewards: Sequence[float | None]) -> dict[str, float]:
    """Figures of one greedy answer a prompt.

    Args:
        right: by prompt, whether the answer is right.
        rewards: by prompt, its reward; None where none could be computed. Such an answer is not right, and it is left
            out of the mean.
    """
    low, high = wilson_interval(sum(right), len(right))
    figures = {"accuracy": sum(right) / len(right), "accuracy_low": low, "accuracy_high": high}
    return figures | _mean_reward("reward", rewards)


def sampled_figures(
    right: Sequence[Sequence[bool]], rewards: Sequence[Sequence[float | None]], ks: Sequence[int], seed: int
) -> dict[str, float]:
    """Figures of as many sampled answers for each prompt: ``pass@K`` with its interval over prompts, and their mean
    reward.

    Args:
        right, rewards: by prompt and sample, as ``greedy_figures``.
        ks: the K, each at most the samples of a prompt.
        seed: of the bootstrap.
    """
    figures: dict[str, float] = {}
    for k in ks:
        values = [pass_at_k(len(answers), sum(answers), k) for answers in right]
        low, high = bootstrap_interval(values, seed)
        figures |= {f"pass@{k}": sum(values) / len(values), f"pass@{k}_low": low, f"pass@{k}_high": high}
    return figures | _mean_reward("reward_sampled", [reward for answers in rewards for reward in answers])


def _mean_reward(name: str, rewards: Sequence[float | None]) -> dict[str, float]:
    known = [reward for reward in rewards if reward is not None]
    return {name: sum(known) / len(known)} if known else {}
