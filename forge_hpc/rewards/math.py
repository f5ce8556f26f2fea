"""Reward for an answer that is mathematically the reference answer."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

from forge_hpc.rewards.answers import after_thinking, final_answer, marked_answer
from forge_hpc.rewards.equality import clean, same_answer
from forge_hpc.rewards.numbers import as_tolerance, numbers, plain_number

_PRECISION, _AGREE = 60, 40
"""Digits that two values are computed to, and those that have to agree."""
_MAX_CHARS = 5000
"""A longer answer is wrong."""


class MathReward:
    r"""1.0 where the answer of the response equals the target, else 0.0 (or ``partial_credit``).

    The answer is what the last mark after the thinking holds, else what the text says "the answer is", else its last
    formula or number (``forge_hpc.rewards.answers``). Letters of choices, numbers and their units, lists, equations and
    words are compared by their form (``forge_hpc.rewards.equality``), and expressions as mathematics by
    ``math-verify``: 1/2 is 0.5 and (x+1)^2 is x^2+2x+1.

    Args:
        tolerance: largest |difference| of two numbers that are still the same, of a target below 1 that share of it.
        partial_credit: for a wrong answer in a response that has the target's number elsewhere.
        limit_s: seconds that reading the target and comparing the answer may take, each; beyond that it is wrong. They
            are counted by signals, so this reward runs in the main thread of a process only, and what no signal
            interrupts is ended by the reward's ``timeout_s``, by default a second more than three times as long.
    Raises ValueError where the target itself cannot be read.
    """

    def __init__(self, tolerance: float = 1e-6, partial_credit: float = 0.0, limit_s: float = 3.0) -> None:
        if not limit_s > 0:
            raise ValueError(f"limit_s={limit_s} must be greater than 0 seconds")
        self.tolerance = as_tolerance(tolerance)
        self.partial_credit = partial_credit
        self.limit_s = limit_s
        self.timeout_s = 1.0 + 3 * limit_s
        # It warns that it counts no time, and of each answer that it gives up on, with all of its text.
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        self._read_target = functools.lru_cache(maxsize=1000)(self._parse_target)
        self._compare(r"\frac{1}{2}", "0.5x")  # the first time takes seconds, which are no call's

    def __call__(self, prompt: str, response: str, target: str, **fields: Any) -> float:
        wanted = self._read_target(target)
        answer = self.read(prompt, response)
        if answer is not None and len(answer) <= _MAX_CHARS and self._answers(wanted, answer):
            return 1.0
        number = plain_number(wanted)
        if self.partial_credit and number and any(n.value == number.value for n in numbers(response)):
            return self.partial_credit
        return 0.0

    def read(self, prompt: str, response: str) -> str | None:
        """The answer that a response is judged by."""
        return final_answer(after_thinking(prompt, response))

    def _parse_target(self, target: str) -> str:
        marked = marked_answer(target)
        wanted = clean(target if marked is None else marked)
        if not wanted.strip("${}\\ "):
            raise ValueError(f"the target is no mathematics: {target[:80]!r}")
        return wanted

    def _answers(self, wanted: str, answer: str) -> bool:
        try:
            with _time_limit(self.limit_s):
                return same_answer(wanted, answer, self.tolerance, self._compare)
        except (_TimeIsUp, RecursionError, OverflowError):
            return False

    def _compare(self, wanted: str, answer: str) -> bool:
        from math_verify import verify

        gold, given = _parse(wanted), _parse(answer)
        if not gold or not given:
            return False
        values = [_numeric(expressions[0]) for expressions in (gold, given)]
        if values[0] is not None and values[1] is not None:
            return self._same_values(gold[0], given[0], *values)
        if _same_curve(gold[0], given[0]):
            return True
        if not verify(gold, given, allow_set_relation_comp=True, timeout_seconds=None):
            return False
        return _agree_somewhere(gold[0], given[0])

    def _same_values(self, gold: Any, given: Any, a: Any, b: Any) -> bool:
        from sympy import Float, simplify

        size = max(abs(a), abs(b))
        if gold.has(Float) or given.has(Float):
            return bool(abs(a - b) <= float(self.tolerance) * min(1, abs(a)) * (1 + 1e-9))
        if size > 10 ** (-_AGREE):
            return bool(abs(a - b) <= size * 10 ** (-_AGREE))
        return gold == given or bool(simplify(gold - given) == 0)


def _parse(text: str) -> list[Any]:
    """The expression that all of a text is, and its normal form; nothing where it is none."""
    from math_verify import LatexExtractionConfig, parse

    return parse(rf"\boxed{{{_as_latex(text)}}}", [LatexExtractionConfig()], parsing_timeout=None)


_NAMES = r"sqrt|(?:arc)?sin|(?:arc)?cos|(?:arc)?tan|cot|sec|csc|ln|log|exp|pi|alpha|beta|theta"
_FUNCTIONS = re.compile(rf"(?<![\\A-Za-z])({_NAMES})(?![A-Za-z])")
_LATEX = {
    **{
        "**": "^",
        "<=": r"\le ",
        ">=": r"\ge ",
        "*": r"\cdot ",
        "\u2264": r"\le ",
        "\u2265": r"\ge ",
        "\u03c0": r"\pi ",
    },
    **{
        "\u221e": r"\infty ",
        "\u222a": r"\cup ",
        "\u00b2": "^2",
        "\u00b3": "^3",
        "\u221a": r"\sqrt ",
        "\u00bd": r"\frac12",
    },
    r"\varnothing": r"\emptyset",
}


def _as_latex(text: str) -> str:
    r"""Plain text as LaTeX: ``sqrt(2)``, ``x**10``, ``2*pi``, ``>=``. LaTeX itself stays, apart from ``2^10``, which is
    meant as ``2^{10}``."""
    for plain, latex in _LATEX.items():
        text = text.replace(plain, latex)
    text = _FUNCTIONS.sub(r"\\\1", text)
    text = re.sub(r"\\sqrt\s?\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\^\s?(-?\d{2,}|-\d|-[a-z])", r"^{\1}", text)
    return re.sub(r"\^\(([^()]*)\)", r"^{\1}", text)


def _numeric(expression: Any) -> Any:
    """The value of an expression without a variable, to ``_PRECISION`` digits; None where it has none."""
    from sympy import Expr, nan, zoo

    if not isinstance(expression, Expr) or expression.free_symbols:
        return None
    try:
        value = expression.doit().evalf(_PRECISION)
    except Exception:  # whatever sympy cannot evaluate is compared by math-verify
        return None
    return value if value.is_number and value.is_finite and value not in (nan, zoo) and not value.has(nan) else None


def _same_curve(gold: Any, given: Any) -> bool:
    """Whether two equations are multiples of each other: 2x + 4y = 3 and y = 3/4 - x/2."""
    from sympy import Eq, simplify

    if not isinstance(gold, Eq) or not isinstance(given, Eq):
        return False
    ratio = simplify((gold.lhs - gold.rhs) / (given.lhs - given.rhs))
    return bool(ratio.is_number and ratio.is_finite and ratio != 0)


def _agree_somewhere(gold: Any, given: Any) -> bool:
    """Whether two expressions that were found equal have the same value at a point: what is small counts too."""
    from sympy import Expr, Rational

    if not isinstance(gold, Expr) or not isinstance(given, Expr):
        return True
    symbols = sorted(gold.free_symbols | given.free_symbols, key=str)
    point = {symbol: Rational(10 * i + 7, 10 * i + 4) for i, symbol in enumerate(symbols)}
    a, b = (_numeric(expression.subs(point)) for expression in (gold, given))
    if a is None or b is None:
        return True
    return bool(abs(a - b) <= max(abs(a), abs(b), 10**-300) * 1e-6)


class _TimeIsUp(BaseException):
    """No Exception, or sympy would swallow it."""


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise _TimeIsUp in what takes longer, again and again, as some of it catches everything."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
