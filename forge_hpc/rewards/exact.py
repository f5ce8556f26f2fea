"""Reward for saying exactly the reference answer."""

from __future__ import annotations

from typing import Any


class ExactReward:
    """1.0 where the response is the target, apart from white space around it, else 0.0. No options."""

    def __call__(self, prompt: str, response: str, target: str, **fields: Any) -> float:
        return float(response.strip() == target.strip())
