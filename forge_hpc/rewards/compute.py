"""One call of a reward function, with whatever it raises as an answer."""

from __future__ import annotations

import asyncio
import inspect
import traceback
from collections.abc import Awaitable
from typing import Any

from forge_hpc.rewards.registry import RewardFunction

Answer = dict[str, Any]
"""``value`` (float), or ``error`` and perhaps ``hint``."""

_MAX_ERROR_CHARS = 2000


def compute(function: RewardFunction, request: dict[str, Any]) -> Answer:
    """The reward's value for ``prompt``, ``response``, ``target`` and ``fields``; a coroutine is run to its end."""
    try:
        value = function(request["prompt"], request["response"], request["target"], **request["fields"])
        if inspect.isawaitable(value):
            value = asyncio.run(_wait(value))
        return {"value": float(value)}
    except Exception as error:  # a user's function may raise anything; the caller counts it
        return {"error": describe(error)}


def describe(error: BaseException) -> str:
    """What was raised, and the line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error}"[:_MAX_ERROR_CHARS] + f" ({frame.filename}:{frame.lineno})"


async def _wait(value: Awaitable[float]) -> float:
    return await value
