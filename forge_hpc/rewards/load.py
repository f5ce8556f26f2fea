"""From the name of a reward in the configuration to something that can be called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.config.registry import REWARDS
from forge_hpc.config.rewards import SIGNATURE
from forge_hpc.config.user_code import load_user_code

INLINE_REWARDS = ("exact", "numeric", "gsm8k", "thinking", "length", "repetition")
"""Built-in rewards so quick and so safe that they need no process of their own: linear in the response's length."""


@dataclass
class Reward:
    """A reward that is ready to be called."""

    function: Callable[..., Any]
    """Gives a number, or a number and a mapping of figures by name; or a coroutine that does."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of each call, over the fields of the example."""

    def __call__(self, prompt: str, response: str, target: str, fields: Mapping[str, Any]) -> Any:
        return self.function(prompt, response, target, **{**fields, **self.args})

    @property
    def is_async(self) -> bool:
        """Whether calls give a coroutine."""
        return any(map(inspect.iscoroutinefunction, (self.function, type(self.function).__call__)))

    @property
    def traits(self) -> dict[str, Any]:
        """``is_async``; and ``timeout_s``, ``concurrency`` and ``per_node``, None unless the reward has such an
        attribute."""
        own = {name: getattr(self.function, name, None) for name in ("timeout_s", "concurrency", "per_node")}
        numbers = {n: v if isinstance(v, int | float) and v > 0 else None for n, v in own.items()}
        return {**numbers, "is_async": self.is_async}


def load_reward(name: str, args: Mapping[str, Any] | None = None) -> Reward:
    """The reward that `name` means: a built-in one, ``package.module:name`` or ``path/to/file.py:name``.

    A class becomes an instance, made with `args`. Runs the user's module. Raises UserError where there is no such
    thing, or it cannot be called as ``(prompt, response, target, **fields)``, or does not take `args`.
    """
    if name not in REWARDS and ":" not in name:
        raise UserError(
            f"unknown reward {name!r}", f"one of {', '.join(REWARDS)}, or package.module:name, or file.py:name"
        )
    found = load_user_code(REWARDS.get(name, name), "reward")
    args = dict(args or {})
    reward = Reward(_instance(found, args)) if inspect.isclass(found) else Reward(found, args)
    _check_signature(reward.function)
    return reward


def _instance(cls: type, args: dict[str, Any]) -> Any:
    try:
        inspect.signature(cls).bind(**args)
    except TypeError as error:
        raise UserError(f"args: {error}", f"{cls.__name__}{inspect.signature(cls)}") from None
    instance = cls(**args)
    if not callable(instance):
        raise UserError(f"{cls.__name__} has no __call__", f"define __call__(self, {SIGNATURE[1:]}")
    return instance


def _check_signature(function: Callable[..., Any]) -> None:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # some functions in C do not tell
        return
    kinds = [p.kind for p in parameters]
    positional = sum(kind in (kind.POSITIONAL_ONLY, kind.POSITIONAL_OR_KEYWORD) for kind in kinds)
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        raise UserError("it does not take **fields", f"it gets every field of the example: {SIGNATURE} -> float")
    if positional < 3 and inspect.Parameter.VAR_POSITIONAL not in kinds:
        raise UserError("it takes too few arguments", f"its signature is {SIGNATURE} -> float")
