"""An adapter for environments that an OpenEnv server (https://github.com/meta-pytorch/OpenEnv) offers.

It speaks the protocol itself: the package ``openenv`` brings a web interface along and pins other versions of what vLLM
needs. A session is a WebSocket at ``/ws``, one an episode, with JSON both ways:

    {"type": "reset", "data": {"seed": 17}}        ->  {"type": "observation", "data": {"observation": {...},
    {"type": "step", "data": {ACTION}}             ->      "reward": 0.5, "done": false}}
    {"type": "close"}                                  {"type": "error", "data": {"message": "...", "code": "..."}}

A server has room for so many sessions as it was started with (``max_concurrent_envs``, as shipped: one) and refuses the
others with its number: then no more episodes are opened at once.

Servers that keep their one session behind plain HTTP (``POST /reset``, ``POST /step`` with ``{"action": {ACTION}}``),
as the first versions did, are spoken to with ``transport: http``, one episode at a time. Those that have sessions make
another environment for each of these requests, whose steps would answer an environment that was never reset.

    environment:
      name: forge_hpc.environments.openenv:OpenEnv
      args: {url: "http://node7:8000", action_field: message, observation_field: echoed_message}

Where text and one field are not enough, derive a class and override ``action``, ``observe`` or ``reward``. Servers of
tools (MCP) are spoken to with ``OpenEnvTools``.
"""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

import aiohttp

from forge_hpc.config.errors import UserError
from forge_hpc.data.types import Prompt
from forge_hpc.environments.base import EnvironmentFull, Opening, Response, Step

_MAX_MESSAGE_BYTES = 100 * 2**20
_MAX_ERROR_CHARS = 500
_CHECK_TIMEOUT_S = 30.0
_CLOSE_TIMEOUT_S = 5.0


class OpenEnvError(RuntimeError):
    """The server answered with an error, or not in OpenEnv's words."""


