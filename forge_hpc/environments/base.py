"""What an environment is: three methods, text in and text out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from forge_hpc.data.tool_calls import BadToolCall, ToolCall, ToolFormat
from forge_hpc.data.types import Prompt

Opening = dict[str, Any] | list[dict[str, str]] | str | None
"""What an episode begins with: chat messages, the text of one user message (without a chat template: the raw prompt),
or None for the prompt as the data has it. With tools that the chat template is told: ``{"messages": any of these,
"tools": [{"type": "function", "function": {…}}]}``."""


@dataclass(frozen=True)
class Step:
    """What the environment makes of a response."""

    observation: str = ""
    """What the policy reads next; nobody reads it where ``done`` is true, beside people in rollouts.jsonl."""
    reward: float | None = 0.0
    """Added to the episode's. By convention a solved episode earns 1 in all: evaluation counts those as right. None is
    no reward yet: an episode without any is left out, unless ``reward`` names others."""
    done: bool = False
    """The episode is over."""
    info: dict[str, Any] = field(default_factory=dict)
    """Whatever else is worth keeping in rollouts.jsonl; JSON. That of the last step is kept."""
    role: str = "user"
    """The observation's role in the chat template: ``user``, or ``tool`` where the template has it."""


class Response(str):
    """What the policy wrote: its text without special tokens."""

    truncated: bool
    """A limit cut it off: it has no end, and perhaps no answer."""
    calls: list[ToolCall]
    """The calls of tools in it, written as the chat template tells its model to; none where it knows of no tools."""
    bad_call: str | None
    """Why what begins as a call of a tool is none, or None."""

    def __new__(cls, text: str, truncated: bool = False, tools: ToolFormat | None = None) -> Response:
        """``tools`` is how calls are written."""
        response = super().__new__(cls, text)
        response.truncated, response.calls, response.bad_call = truncated, [], None
        try:
            response.calls = [] if tools is None else tools.read(text)[1]
        except BadToolCall as error:
            response.bad_call = str(error)
        return response


class EnvironmentFull(Exception):
    """Raised by ``reset`` where there is no room for another episode at the moment: it is tried again later.

    Args:
        limit: episodes that there is room for at once, where that is known: no more are opened from now on.
    """

    def __init__(self, message: str, limit: int | None = None) -> None:
        super().__init__(message)
        self.limit = limit


class Environment(Protocol):
    """One episode's counterpart. Made anew for every episode, as ``Class(**environment.args)``.

    It runs in a process of its own kind, on a thread of its own, where the global generators of ``random`` and
    ``numpy.random`` are its own too: it may block and may seed them, but all its calls together have
    ``environment.timeout_s``. What it raises costs its episode, which is counted and left out.

    Two attributes may bound it, of the class or set by ``__init__``: ``concurrency``, calls at once, and
    ``max_open_episodes``, as in ``environment.max_open_episodes``. A method ``async def check(self)`` may raise what is
    wrong with its arguments, or with a server: it is called before the run begins.
    """

    async def reset(self, prompt: Prompt) -> Opening:
        """Begin. What differs between episodes has to follow from ``prompt`` (``question``, ``target``, ``fields``,
        ``seed``): the episodes of a group are compared with each other, so they must be the same task."""

    async def step(self, response: Response) -> Step:
        """Answer the policy's ``response``: its text without the token that ended it."""

    async def close(self) -> None:
        """Let go of what is held. Called once, also after an error."""
