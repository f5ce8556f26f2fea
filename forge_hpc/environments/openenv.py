"""An adapter for environments that an OpenEnv server (https://github.com/meta-pytorch/OpenEnv) offers.

It speaks the protocol itself: the package ``openenv`` brings a web interface along and pins other versions of what vLLM
needs. A session is a WebSocket at ``/ws``, one an episode, with JSON both ways:

    {"type": "reset", "data": {"seed": 17}}        ->  {"type": "observation", "data": {"observation": {...},
    {"type": "step", "data": {ACTION}}             ->      "reward": 0.5, "done": false}}
    {"type": "close"}                                  {"type": "error", "data": {"message": "...", "code": "..."}}

Servers that keep their one session behind plain HTTP (``POST /reset``, ``POST /step`` with ``{"action": {ACTION}}``),
as the first versions did, are spoken to with ``transport: http``. They can play one episode at a time only.

    environment:
      name: forge_hpc.environments.openenv:OpenEnv
      args: {url: "http://node7:8000", action_field: message, observation_field: echoed_message}

Where text and one field are not enough, derive a class and override ``action`` and ``observe``.
"""

from __future__ import annotations

import json
from typing import Any

import aiohttp

from forge_hpc.data.types import Prompt
from forge_hpc.environments.base import Step

_MAX_MESSAGE_BYTES = 100 * 2**20


class OpenEnvError(RuntimeError):
    """The server answered with an error, or not in OpenEnv's words."""


class OpenEnv:
    """One episode in an OpenEnv server.

    Args:
        url: of the server, ``http://`` or ``https://``.
        action_field: a response becomes the action ``{action_field: response}``.
        observation_field: the policy reads this field of an observation; by default all of it, as JSON.
        reset: more of the reset's parameters. ``seed`` is the prompt's position, so that a group has one task.
        question: put the example's prompt before the first observation.
        transport: ``websocket`` or ``http``.
        headers: sent with every request.
    """

    def __init__(
        self,
        url: str,
        action_field: str = "message",
        observation_field: str | None = None,
        reset: dict[str, Any] | None = None,
        question: bool = False,
        transport: str = "websocket",
        headers: dict[str, str] | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, it is {url!r}")
        if transport not in ("websocket", "http"):
            raise ValueError(f"transport must be websocket or http, it is {transport!r}")
        self._url, self._transport, self._headers = url.rstrip("/"), transport, headers
        self._action_field, self._observation_field = action_field, observation_field
        self._reset, self._question = reset or {}, question
        self._http: aiohttp.ClientSession | None = None
        self._socket: aiohttp.ClientWebSocketResponse | None = None

    def action(self, response: str) -> dict[str, Any]:
        """The action that a response means."""
        return {self._action_field: response}

    def observe(self, observation: dict[str, Any]) -> str:
        """What the policy reads of an observation."""
        if self._observation_field is None:
            return json.dumps(observation, ensure_ascii=False)
        value = observation[self._observation_field]
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    async def reset(self, prompt: Prompt) -> str:
        # How long all may take is the pool's business.
        self._http = aiohttp.ClientSession(headers=self._headers, timeout=aiohttp.ClientTimeout(total=None))
        if self._transport == "websocket":
            self._socket = await self._http.ws_connect(f"{self._url}/ws", max_msg_size=_MAX_MESSAGE_BYTES)
        answer = await self._ask("reset", {"seed": prompt.position, **self._reset})
        observed = self.observe(answer["observation"])
        return f"{prompt.question}\n{observed}" if self._question else observed

    async def step(self, response: str) -> Step:
        answer = await self._ask("step", self.action(response))
        return Step(
            observation=self.observe(answer["observation"]),
            reward=float(answer.get("reward") or 0.0),
            done=bool(answer.get("done")),
            info=answer.get("metadata") or {},
        )

    async def state(self) -> dict[str, Any]:
        """The server's record of the episode."""
        return await self._ask("state", {})

    async def close(self) -> None:
        if self._socket is not None and not self._socket.closed:
            await self._socket.send_json({"type": "close"})
            await self._socket.close()
        if self._http is not None:
            await self._http.close()

    async def _ask(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        answer = await (self._ask_http(kind, data) if self._socket is None else self._ask_socket(kind, data))
        if kind != "state" and not isinstance(answer.get("observation"), dict):
            raise OpenEnvError(f"{self._url} answered {kind} without an observation: {str(answer)[:200]}")
        return answer

    async def _ask_socket(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        assert self._socket is not None
        await self._socket.send_json({"type": kind} if kind == "state" else {"type": kind, "data": data})
        message = await self._socket.receive()
        if message.type is not aiohttp.WSMsgType.TEXT:
            raise OpenEnvError(f"{self._url} closed the session")
        answer = message.json()
        if answer["type"] == "error":
            error = answer["data"]
            raise OpenEnvError(f"{self._url}: {error.get('message')} ({error.get('code')})")
        return answer["data"]

    async def _ask_http(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        assert self._http is not None, "reset comes first"
        method, body = ("GET", None) if kind == "state" else ("POST", {"action": data} if kind == "step" else data)
        async with self._http.request(method, f"{self._url}/{kind}", json=body) as answer:
            if answer.status != 200:
                raise OpenEnvError(f"{self._url}/{kind}: status {answer.status}: {(await answer.text())[:200]}")
            return await answer.json()