class OpenEnv:
    """One episode in an OpenEnv server.

    Args:
        url: of the server, ``http://`` or ``https://``.
        action_field: a response becomes the action ``{action_field: response}``.
        observation_field: the policy reads this field of an observation; by default all of it, as JSON.
        reset: more of the reset's parameters. ``seed`` is the prompt's, so that a group has one task.
        question: put the example's prompt before the first observation.
        transport: ``websocket`` or ``http``.
        headers: sent with every request.

    Whatever an observation holds that the policy does not read, and its metadata, is in the step's ``info``.
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
        self.max_open_episodes = 1 if transport == "http" else None

    def action(self, response: Response) -> dict[str, Any]:
        """The action that a response means."""
        return {self._action_field: response}

    def observe(self, observation: dict[str, Any]) -> str:
        """What the policy reads of an observation."""
        if self._observation_field is None:
            seen = {name: value for name, value in observation.items() if name != "metadata"}
            return json.dumps(seen, ensure_ascii=False)
        if self._observation_field not in observation:
            raise OpenEnvError(
                f"the observation has no field {self._observation_field!r} (observation_field), it has "
                f"{', '.join(observation) or 'none'}"
            )
        value = observation[self._observation_field]
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    def reward(self, answer: dict[str, Any]) -> float | None:
        """The reward of the server's answer to a step; None where it gives none."""
        return None if answer.get("reward") is None else float(answer["reward"])

    async def check(self) -> None:
        """Look whether the server is there and speaks as it will be spoken to. Raises UserError."""
        timeout = aiohttp.ClientTimeout(total=_CHECK_TIMEOUT_S)
        async with aiohttp.ClientSession(headers=self._headers, timeout=timeout) as http:
            try:
                has_sessions = await self._has_sessions(http)
                async with http.get(f"{self._url}/schema") as answer:
                    schema = await answer.json() if answer.status == 200 else {}
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                raise UserError(
                    f"the OpenEnv server at {self._url} does not answer: {error or type(error).__name__}",
                    "start it first, where the nodes of the run can reach it",
                ) from None
        if has_sessions and self._transport == "http":
            raise UserError(
                f"transport: http, and the server at {self._url} makes a new environment for each HTTP request: a step "
                "would answer one that was never reset",
                "leave transport out of environment.args: this server has sessions",
            )
        if not has_sessions and self._transport == "websocket":
            raise UserError(
                f"the server at {self._url} has no sessions at /ws",
                "is it an OpenEnv server, and is the url without a path? One of the first versions: transport: http",
            )
        if type(self).action is OpenEnv.action:
            _check_field("action_field", self._action_field, schema.get("action"))
        if type(self).observe is OpenEnv.observe and self._observation_field is not None:
            _check_field("observation_field", self._observation_field, schema.get("observation"))

    async def _has_sessions(self, http: aiohttp.ClientSession) -> bool:
        try:
            await _end_session(await http.ws_connect(f"{self._url}/ws"))
            return True
        except aiohttp.WSServerHandshakeError:
            return False

    async def reset(self, prompt: Prompt) -> Opening:
        observed = self.observe((await self._begin(prompt))["observation"])
        return f"{prompt.question}\n{observed}" if self._question else observed

    async def _begin(self, prompt: Prompt) -> dict[str, Any]:
        # How long all may take is the pool's business.
        self._http = aiohttp.ClientSession(headers=self._headers, timeout=aiohttp.ClientTimeout(total=None))
        if self._transport == "websocket":
            self._socket = await self._http.ws_connect(f"{self._url}/ws", max_msg_size=_MAX_MESSAGE_BYTES)
        return await self._ask("reset", {"seed": prompt.seed, **self._reset})

    async def step(self, response: Response) -> Step:
        return self._read(await self._ask("step", self.action(response)))

    def _read(self, answer: dict[str, Any]) -> Step:
        observation = answer["observation"]
        read = observation if self._observation_field is None else {self._observation_field: None}
        info = {name: value for name, value in observation.items() if name not in read and name != "metadata"}
        info |= answer.get("metadata") or observation.get("metadata") or {}
        return Step(self.observe(observation), self.reward(answer), bool(answer.get("done")), info)

    async def state(self) -> dict[str, Any]:
        """The server's record of the episode."""
        return await self._ask("state", {})

    async def close(self) -> None:
        if self._socket is not None and not self._socket.closed:
            await _end_session(self._socket)
        if self._http is not None:
            await self._http.close()

    async def _ask(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        answer = await (self._ask_http(kind, data) if self._socket is None else self._ask_socket(kind, data))
        if kind != "state" and not isinstance(answer.get("observation"), dict):
            raise OpenEnvError(f"{self._url} answered {kind} without an observation: {str(answer)[:_MAX_ERROR_CHARS]}")
        return answer

    async def _ask_socket(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        assert self._socket is not None
        with contextlib.suppress(ConnectionError):  # closed from there: it has said why
            await self._socket.send_json({"type": kind} if kind == "state" else {"type": kind, "data": data})
        message = await self._socket.receive()
        if message.type is not aiohttp.WSMsgType.TEXT:
            raise OpenEnvError(f"{self._url} closed the session at {kind}")
        answer = message.json()
        if answer["type"] == "error":
            error = answer["data"]
            if error.get("code") == "CAPACITY_REACHED":
                raise EnvironmentFull(f"{self._url}: {error.get('message')}", error.get("max_sessions"))
            raise OpenEnvError(f"{self._url} at {kind}: {_reason(error)}")
        return answer["data"]

    async def _ask_http(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        assert self._http is not None, "reset comes first"
        method, body = ("GET", None) if kind == "state" else ("POST", {"action": data} if kind == "step" else data)
        async with self._http.request(method, f"{self._url}/{kind}", json=body) as answer:
            if answer.status != 200:
                text = (await answer.text())[:_MAX_ERROR_CHARS]
                raise OpenEnvError(f"{self._url}/{kind}: status {answer.status}: {text}")
            return await answer.json()


TOOL_INSTRUCTIONS = """

You have these tools, each with the JSON schema of its arguments:
{tools}
Call one by writing <tool_call>{{"name": NAME, "arguments": {{...}}}}</tool_call>, and you are told its result. A
response without a call is your final answer."""
_TOOL_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)


class OpenEnvTools(OpenEnv):
    """One episode in an OpenEnv server of tools (an ``MCPEnvironment``).

    The policy reads the example's prompt and the server's tools, and calls one by ``<tool_call>{"name": ...,
    "arguments": {...}}</tool_call>``, as models that were trained on tools do. A response without a call ends the
    episode. Such servers rarely give a reward: name one that judges the last response.

    Args:
        url: of the server.
        reset: more of the reset's parameters, beside the prompt's ``seed``.
        question: begin with the example's prompt; what the reset's observation says (``opening``) follows.
        instructions: put after that; ``{tools}`` is a line for each tool.
        role: of the tools' results in the chat template: ``tool``, or ``user`` where it has no such role.
        headers: sent with every request.
    """

    def __init__(
        self,
        url: str,
        reset: dict[str, Any] | None = None,
        question: bool = True,
        instructions: str = TOOL_INSTRUCTIONS,
        role: str = "tool",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(url, reset=reset, question=question, headers=headers)
        self._instructions, self._role = instructions, role

    async def reset(self, prompt: Prompt) -> str:
        opening = self.opening((await self._begin(prompt))["observation"])
        answer = await self._ask("step", {"type": "list_tools"})
        tools = answer["observation"].get("tools")
        if tools is None:
            raise OpenEnvError(f"{self._url} has no tools: is it an MCP environment?")
        said = "\n".join(filter(None, [prompt.question if self._question else "", opening]))
        return said + self._instructions.format(tools="\n".join(map(_describe, tools)))

    def opening(self, observation: dict[str, Any]) -> str:
        """What the policy reads of the reset's observation: its fields as JSON, nothing where it has none."""
        said = {name: value for name, value in observation.items() if name != "metadata"}
        return json.dumps(said, ensure_ascii=False) if said else ""

    def action(self, response: Response) -> dict[str, Any]:
        """The call that a response asks for. Raises ValueError where it is none."""
        call = _TOOL_CALL.search(response)
        assert call is not None
        asked = json.loads(call[1])
        if not isinstance(asked, dict) or not isinstance(asked.get("name"), str):
            raise ValueError("a call is a JSON object with name and arguments")
        return {"type": "call_tool", "tool_name": asked["name"], "arguments": asked.get("arguments") or {}}

    def observe(self, observation: dict[str, Any]) -> str:
        """What a tool said, or what was wrong with the call."""
        if (error := observation.get("error")) is not None:
            return f"error: {error.get('message', error) if isinstance(error, dict) else error}"
        result = observation.get("result")
        if isinstance(result, dict):  # as MCP has it: the value itself, or a list of texts
            result = result.get("data", result.get("structured_content") or result.get("content", result))
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)

    async def step(self, response: Response) -> Step:
        if _TOOL_CALL.search(response) is None:
            return Step(reward=None, done=True)
        try:
            action = self.action(response)
        except ValueError as error:
            return Step(f"error: this is not a call of a tool: {error}", reward=None, role=self._role)
        answer = await self._ask("step", action)
        info = {"tool": action["tool_name"], **(answer.get("metadata") or {})}
        observed = self.observe(answer["observation"])
        return Step(observed, self.reward(answer), bool(answer.get("done")), info, self._role)


async def _end_session(socket: aiohttp.ClientWebSocketResponse) -> None:
    """Say so, and wait until the server closes: then there is room for another session."""
    with contextlib.suppress(TimeoutError, ConnectionError):
        await socket.send_json({"type": "close"})
        while (await socket.receive(_CLOSE_TIMEOUT_S)).type is aiohttp.WSMsgType.TEXT:
            pass
    await socket.close()


def _describe(tool: dict[str, Any]) -> str:
    known = {name: tool[name] for name in ("name", "description") if tool.get(name)}
    schema = tool.get("input_schema") or tool.get("inputSchema") or {}
    return json.dumps(known | {"parameters": schema}, ensure_ascii=False)


def _check_field(key: str, name: str, schema: Any) -> None:
    """Raise UserError where a JSON schema has fields, and not this one."""
    fields = (schema or {}).get("properties") or {}
    if fields and name not in fields and not schema.get("additionalProperties"):
        known = ", ".join(field for field in fields if field not in ("metadata", "reward", "done"))
        raise UserError(f"the server has no field {name!r} (environment.args.{key})", f"it has {known or 'none'}")


def _reason(error: dict[str, Any]) -> str:
    """What an error of the server says; of a message that it does not take, which fields."""
    errors = "; ".join(
        f"{'.'.join(map(str, item.get('loc', ())))}: {item.get('msg')}"
        for item in error.get("errors") or []
        if isinstance(item, dict)
    )
    text = f"{error.get('message')} ({error.get('code')})" + (f": {errors}" if errors else "")
    return text[:_MAX_ERROR_CHARS]
