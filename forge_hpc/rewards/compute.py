"""One call of a reward, with whatever it raises as an answer."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable
from typing import Any

from forge_hpc.rewards.load import Reward
from forge_hpc.workers.channel import Answer, failure


def compute(reward: Reward, request: dict[str, Any]) -> Answer:
    """The reward's ``value`` for ``prompt``, ``response``, ``target`` and ``fields``, and its ``figures`` by name; a
    coroutine is run to its end. With ``show`` in the request also what it took for the answer, ``read``, where it has a
    method ``read_answer(prompt, response)``, else None."""
    try:
        value = reward(request["prompt"], request["response"], request["target"], request["fields"])
        return _answer(reward, request, asyncio.run(_wait(value)) if inspect.isawaitable(value) else value)
    except Exception as error:  # a user's reward may raise anything; the caller counts it
        return failure(error)


async def compute_async(reward: Reward, request: dict[str, Any]) -> Answer:
    """The same for an async reward, beside others."""
    try:
        value: Any = reward(request["prompt"], request["response"], request["target"], request["fields"])
        return _answer(reward, request, await value)
    except Exception as error:
        return failure(error)


def _answer(reward: Reward, request: dict[str, Any], value: Any) -> Answer:
    """What a reward gave, a number or a number and figures by name, as an answer. Raises what is neither."""
    value, figures = value if isinstance(value, tuple) else (value, {})
    answer: Answer = {"value": float(value), "figures": {str(name): float(n) for name, n in dict(figures).items()}}
    if request.get("show"):
        read_answer = getattr(reward.function, "read_answer", None)
        answer["read"] = None if read_answer is None else read_answer(request["prompt"], request["response"])
    return answer


async def _wait(value: Awaitable[Any]) -> Any:
    return await value
