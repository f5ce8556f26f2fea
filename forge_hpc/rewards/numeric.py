"""Reward for the right final number, as GSM8K writes it (Cobbe et al. 2021, https://arxiv.org/abs/2110.14168)."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from forge_hpc.rewards.answers import marked_answer, numbers


class NumericReward:
    """1.0 where the final number of the response is that of the target, else 0.0.

    The final number is the first one in the last ``<answer>…</answer>``, else the first after the last ``####``, else
    the last of the text. Thousands separators and a dollar sign are understood.

    Args:
        tolerance: largest |difference| of two numbers that are still the same.
    Raises ValueError where the target holds no number.
    """

    def __init__(self, tolerance: float = 1e-6) -> None:
        self.tolerance = Decimal(tolerance)

    def __call__(self, prompt: str, response: str, target: str, **fields: Any) -> float:
        wanted, given = final_number(target), final_number(response)
        if wanted is None:
            raise ValueError(f"the target holds no number: {target[:80]!r}")
        return float(given is not None and (given == wanted or abs(given - wanted) <= self.tolerance))


def final_number(text: str) -> Decimal | None:
    """The number that `text` ends up with, by the rule of ``NumericReward``."""
    marked = marked_answer(text)
    if marked is not None and (found := numbers(marked)):
        return found[0]
    found = numbers(text)
    return found[-1] if found else None
