"""Reward for a program that passes its tests."""
from __future__ import annotations
from typing import Any


class CodeReward:
    def __call__(self, prompt: str, response: str, target: str, **fields: Any) -> float:
        raise NotImplementedError
