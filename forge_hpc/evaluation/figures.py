"""What an evaluation says: accuracy, pass@k and mean reward from graded answers, with 95 % confidence intervals.

Pure functions; who asks the generators and the rewards is ``Session.evaluate``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forge_hpc.generation.seeds import sample_seed

Z_95 = 1.959963984540054
"""Half of the 95 % interval of a normal distribution, in standard deviations."""
NUM_RESAMPLES = 2000
_BLOCK = 100
"""Resamples drawn at once: memory stays small however many prompts there are."""
_SEED_PLACE = -1
"""In the place of a prompt's position, which is never negative: no evaluation has the seed of a training sample."""


@dataclass(frozen=True, slots=True)
class Graded:
    """An answer and what it got; as it is made by default, one that failed, or whose reward could not be computed."""

    right: bool = False
    reward: float | None = None


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


def greedy_figures(answers: Sequence[Graded]) -> dict[str, float]:
    """``accuracy`` of one greedy answer a prompt, with its interval, and the mean ``reward`` of those that have one."""
    num_right, num = sum(answer.right for answer in answers), len(answers)
    low, high = wilson_interval(num_right, num)
    figures = {"accuracy": num_right / num, "accuracy_low": low, "accuracy_high": high}
    return figures | _mean_reward("reward", answers)


def sampled_figures(answers: Sequence[Sequence[Graded]], ks: Sequence[int], seed: int) -> dict[str, float]:
    """``pass@K`` of the answers sampled for each prompt, with its interval over prompts, and ``reward_sampled``.

    Args:
        answers: by prompt and sample; as many for each prompt.
        ks: the K, each at most the samples of a prompt.
        seed: of the bootstrap.
    """
    figures: dict[str, float] = {}
    for k in ks:
        values = [pass_at_k(len(samples), sum(sample.right for sample in samples), k) for samples in answers]
        low, high = bootstrap_interval(values, seed)
        figures |= {f"pass@{k}": sum(values) / len(values), f"pass@{k}_low": low, f"pass@{k}_high": high}
    return figures | _mean_reward("reward_sampled", [sample for samples in answers for sample in samples])


def figures_of_sets(
    labels: Sequence[str],
    greedy: Sequence[Sequence[Graded]],
    sampled: Sequence[Sequence[Graded]],
    ks: Sequence[int],
    seed: int,
) -> dict[str, float]:
    """The figures over all prompts and, where there are several sets, those of each under ``LABEL/``; with their
    ``num_prompts``, and ``num_failed`` answers. Over all: every prompt counts the same, whatever set it is of.

    Args:
        labels: of each prompt the set that it is of.
        greedy: by prompt its one greedy answer, ``sampled`` its sampled ones; empty where nothing was sampled.
    """

    def of(places: Sequence[int]) -> dict[str, float]:
        figures, graded = greedy_figures([greedy[place][0] for place in places]), [greedy[place] for place in places]
        if sampled:
            figures |= sampled_figures([sampled[place] for place in places], ks, seed)
            graded += [sampled[place] for place in places]
        num_failed = sum(answer.reward is None for answers in graded for answer in answers)
        return figures | {"num_prompts": len(places), "num_failed": num_failed}

    figures = of(range(len(labels)))
    for label in filter(None, dict.fromkeys(labels)):
        places = [place for place, other in enumerate(labels) if other == label]
        figures |= {f"{label}/{key}": value for key, value in of(places).items()}
    return figures


def is_better(name: str, value: float, than: float) -> bool:
    """Whether a figure is better than another one of its name: of a ``loss`` less is better, of all others more."""
    return value < than if name.rpartition("/")[2] == "loss" else value > than


def _mean_reward(name: str, answers: Sequence[Graded]) -> dict[str, float]:
    known = [answer.reward for answer in answers if answer.reward is not None]
    return {name: sum(known) / len(known)} if known else {}
