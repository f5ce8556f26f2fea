"""An environment that is a set of functions: the chat template is told of them, and the policy calls them.

    class Clock(Tools):
        @tool
        def time_in(self, city: str, hours: int = 0) -> str:
            return "the time in a city, some hours from now"

A schema is made of the function's name, the first paragraph of its docstring and its annotations. How a call is written
is the model's affair: it is read in the way of its family (``data/tool_calls.py``). A response without a call is the
final answer.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from forge_hpc.data.tool_calls import ToolCall
from forge_hpc.data.types import Prompt
from forge_hpc.environments.base import Opening, Response, Step

F = TypeVar("F", bound=Callable[..., Any])
_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}


def tool(function: F) -> F:
    """Marks a method that the policy may call. What it returns, async or not, is told as text, or else as JSON; what it
    raises is told too."""
    function._is_tool = True  # type: ignore[attr-defined]
    return function


class Tools:
    """Derive from it, mark methods as ``tool``, and say in ``finish`` what the final answer earns.

    A call that does not parse, of a function that there is not, or with arguments that it does not take is answered
    with what is wrong, and the episode goes on.
    """

    async def reset(self, prompt: Prompt) -> Opening:
        """The prompt as the data has it, and the tools."""
        return {"messages": prompt.question, "tools": [schema(function) for function in self._functions().values()]}

    async def step(self, response: Response) -> Step:
        """The results of the calls, a line each; or what ``finish`` says."""
        if response.bad_call is not None:
            return Step(f"error: this is not a call of a tool: {response.bad_call}", reward=None, role="tool")
        if not response.calls:
            return await self.finish(response)
        results = [await self._call(call) for call in response.calls]
        return Step("\n".join(results), reward=None, role="tool", info={"num_calls": len(results)})

    async def finish(self, response: Response) -> Step:
        """The final answer: by default without a reward of the environment's own, so that ``reward`` judges it."""
        return Step(reward=None, done=True)

    async def close(self) -> None:
        """Nothing to let go of."""

    def _functions(self) -> dict[str, Callable[..., Any]]:
        found = inspect.getmembers(self, lambda member: getattr(member, "_is_tool", False))
        return dict(found)

    async def _call(self, call: ToolCall) -> str:
        functions = self._functions()
        if call.name not in functions:
            return f"error: there is no tool {call.name!r}, there is {', '.join(functions)}"
        function = functions[call.name]
        try:
            bound = inspect.signature(function).bind(**json.loads(call.arguments))
        except TypeError as error:
            return f"error: {call.name}: {error}"
        try:
            if inspect.iscoroutinefunction(function):
                result = await function(*bound.args, **bound.kwargs)
            else:
                result = await asyncio.to_thread(function, *bound.args, **bound.kwargs)
        except Exception as error:  # a call of the policy's may ask for anything
            return f"error: {type(error).__name__}: {error}"
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)


def schema(function: Callable[..., Any]) -> dict[str, Any]:
    """What chat templates are told of a function. Arguments of other types than JSON's are told without one."""
    known = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    kinds = {p.name: _TYPES.get(typing.get_origin(known.get(p.name)) or known.get(p.name, object)) for p in parameters}
    described = (inspect.getdoc(function) or "").partition("\n\n")[0]
    return {
        "type": "function",
        "function": {
            "name": function.__name__,
            "description": " ".join(described.split()),
            "parameters": {
                "type": "object",
                "properties": {name: {} if kind is None else {"type": kind} for name, kind in kinds.items()},
                "required": [p.name for p in parameters if p.default is inspect.Parameter.empty],
            },
        },
    }
