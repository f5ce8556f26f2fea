"""Rewards: functions ``(prompt, response, target, **fields) -> float``, and the pool that runs them."""

from forge_hpc.rewards.pool import RewardError, RewardPool
from forge_hpc.rewards.registry import BUILTIN_REWARDS

__all__ = ["BUILTIN_REWARDS", "RewardError", "RewardPool"]
