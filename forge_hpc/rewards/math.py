"""Reward for an answer that is mathematically the reference answer, by ``math-verify``."""

from __future__ import annotations

from typing import Any


def math_reward(prompt: str, response: str, target: str, **fields: Any) -> float:
    r"""1.0 where the answer found in the response (``\boxed{}``, LaTeX or a plain expression) equals the target.

    Raises ValueError where the target itself cannot be read. It runs in the main thread of a worker process only:
    math-verify's own time limits are signals.
    """
    from math_verify import parse, verify

    wanted = parse(target) or parse(rf"\boxed{{{target}}}")
    if not wanted:
        raise ValueError(f"the target is no mathematics: {target[:80]!r}")
    return float(verify(wanted, parse(response)))
