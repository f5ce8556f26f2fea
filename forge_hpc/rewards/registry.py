"""From the name of a reward in the configuration to the function."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from forge_hpc.config.errors import UserError
from forge_hpc.config.user_code import load_user_code
from forge_hpc.rewards.exact import exact_reward
from forge_hpc.rewards.gsm8k import gsm8k_reward
from forge_hpc.rewards.math import math_reward
from forge_hpc.rewards.overlong import overlong_reward

RewardFunction = Callable[..., float | Awaitable[float]]

BUILTIN_REWARDS: dict[str, RewardFunction] = {
    "exact": exact_reward,
    "gsm8k": gsm8k_reward,
    "math": math_reward,
    "overlong": overlong_reward,
}
INLINE_REWARDS = {name: BUILTIN_REWARDS[name] for name in ("exact", "gsm8k", "overlong")}
"""Built-in rewards so quick and so safe that they need no process of their own."""
PENALTIES = ("overlong",)
"""Built-in rewards that are 0 at best: they say how an answer was given, not whether it is right."""


def load_reward(name: str) -> RewardFunction:
    """The function that `name` means: a built-in one, ``package.module:function`` or ``path/to/file.py:function``.

    Runs the user's module. Raises UserError where there is no such thing.
    """
    if name in BUILTIN_REWARDS:
        return BUILTIN_REWARDS[name]
    if ":" not in name:
        raise UserError(
            f"unknown reward {name!r}",
            f"one of {', '.join(BUILTIN_REWARDS)}, or package.module:function, or file.py:function",
        )
    return load_user_code(name, "reward")
