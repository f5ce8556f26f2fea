"""A server of openenv's own MCPEnvironment, with two tools. Runs where ``openenv`` is installed, not where we are."""

from __future__ import annotations

import os
from typing import Any

from fastmcp import FastMCP
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation
from openenv.core.env_server.types import Action, Observation, State


class Tools(MCPEnvironment):
    """Find the number that follows from the seed: ``tell`` it half of it, twice over ``add``."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        server = FastMCP("tools")
        self._secret, self._state = 0, State(episode_id=None, step_count=0)

        @server.tool
        def add(a: int, b: int) -> int:
            """The sum of two numbers."""
            return a + b

        @server.tool
        def half() -> int:
            """Half of the number that is looked for."""
            return self._secret // 2

        super().__init__(server)

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Observation:
        self._secret = 2 * ((seed or 0) % 50)
        self._state = State(episode_id=episode_id, step_count=0)
        return Observation(done=False, reward=None, metadata={"goal": "Which number is it?"})

    def _step_impl(self, action: Action, timeout_s: float | None = None, **kwargs: Any) -> Observation:
        return Observation(done=False, reward=None, metadata={"error": f"unknown action {action}"})

    @property
    def state(self) -> State:
        return self._state


app = create_app(
    Tools,
    CallToolAction,
    CallToolObservation,
    env_name="tools",
    max_concurrent_envs=int(os.environ.get("SESSIONS", "1")),
)
