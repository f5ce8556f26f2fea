"""DAPO's soft punishment of answers that come close to the token limit (https://arxiv.org/abs/2503.14476)."""

from __future__ import annotations

from typing import Any


def overlong_reward(
    prompt: str,
    response: str,
    target: str,
    *,
    num_response_tokens: int,
    max_response_tokens: int,
    buffer_tokens: int,
    **fields: Any,
) -> float:
    """From 0 down to -1 over the last ``buffer_tokens`` of ``max_response_tokens``. With n tokens:

        0                        n <= max - buffer
        (max - buffer - n) / buffer       between
        -1                       n >= max

    A penalty to add to other rewards; their weights say how much it counts. The pool gives the number of tokens and
    ``rollout.max_response_tokens``; ``buffer_tokens`` comes from the reward's ``args``.
    """
    return min(0.0, max(-1.0, (max_response_tokens - buffer_tokens - num_response_tokens) / buffer_tokens))
