"""A question with a number as its answer, and a calculator to find it with."""

from __future__ import annotations

import ast
import math
import operator
import re

from forge_hpc.data.types import Prompt
from forge_hpc.environments.base import Step

INSTRUCTIONS = """

You have a calculator: write <calc>12*(3+4)</calc> and you are told the result. Write your final answer without it."""

_CALL = re.compile(r"<calc>(.*?)(?:</calc>|$)", re.DOTALL)
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_MAX_CHARS = 200


class Calculator:
    """Answers ``<calc>EXPRESSION</calc>``; a response without a call is the final answer.

    Args:
        instructions: put after the question.

    The final answer earns 1 where its last number is the last number of the prompt's target, else 0.
    """

    def __init__(self, instructions: str = INSTRUCTIONS) -> None:
        self._instructions = instructions

    async def reset(self, prompt: Prompt) -> str:
        self._target = last_number(prompt.target)
        if self._target is None:
            raise ValueError(f"the target {prompt.target!r} holds no number")
        return prompt.question + self._instructions

    async def step(self, response: str) -> Step:
        if call := _CALL.search(response):
            return Step(calculate(call[1]))
        answer = last_number(response)
        right = answer is not None and math.isclose(answer, self._target or 0.0, rel_tol=1e-9, abs_tol=1e-9)
        return Step(reward=float(right), done=True, info={"answer": answer})

    async def close(self) -> None:
        pass


def last_number(text: str) -> float | None:
    """The last number in a text; thousands may be set off by commas."""
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def calculate(expression: str) -> str:
    """The value of ``+ - * / // % **`` and brackets over numbers, or what is wrong, as text. Bounded in time."""
    if len(expression) > _MAX_CHARS:
        return f"error: longer than {_MAX_CHARS} characters"
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
        return str(int(value)) if value == int(value) and abs(value) < 1e15 else f"{value:.12g}"
    except ZeroDivisionError:
        return "error: division by zero"
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return "error: not an expression that can be computed"


def _value(node: ast.expr) -> float:
    """Computed in floating point, so that no number can grow beyond bounds."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return float(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            value = _OPERATORS[type(op)](_value(left), _value(right))
            if isinstance(value, float) and math.isfinite(value):
                return value
    raise ValueError
