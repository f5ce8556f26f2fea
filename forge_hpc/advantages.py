"""Advantages: how the rewards of a step's groups compare. Pure functions, all groups of a step in, all out.

Most compare within a group only; those called batch_... and ``gdpo`` look at the whole step, so advantages are computed
when its groups are complete. A new one is a function here and a line in ``config.registry``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from forge_hpc.config.errors import UserError
from forge_hpc.config.registry import ADVANTAGES
from forge_hpc.config.user_code import load_user_code

_EPS = 1e-6
Terms = Mapping[str, tuple[float, Sequence[float]]]
"""The rewards of one group apart, by name: the weight of each, and its values [G]."""
StepAdvantage = Callable[[Sequence[Any]], list[np.ndarray]]
"""From what all groups of a step got, their rewards or their ``Terms``, to their advantages."""


def sees_step(function: StepAdvantage) -> StepAdvantage:
    """Mark an advantage that looks at all groups of a step; others get the rewards of one group."""
    function.sees_step = True  # type: ignore[attr-defined]
    return function


def sees_terms(function: StepAdvantage) -> StepAdvantage:
    """Mark one that gets the ``Terms`` of each group of a step in place of their weighted sums."""
    function.sees_terms = True  # type: ignore[attr-defined]
    return sees_step(function)


def group_mean(rewards: Sequence[float]) -> np.ndarray:
    """A_i = r_i - mean(r): Dr. GRPO, https://arxiv.org/abs/2503.20783.

    Args:
        rewards: [G] of one group; equal rewards give zeros. Returns [G] float32.
    """
    return _centred(rewards).astype(np.float32)


def group_mean_std(rewards: Sequence[float]) -> np.ndarray:
    """A_i = (r_i - mean(r)) / (std(r) + 1e-6), the population's std: GRPO, https://arxiv.org/abs/2402.03300.

    Args:
        rewards: [G] of one group; equal rewards give zeros. Returns [G] float32.
    """
    return _normalized(rewards).astype(np.float32)


def group_mean_mean(rewards: Sequence[float]) -> np.ndarray:
    """A_i = (r_i - mean(r)) / (mean(|r|) + 1e-6): MaxRL, https://arxiv.org/abs/2602.02710, which has rewards of 0 and
    1. There a right answer weighs the more the fewer there are: what is followed comes close to the gradient of the log
    of the probability to answer right, not of that probability.

    Args:
        rewards: [G] of one group; equal rewards give zeros. Returns [G] float32.
    """
    return (_centred(rewards) / (np.mean(np.abs(rewards)) + _EPS)).astype(np.float32)


def leave_one_out(rewards: Sequence[float]) -> np.ndarray:
    """A_i = r_i - mean of the others' rewards: RLOO, https://arxiv.org/abs/2402.14740.

    Args:
        rewards: [G] of one group; a group of one has no others and gives 0. Returns [G] float32.
    """
    num = len(rewards)
    return (_centred(rewards) * (num / (num - 1) if num > 1 else 0.0)).astype(np.float32)


@sees_step
def group_mean_batch_std(groups: Sequence[Sequence[float]]) -> list[np.ndarray]:
    """A_i = (r_i - mean(r of its group)) / (std over the step of that + 1e-6): REINFORCE++ with a group baseline,
    https://arxiv.org/abs/2501.03262. Unlike ``group_mean_std``, a group that is nearly unanimous is not blown up.

    Args:
        groups: rewards, [G_k] for each group k of a step. Returns [G_k] float32 for each.
    """
    centred = [_centred(rewards) for rewards in groups]
    std = np.concatenate(centred).std()  # about a mean of 0
    return [(values / (std + _EPS)).astype(np.float32) for values in centred]


@sees_step
def batch_mean_std(groups: Sequence[Sequence[float]]) -> list[np.ndarray]:
    """A_i = (r_i - mean over the step) / (std over the step + 1e-6): REINFORCE++, https://arxiv.org/abs/2501.03262.
    A group whose rewards are all equal carries a signal too: it is better or worse than the others.

    Args:
        groups: rewards, [G_k] for each group k of a step. Returns [G_k] float32 for each.
    """
    every = np.concatenate([np.asarray(rewards, np.float64) for rewards in groups])
    values = (_centred(every) / (every.std() + _EPS)).astype(np.float32)
    return np.split(values, np.cumsum([len(rewards) for rewards in groups])[:-1])


@sees_terms
def gdpo(groups: Sequence[Terms]) -> list[np.ndarray]:
    """Several rewards, each compared in its group by itself: GDPO, https://arxiv.org/abs/2601.05242. With reward k of
    weight w_k, r_ik its value for the group's i-th answer:

        a_i = sum_k w_k (r_ik - mean(r_k)) / (std(r_k) + 1e-6)     mean and std over the group
        A_i = a_i / (std of a over the step + 1e-6)                whose mean over the step is 0

    So a reward counts by its weight, whatever its spread, and answers whose weighted sums are equal may differ. As in
    ``group_mean_std`` the std is the population's.

    Args:
        groups: of a step. Returns [G_k] float32 for each; a group in which no reward differs gets zeros.
    """
    summed = [np.sum([w * _normalized(rewards) for w, rewards in terms.values()], axis=0) for terms in groups]
    std = np.concatenate(summed).std()
    return [(values / (std + _EPS)).astype(np.float32) for values in summed]


def _normalized(rewards: Sequence[float]) -> np.ndarray:
    """(r - mean(r)) / (std(r) + 1e-6) in float64."""
    return _centred(rewards) / (np.std(rewards) + _EPS)


def _centred(rewards: Sequence[float] | np.ndarray) -> np.ndarray:
    """r - mean(r) in float64, exactly zero where all are equal: a rounding error is no signal."""
    r = np.asarray(rewards, np.float64)
    return r - r.mean() if r.min() < r.max() else np.zeros_like(r)


def advantage_function(name: str) -> StepAdvantage:
    """The function of that name, from the rewards of all groups of a step, or their terms, to their advantages.

    No group may be empty.

    Which one a run takes tells ``config.algorithm.resolve_advantage``.

    Raises:
        UserError: an unknown name.
    """
    if name not in ADVANTAGES:
        raise UserError(f"unknown advantage {name!r}", f"algorithm.advantage is one of {', '.join(ADVANTAGES)}")
    function = load_user_code(ADVANTAGES[name], "advantage")
    if getattr(function, "sees_step", False):
        return function
    return lambda groups: [function(rewards) for rewards in groups]
