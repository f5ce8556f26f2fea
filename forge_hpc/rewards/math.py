"""Reward for an answer that is mathematically the reference answer."""

from __future__ import annotations

import logging
from typing import Any

from forge_hpc.rewards.answers import marked_answer, numbers, plain_number


class MathReward:
    r"""1.0 where the answer of the response equals the target, else 0.0 (or ``partial_credit``).

    The answer is what stands in the last ``<answer>…</answer>``, else after the last ``####``, else what
    ``math-verify`` finds in the text after the thinking: ``\boxed{}``, LaTeX, or a plain expression. Two plain numbers
    are equal where they differ by at most ``tolerance``; all else is compared as mathematics by ``math-verify``: 1/2 is
    0.5 and (x+1)^2 is x^2+2x+1.

    Args:
        tolerance: largest |difference| of two plain numbers that are still the same.
        partial_credit: for a wrong answer in a response that has the target's number elsewhere.
        limit_s: whole seconds that reading an answer and comparing it may take, each; beyond that it is wrong.
            ``math-verify`` counts them by signals, so this reward runs in the main thread of a process only, and what
            no signal interrupts is ended by the reward's ``timeout_s``, by default a second more than all of it.
    Raises ValueError where the target itself cannot be read.
    """

    def __init__(self, tolerance: float = 1e-6, partial_credit: float = 0.0, limit_s: int = 3) -> None:
        self.tolerance = tolerance
        self.partial_credit = partial_credit
        self.limit_s = limit_s
        self.timeout_s = 1.0 + 3 * limit_s  # the target is read, the answer is read, they are compared
        # It warns of each answer that it gives up on, with all of its text.
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        self._equal(r"\frac{1}{2}", "0.5x", marked=True)  # the first time takes seconds, which are no call's

    def __call__(self, prompt: str, response: str, target: str, **fields: Any) -> float:
        marked = marked_answer(target)
        wanted = target if marked is None else marked
        said = response.rpartition("</think>")[2]
        answer = marked_answer(said)
        if self._equal(wanted, said if answer is None else answer, marked=answer is not None):
            return 1.0
        number = plain_number(wanted)
        if self.partial_credit and number is not None and number in numbers(response):
            return self.partial_credit
        return 0.0

    def _equal(self, wanted: str, answer: str, *, marked: bool) -> bool:
        from math_verify import verify

        a, b = plain_number(wanted), plain_number(answer)
        if a is not None and b is not None:
            return a == b or abs(a - b) <= self.tolerance
        gold = self._parse(wanted, whole=True)
        if not gold:
            raise ValueError(f"the target is no mathematics: {wanted[:80]!r}")
        return bool(verify(gold, self._parse(answer, whole=marked), timeout_seconds=self.limit_s))

    def _parse(self, text: str, *, whole: bool) -> list[Any]:
        """The expressions in `text`, which is one itself where `whole`, unless it marks one."""
        from math_verify import parse

        bare = "$" not in text and r"\boxed" not in text
        return parse(rf"\boxed{{{text}}}" if whole and bare else text, parsing_timeout=self.limit_s)
