"""Rewards: ``(prompt, response, target, **fields) -> float``, and the pool that runs them. See docs/rewards.md."""

from forge_hpc.rewards.code import CodeReward
from forge_hpc.rewards.errors import RewardError
from forge_hpc.rewards.exact import ExactReward
from forge_hpc.rewards.format import FormatReward
from forge_hpc.rewards.judge import LLMJudgeReward
from forge_hpc.rewards.length import LengthReward
from forge_hpc.rewards.math import MathReward
from forge_hpc.rewards.model import ModelReward
from forge_hpc.rewards.numeric import NumericReward
from forge_hpc.rewards.pool import RewardPool, RewardPools
from forge_hpc.rewards.repetition import RepetitionReward
from forge_hpc.rewards.thinking import ThinkingReward

__all__ = [
    "CodeReward",
    "ExactReward",
    "FormatReward",
    "LLMJudgeReward",
    "LengthReward",
    "MathReward",
    "ModelReward",
    "NumericReward",
    "RepetitionReward",
    "RewardError",
    "RewardPool",
    "RewardPools",
    "ThinkingReward",
]
