"""Reward for saying exactly the reference answer."""

from __future__ import annotations

from typing import Any


def exact_reward(prompt: str, response: str, target: str, **fields: Any) -> float:
    """1.0 where the response is the target, apart from white space around it, else 0.0."""
    return float(response.strip() == target.strip())
