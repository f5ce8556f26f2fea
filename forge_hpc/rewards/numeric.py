"""Reward for the right final number, as GSM8K writes it (Cobbe et al. 2021, https://arxiv.org/abs/2110.14168)."""

from __future__ import annotations

from typing import Any

from forge_hpc.rewards.answers import after_thinking, marked_answer
from forge_hpc.rewards.numbers import Number, as_tolerance, first_number, last_number, plain_number, same_number


class NumericReward:
    """1.0 where the final number of the response is that of the target, else 0.0.

    The final number is the first one in what the last mark holds (``forge_hpc.rewards.answers``), else the last of the
    text after the thinking. Separators of thousands, signs of currencies, fractions and powers of ten are understood.

    Args:
        tolerance: largest |difference| of two numbers that are still the same, of a target below 1 that share of it.
    Raises ValueError where the target holds no number.
    """

    def __init__(self, tolerance: float = 1e-6) -> None:
        self.tolerance = as_tolerance(tolerance)

    def __call__(self, prompt: str, response: str, target: str, **fields: Any) -> float:
        wanted, given = final_number(target), final_number(after_thinking(prompt, response))
        if wanted is None:
            raise ValueError(f"the target holds no number: {target[:80]!r}")
        return float(given is not None and same_number(wanted, given, self.tolerance))

    def read(self, prompt: str, response: str) -> str | None:
        """The number that a response is judged by."""
        number = final_number(after_thinking(prompt, response))
        return None if number is None else number.text


def final_number(text: str) -> Number | None:
    """The number that `text` ends up with, by the rule of ``NumericReward``."""
    marked = marked_answer(text)
    if marked is None:
        return last_number(text)
    # m + n = 256 + 37 = 293
    return plain_number(marked) or first_number(marked.rpartition("=")[2])
