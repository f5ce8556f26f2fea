"""What an environment is: three methods, text in and text out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from forge_hpc.data.types import Prompt

Opening = list[dict[str, str]] | str | None
"""What an episode begins with: chat messages, the text of one user message (without a chat template: the raw prompt),
or None for the prompt as the data has it."""


@dataclass(frozen=True)
class Step:
    """What the environment makes of a response."""

    observation: str = ""
    """What the policy reads next; nobody reads it where ``done`` is true, beside people in rollouts.jsonl."""
    reward: float = 0.0
    """Added to the episode's. By convention a solved episode earns 1 in all: evaluation counts those as right."""
    done: bool = False
    """The episode is over."""
    info: dict[str, Any] = field(default_factory=dict)
    """Whatever else is worth keeping in rollouts.jsonl; JSON. That of the last step is kept."""
    role: str = "user"
    """The observation's role in the chat template: ``user``, or ``tool`` where the template has it."""


class Environment(Protocol):
    """One episode's counterpart. Made anew for every episode, as ``Class(**environment.args)``.

    It runs in a process of its own kind, on a thread of its own: it may block, but all its calls together have
    ``environment.timeout_s``. What it raises costs its episode, which is counted and left out.
    """

    async def reset(self, prompt: Prompt) -> Opening:
        """Begin. What differs between episodes has to follow from ``prompt`` (``question``, ``target``, ``fields``,
        ``position``): the episodes of a group are compared with each other, so they must be the same task."""

    async def step(self, response: str) -> Step:
        """Answer the policy's ``response``: its text without the token that ended it."""

    async def close(self) -> None:
        """Let go of what is held. Called once, also after an error."""
