"""What an evaluation says: accuracy, pass@k and mean reward from graded answers, with 95 % confidence intervals.

Pure functions; who asks the generators and the rewards is ``Session.evaluate``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from forge_hpc.generation.seeds import sample_seed

Z_95 = 1.959963984540054
"""Half of the 95 % interval of a normal distribution, in standard deviations."""
NUM_RESAMPLES = 2000
_LARGEST = 1e300
"""Up to here numbers of choices are counted in float64."""
_BLOCK = 100
"""Resamples drawn at once: memory stays small however many prompts there are."""
_SEED_PLACE = -1
"""In the place of a prompt's position, which is never negative: no evaluation has the seed of a training sample."""


@dataclass(frozen=True, slots=True)
class Graded:
    """An answer and what it got; as it is made by default, one that failed, or whose reward could not be computed."""

    right: bool = False
    reward: float | None = None
    answer: str | None = None
    """What the first reward took for the answer; None where it took nothing, or does not say."""


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


def best_of_k(rewards: Sequence[float], k: int) -> float:
    """Unbiased estimate of the expected reward of the best of ``k`` answers, chosen by the reward, from n of them: the
    sum over i of C(i - 1, k - 1) / C(n, k) times the i-th smallest reward (Nakano et al. 2021,
    https://arxiv.org/abs/2112.09332, appendix I). With rewards of 0 and 1 it is ``pass_at_k``.

    Raises:
        ValueError: not 1 <= k <= n.
    """
    num = len(rewards)
    if not 1 <= k <= num:
        raise ValueError(f"best@{k} of {num} samples: k must be from 1 to {num}")
    choices = math.comb(num, k)
    return sum(math.comb(i, k - 1) / choices * reward for i, reward in enumerate(sorted(rewards)))


def majority_at_k(samples: Sequence[Graded], k: int) -> float:
    """Probability that the most frequent answer among ``k`` of n samples, drawn without replacement, is right
    (self-consistency, Wang et al. 2022, https://arxiv.org/abs/2203.11171); exact over all choices of k. Among answers
    that are equally frequent chance decides; a sample without an answer does not vote, and where none does it is wrong.

    The choices in which answer j, seen c times, has t votes and no other one more are counted by the product of
    polynomials in z, whose powers count samples, and u, whose powers count ties: C(c, t) z^t for answer j, the sum of
    C(c', s) z^s over s < t and C(c', t) u z^t for each other, (1 + z)^m for m samples that do not vote. A choice with p
    ties counts 1 / (p + 1).

    Raises:
        ValueError: not 1 <= k <= n.
    """
    num = len(samples)
    if not 1 <= k <= num:
        raise ValueError(f"maj@{k} of {num} samples: k must be from 1 to {num}")
    votes = Counter(sample.answer for sample in samples)
    num_silent = votes.pop(None, 0)
    right = Counter(sample.answer for sample in samples if sample.right and sample.answer is not None)
    choices, won = math.comb(num, k), Fraction(0)
    kind = float if choices < _LARGEST else object  # whole numbers of any size, ten times as slow
    for answer, num_right in right.items():
        others = [count for other, count in votes.items() if other != answer]
        for t in range(1, min(votes[answer], k) + 1):
            ways = _choices_won(t, others, num_silent, k - t, kind)
            won += Fraction(num_right, votes[answer]) * math.comb(votes[answer], t) * ways
    return float(won / choices)


def _choices_won(t: int, others: Sequence[int], num_silent: int, left: int, kind: type) -> Fraction:
    """Choices of the ``left`` samples beside the ``t`` votes of an answer in which no other has more; ties shared."""
    ways: Any = np.zeros((left + 1, left // t + 1), kind)  # by samples chosen so far, and ties
    for s in range(min(num_silent, left) + 1):
        ways[s, 0] = math.comb(num_silent, s)
    for count in others:
        new = np.zeros_like(ways)
        for s in range(min(count, t - 1, left) + 1):
            new[s:] += math.comb(count, s) * ways[: left + 1 - s]
        if t <= min(count, left):
            new[t:, 1:] += math.comb(count, t) * ways[: left + 1 - t, :-1]
        ways = new
    return sum((Fraction(num) / (ties + 1) for ties, num in enumerate(ways[left].tolist())), Fraction(0))


def bootstrap_interval(values: Sequence[float], seed: int, *, is_share: bool = True) -> tuple[float, float]:
    """95 % interval of the mean of ``values``, one a prompt: the percentiles of ``NUM_RESAMPLES`` resamples of the
    prompts. It says how far another choice of prompts could have moved the mean.

    Where all values are equal there is nothing to resample, which does not mean certainty: then, where they are shares
    in [0, 1], Wilson's interval.
    """
    array = np.asarray(values, dtype=np.float64)
    if np.ptp(array) == 0 and not is_share:
        return float(array[0]), float(array[0])
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
    """``pass@K`` of the answers sampled for each prompt, and for K above 1 ``best@K``, the reward of the best of K, and
    ``maj@K``, the share of right majorities, each with its interval over prompts; and ``reward_sampled``.

    ``best@K`` leaves out prompts of which fewer than K answers have a reward; ``maj@K`` is missing where the first
    reward says of no answer what it took for it.

    Args:
        answers: by prompt and sample; as many for each prompt.
        ks: the K, each at most the samples of a prompt.
        seed: of the bootstrap.
    """
    figures: dict[str, float] = {}
    votes = any(sample.answer is not None for samples in answers for sample in samples)
    known = [[sample.reward for sample in samples if sample.reward is not None] for samples in answers]
    for k in ks:
        values = [pass_at_k(len(samples), sum(sample.right for sample in samples), k) for samples in answers]
        found = {f"pass@{k}": values}
        if k > 1 and votes:
            found[f"maj@{k}"] = [majority_at_k(samples, k) for samples in answers]
        if k > 1 and (best := [best_of_k(rewards, k) for rewards in known if len(rewards) >= k]):
            found[f"best@{k}"] = best
        for name, values in found.items():
            low, high = bootstrap_interval(values, seed, is_share=not name.startswith("best@"))
            figures |= {name: sum(values) / len(values), f"{name}_low": low, f"{name}_high": high}
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


def _mean_reward(name: str, answers: Sequence[Graded]) -> dict[str, float]:
    known = [answer.reward for answer in answers if answer.reward is not None]
    return {name: sum(known) / len(known)} if known else {}
