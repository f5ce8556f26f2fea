"""One call of a reward, with whatever it raises as an answer."""

from __future__ import annotations

import asyncio
import inspect
import traceback
from collections.abc import Awaitable
from typing import Any

from forge_hpc.rewards.registry import Reward

Answer = dict[str, Any]
"""``value`` (float); or ``error``, ``kind`` (of RewardError) and perhaps ``hint``."""

_MAX_ERROR_CHARS = 2000


def compute(reward: Reward, request: dict[str, Any]) -> Answer:
    """The reward's value for ``prompt``, ``response``, ``target`` and ``fields``; a coroutine is run to its end."""
    try:
        value = reward(request["prompt"], request["response"], request["target"], request["fields"])
        return {"value": float(asyncio.run(_wait(value)) if inspect.isawaitable(value) else value)}
    except Exception as error:  # a user's reward may raise anything; the caller counts it
        return failure(error)


async def compute_async(reward: Reward, request: dict[str, Any]) -> Answer:
    """The same for an async reward, beside others."""
    try:
        value: Any = reward(request["prompt"], request["response"], request["target"], request["fields"])
        return {"value": float(await value)}
    except Exception as error:
        return failure(error)


def failure(error: BaseException) -> Answer:
    """What was raised, and the line that raised it: the end of its traceback in one line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    kind = "memory" if isinstance(error, MemoryError) else "timeout" if isinstance(error, TimeoutError) else "raised"
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return {"error": f"{text[:_MAX_ERROR_CHARS]} ({frame.filename}:{frame.lineno})", "kind": kind}


async def _wait(value: Awaitable[float]) -> float:
    return await value
