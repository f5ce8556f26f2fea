"""Reward for keeping within a length."""

from __future__ import annotations

from typing import Any


class LengthReward:
    """1.0 up to ``max_tokens - ramp_tokens`` tokens, from there down in a line to 0.0 at ``max_tokens`` and beyond.

    With n the response's length in tokens: min(1, max(0, (max_tokens - n) / ramp_tokens)). This is the soft overlong
    punishment of DAPO (https://arxiv.org/abs/2503.14476, eq. 13) plus one; a constant moves no advantage.

    Args:
        max_tokens: length from which on there is nothing to gain.
        ramp_tokens: width of the slope before it; 0 makes it a step.
    Raises ValueError for a ramp that is negative or longer than ``max_tokens``.
    """

    def __init__(self, max_tokens: int, ramp_tokens: int = 0) -> None:
        if not 0 <= ramp_tokens <= max_tokens:
            raise ValueError(f"ramp_tokens={ramp_tokens} must be from 0 to max_tokens={max_tokens}")
        self.max_tokens = max_tokens
        self.ramp_tokens = ramp_tokens

    def __call__(self, prompt: str, response: str, target: str, *, num_tokens: int, **fields: Any) -> float:
        left = self.max_tokens - num_tokens
        return float(left >= 0) if self.ramp_tokens == 0 else min(1.0, max(0.0, left / self.ramp_tokens))
