"""Advantages: how the rewards of a group compare with each other. Pure functions, one group in, one group out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from forge_hpc.config.errors import UserError

_EPS = 1e-6


def group_mean(rewards: Sequence[float]) -> np.ndarray:
    """A_i = r_i - mean(r): Dr. GRPO, https://arxiv.org/abs/2503.20783.

    Args:
        rewards: [G] of one group. Returns [G] float32.
    """
    r = np.asarray(rewards, np.float64)
    return (r - r.mean()).astype(np.float32)


def group_mean_std(rewards: Sequence[float]) -> np.ndarray:
    """A_i = (r_i - mean(r)) / (std(r) + 1e-6), the population's std: GRPO, https://arxiv.org/abs/2402.03300.

    Args:
        rewards: [G] of one group; equal rewards give zeros. Returns [G] float32.
    """
    r = np.asarray(rewards, np.float64)
    return ((r - r.mean()) / (r.std() + _EPS)).astype(np.float32)


def leave_one_out(rewards: Sequence[float]) -> np.ndarray:
    """A_i = r_i - mean of the others' rewards: RLOO, https://arxiv.org/abs/2402.14740.

    Args:
        rewards: [G] of one group; a group of one has no others and gives 0. Returns [G] float32.
    """
    r = np.asarray(rewards, np.float64)
    if len(r) < 2:
        return np.zeros(len(r), np.float32)
    return ((r - r.mean()) * len(r) / (len(r) - 1)).astype(np.float32)


ADVANTAGES: dict[str, Callable[[Sequence[float]], np.ndarray]] = {
    "group_mean_std": group_mean_std,
    "group_mean": group_mean,
    "leave_one_out": leave_one_out,
}


def advantage_function(name: str) -> Callable[[Sequence[float]], np.ndarray]:
    """The function named by ``algorithm.advantage``.

    Raises:
        UserError: an unknown name.
    """
    if name not in ADVANTAGES:
        raise UserError(f"unknown advantage {name!r}", f"algorithm.advantage is one of {', '.join(ADVANTAGES)}")
    return ADVANTAGES[name]
