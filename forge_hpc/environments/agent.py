"""What an agent is: a function that plays an episode against an OpenAI-compatible address, and gives its reward.

    async def episode(base_url, api_key, example, **args):
        client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key)
        answer = await client.chat.completions.create(model="policy", messages=[...])
        return 1.0 if answer.choices[0].message.content == example["answer"] else 0.0

It runs in a process and on a thread of its own, as environments do; it may be a plain function too. It returns a
reward, or the text that ``reward`` judges, or both with whatever is worth keeping as
``{"reward": 1.0, "answer": "58", "info": {...}}``, or None.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from forge_hpc.config.errors import UserError

ARGUMENTS = ("base_url", "api_key", "example")
_RESULT = ("reward", "answer", "info")


@dataclass(frozen=True)
class AgentResult:
    """What an agent made of its episode."""

    reward: float | None = None
    answer: str | None = None
    info: dict[str, Any] = field(default_factory=dict)


def is_agent(found: Any) -> bool:
    """Whether what ``environment.name`` names is an agent: a function; environments are classes."""
    return inspect.isfunction(found)


def check_agent(function: Any, name: str, args: Mapping[str, Any]) -> None:
    """Raise UserError where it cannot be called with what agents get and ``environment.args``."""
    try:
        inspect.signature(function).bind(**dict.fromkeys(ARGUMENTS), **args)
    except TypeError as error:
        raise UserError(
            f"the agent {name} cannot be called: {error}",
            f"it takes {', '.join(ARGUMENTS)}, and the keys of environment.args by name",
        ) from None


def plain_result(result: Any) -> dict[str, Any]:
    """What an agent returned, as JSON has it. Raises TypeError or ValueError where it is nothing that agents return."""
    if result is None:
        return {}
    if isinstance(result, str):
        return {"answer": result}
    if not isinstance(result, Mapping):
        result = {"reward": result}
    if unknown := [key for key in result if key not in _RESULT]:
        raise ValueError(f"an agent returns {', '.join(_RESULT)}, not {unknown[0]!r}")
    plain = {key: value for key, value in result.items() if value is not None}
    if "reward" in plain:
        try:
            plain["reward"] = float(plain["reward"])
        except (TypeError, ValueError):
            raise TypeError(f"an agent returns a reward or a text, not a {type(plain['reward']).__name__}") from None
        if not math.isfinite(plain["reward"]):
            raise ValueError(f"the reward is {plain['reward']}")
    if not isinstance(plain.get("answer", ""), str) or not isinstance(plain.get("info", {}), Mapping):
        raise TypeError("the answer of an agent is a text, and its info a dict")
    json.dumps(plain)
    return plain
