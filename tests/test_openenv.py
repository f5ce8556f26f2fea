"""The OpenEnv adapter against a server on this machine that speaks OpenEnv's protocol."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import WSMsgType, web
from test_environments import chat_tokenizer, played

from forge_hpc.config import Config, UserError
from forge_hpc.config.schema import EnvironmentConfig
from forge_hpc.data.types import Completion, Episode, Prompt, Turn
from forge_hpc.environments import EnvironmentFailed, EnvironmentPool, Step
from forge_hpc.environments.openenv import OpenEnv, OpenEnvError, OpenEnvTools
from forge_hpc.rollouts.episodes import EpisodePlayer

NAME = "forge_hpc.environments.openenv:OpenEnv"
SESSIONS = web.AppKey("sessions", list)
CLOSED = web.AppKey("closed", asyncio.Event)


class Game:
    """Say the seed: a session of the server."""

    def __init__(self) -> None:
        self.seed, self.num_steps = 0, 0

    def do(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        if kind == "reset":
            self.seed, self.num_steps = data["seed"], 0
            return {"observation": {"text": "Which seed?", "n": 0}, "reward": None, "done": False}
        if kind == "state":
            return {"episode_id": None, "step_count": self.num_steps}
        self.num_steps += 1
        done = int(data["message"]) == self.seed
        observation = {"text": "yes" if done else "no", "n": self.num_steps}
        return {"observation": observation, "reward": float(done), "done": done, "metadata": {"n": self.num_steps}}


GAME = web.AppKey("game", Game)
ROOM = web.AppKey("room", int)
NUM_OPEN = web.AppKey("num_open", list)
SCHEMA = {
    "action": {"properties": {"message": {}, "metadata": {}}, "additionalProperties": False},
    "observation": {"properties": {"text": {}, "n": {}, "reward": {}, "done": {}}, "additionalProperties": False},
}


async def sessions(request: web.Request) -> web.WebSocketResponse:
    socket, game = web.WebSocketResponse(), Game()
    await socket.prepare(request)
    if len(request.app[NUM_OPEN]) >= request.app[ROOM]:
        error = {"message": "at capacity", "code": "CAPACITY_REACHED", "max_sessions": request.app[ROOM]}
        await socket.send_json({"type": "error", "data": error})
        await socket.close()
        return socket
    request.app[NUM_OPEN].append(game)
    request.app[SESSIONS].append(game)
    try:
        await serve(request, socket, game)
    finally:
        await asyncio.sleep(0.05)  # a session is not over at once
        request.app[NUM_OPEN].remove(game)
    await socket.close()
    return socket


async def serve(request: web.Request, socket: web.WebSocketResponse, game: Game) -> None:
    async for message in socket:
        assert message.type is WSMsgType.TEXT
        asked = message.json()
        if asked["type"] == "close":
            request.app[CLOSED].set()
            break
        try:
            data = game.do(asked["type"], asked.get("data", {}))
            await socket.send_json({"type": "state" if asked["type"] == "state" else "observation", "data": data})
        except ValueError as error:
            errors = [{"loc": ["message"], "msg": "Field required"}]
            data = {"message": str(error), "code": "EXECUTION_ERROR", "errors": errors}
            await socket.send_json({"type": "error", "data": data})


async def plain(request: web.Request) -> web.Response:
    kind = request.path.strip("/")
    body = await request.json() if request.can_read_body else {}
    try:
        return web.json_response(request.app[GAME].do(kind, body["action"] if kind == "step" else body))
    except ValueError as error:
        return web.Response(status=500, text=str(error))


async def schema(request: web.Request) -> web.Response:
    return web.json_response(SCHEMA)


def with_server(
    scenario: Callable[[str, web.Application], Awaitable[Any]], room: int = 99, has_sessions: bool = True
) -> Any:
    async def run() -> Any:
        app = web.Application()
        app[SESSIONS], app[NUM_OPEN], app[GAME], app[CLOSED], app[ROOM] = [], [], Game(), asyncio.Event(), room
        app.add_routes([web.get("/ws", sessions)] if has_sessions else [])
        app.add_routes([web.get("/state", plain), web.get("/schema", schema)])
        app.add_routes([web.post("/reset", plain), web.post("/step", plain)])
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            return await scenario(f"http://127.0.0.1:{runner.addresses[0][1]}", app)
        finally:
            await runner.cleanup()

    return asyncio.run(asyncio.wait_for(run(), 60))


def prompt_of(position: int) -> Prompt:
    return Prompt(position, "?", [1], "", {}, "Hello.")


@pytest.mark.parametrize("transport", ["websocket", "http"])
def test_an_episode_is_played_to_its_end(transport: str) -> None:
    async def scenario(url: str, app: web.Application) -> list[Any]:
        environment = OpenEnv(url, observation_field="text", question=True, transport=transport)
        opening = await environment.reset(prompt_of(17))
        steps = [await environment.step("3"), await environment.step(str(prompt_of(17).seed))]
        state = await environment.state()
        fields = ".*message: Field required" if transport == "websocket" else ""
        with pytest.raises(OpenEnvError, match=f"invalid literal{fields}"):
            await environment.step("no number")
        await environment.close()
        if transport == "websocket":
            await app[CLOSED].wait()
        return [opening, state, *steps]

    opening, state, wrong, right = with_server(scenario)
    assert opening == "Hello.\nWhich seed?"
    assert state["step_count"] == 2
    assert wrong == Step("no", 0.0, False, {"n": 1})
    assert right == Step("yes", 1.0, True, {"n": 2})


def test_a_missing_reward_stays_missing_and_what_is_not_read_is_info() -> None:
    environment = OpenEnv("http://x", observation_field="text")
    answer = {"observation": {"text": "a", "n": 3, "metadata": {"m": 1}}, "reward": None, "done": False}
    assert environment._read(answer) == Step("a", None, False, {"n": 3, "m": 1})
    assert environment._read(answer | {"reward": False, "metadata": {"m": 2}}) == Step(
        "a", 0.0, False, {"n": 3, "m": 2}
    )
    whole = OpenEnv("http://x")._read(answer)
    assert (whole.observation, whole.info) == ('{"text": "a", "n": 3}', {"m": 1})


def test_a_field_that_an_observation_lacks_is_named_with_those_that_it_has() -> None:
    with pytest.raises(OpenEnvError, match=r"no field 'txt'.*it has text, n"):
        OpenEnv("http://x", observation_field="txt").observe({"text": "a", "n": 3})


def test_episodes_in_the_pool_have_sessions_of_their_own() -> None:
    async def scenario(url: str, app: web.Application) -> tuple[list[Any], int]:
        config = Config(reward=[], environment=EnvironmentConfig(name=NAME, args={"url": url}, timeout_s=30))
        pool = await EnvironmentPool(config, num_workers=1).start()
        num_checks = len(app[SESSIONS])

        async def play(position: int, answer: str) -> Any:
            async with pool.open() as environment:
                opening = await environment.reset(prompt_of(position))
                try:
                    return opening, (await environment.step(answer)).reward
                except EnvironmentFailed as error:
                    return error.kind

        try:
            seeds = [str(prompt_of(position).seed) for position in range(5)]
            plays = [play(1, seeds[1]), play(2, seeds[1]), play(3, "bad"), play(4, seeds[4])]
            return await asyncio.gather(*plays), len(app[SESSIONS]) - num_checks
        finally:
            await pool.close()

    played, num_sessions = with_server(scenario)
    opening = '{"text": "Which seed?", "n": 0}'
    assert played == [(opening, 1.0), (opening, 0.0), "raised", (opening, 1.0)]
    assert num_sessions == 4


@pytest.mark.parametrize("key", [0, None], ids=["lockstep", "free"])
def test_a_server_with_one_session_plays_all_episodes_one_after_another(key: int | None) -> None:
    async def scenario(url: str, app: web.Application) -> tuple[list[Any], int | None]:
        args = {"url": url, "observation_field": "text"}
        config = Config(reward=[], environment=EnvironmentConfig(name=NAME, args=args, timeout_s=30, max_turns=2))
        config.data.chat_template, config.rollout.group_size = False, 16
        tokenizer = chat_tokenizer()

        async def answer(turns: list[Turn], *_: Any, key: int | None) -> list[Completion]:
            return [Completion(0, "7", [9], [-1.0], "stop", (0, 0)) for _ in turns]

        pool = await EnvironmentPool(config, num_workers=1).start()
        try:
            [episodes] = await played(EpisodePlayer(config, tokenizer, answer, pool), [prompt_of(0)], key)
            return episodes, pool.max_open_episodes
        finally:
            await pool.close()

    episodes, most = with_server(scenario, room=1)
    assert [(type(episode), episode.completion.metadata["turns"]) for episode in episodes] == [(Episode, 2)] * 16
    assert most == 1


@pytest.mark.parametrize(
    ("args", "has_sessions", "message"),
    [
        ({"transport": "http"}, True, "makes a new environment for each HTTP request"),
        ({}, False, "has no sessions at /ws"),
        ({"action_field": "text"}, True, "no field 'text'.*action_field.*it has message$"),
        ({"observation_field": "message"}, True, "no field 'message'.*observation_field.*it has text, n$"),
        ({"transport": "http"}, False, None),
        ({"observation_field": "text"}, True, None),
    ],
)
def test_what_the_server_cannot_be_spoken_to_with_is_refused_before_the_run(
    args: dict[str, str], has_sessions: bool, message: str | None
) -> None:
    async def scenario(url: str, app: web.Application) -> str | None:
        try:
            await OpenEnv(url, **args).check()
        except UserError as error:
            return f"{error.message} {error.hint}"
        return None

    said = with_server(scenario, has_sessions=has_sessions)
    assert said is None if message is None else re.search(message, said)


def test_a_server_of_the_first_versions_plays_one_episode_at_a_time() -> None:
    assert OpenEnv("http://x", transport="http").max_open_episodes == 1


def test_a_server_that_is_not_there_fails_the_episode() -> None:
    async def scenario(url: str, app: web.Application) -> None:
        environment = OpenEnv("http://127.0.0.1:1")
        try:
            with pytest.raises(OSError):
                await environment.reset(prompt_of(0))
            with pytest.raises(UserError, match="does not answer"):
                await environment.check()
        finally:
            await environment.close()

    with_server(scenario)
    with pytest.raises(ValueError, match="url must begin with"):
        OpenEnv("node7:8000")


class Scripted(OpenEnvTools):
    """A server of tools whose answers are given."""

    def __init__(self, *observations: dict[str, Any], **options: Any) -> None:
        super().__init__("http://x", **options)
        self.observations, self.asked = list(observations), []

    async def _begin(self, prompt: Prompt) -> dict[str, Any]:
        return {"observation": self.observations.pop(0)}

    async def _ask(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(data)
        return {"observation": self.observations.pop(0), "reward": None, "done": False, "metadata": {"n": 1}}


def test_tools_are_described_called_and_their_results_and_errors_read() -> None:
    add = {"name": "add", "description": "A sum.", "input_schema": {"type": "object"}}
    server = Scripted(
        {"metadata": {}},
        {"tools": [add]},
        {"tool_name": "add", "result": {"content": [], "structured_content": {"result": 3}, "data": 3}, "error": None},
        {"tool_name": "nope", "result": None, "error": {"error_type": "tool_not_found", "message": "Unknown tool"}},
        {"tool_name": "add", "result": "3", "error": None},
    )

    async def talk() -> tuple[Any, list[Step]]:
        opening = await server.reset(prompt_of(0))
        responses = [
            'Well. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>',
            '<tool_call>{"name": "nope"}',
            '<tool_call>{"name": "add"}</tool_call>',
            "<tool_call>[1]</tool_call>",
            "3",
        ]
        return opening, [await server.step(response) for response in responses]

    opening, steps = asyncio.run(talk())
    assert opening.startswith("Hello.\n") and '{"name": "add", "description": "A sum."' in opening
    assert server.asked == [
        {"type": "list_tools"},
        {"type": "call_tool", "tool_name": "add", "arguments": {"a": 1}},
        {"type": "call_tool", "tool_name": "nope", "arguments": {}},
        {"type": "call_tool", "tool_name": "add", "arguments": {}},
    ]
    assert [step.observation for step in steps[:3]] == ["3", "error: Unknown tool", "3"]
    assert {(step.role, step.reward, step.done) for step in steps[:4]} == {("tool", None, False)}
    assert steps[0].info == {"tool": "add", "n": 1}
    assert (
        steps[3].observation == "error: this is not a call of a tool: a call is a JSON object with name and arguments"
    )
    assert steps[4] == Step(reward=None, done=True)
