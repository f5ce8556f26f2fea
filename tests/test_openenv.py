"""The OpenEnv adapter against a server on this machine that speaks OpenEnv's protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import WSMsgType, web

from forge_hpc.config import Config
from forge_hpc.config.schema import EnvironmentConfig
from forge_hpc.data.types import Prompt
from forge_hpc.environments import EnvironmentFailed, EnvironmentPool, Step
from forge_hpc.environments.openenv import OpenEnv, OpenEnvError

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


async def sessions(request: web.Request) -> web.WebSocketResponse:
    socket, game = web.WebSocketResponse(), Game()
    await socket.prepare(request)
    request.app[SESSIONS].append(game)
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
            await socket.send_json({"type": "error", "data": {"message": str(error), "code": "EXECUTION_ERROR"}})
    return socket


async def plain(request: web.Request) -> web.Response:
    kind = request.path.strip("/")
    body = await request.json() if request.can_read_body else {}
    try:
        return web.json_response(request.app[GAME].do(kind, body["action"] if kind == "step" else body))
    except ValueError as error:
        return web.Response(status=500, text=str(error))


def with_server(scenario: Callable[[str, web.Application], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        app = web.Application()
        app[SESSIONS], app[GAME], app[CLOSED] = [], Game(), asyncio.Event()
        app.add_routes([web.get("/ws", sessions), web.get("/state", plain)])
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
        steps = [await environment.step("3"), await environment.step("17")]
        state = await environment.state()
        with pytest.raises(OpenEnvError, match="invalid literal"):
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


def test_episodes_in_the_pool_have_sessions_of_their_own() -> None:
    async def scenario(url: str, app: web.Application) -> tuple[list[Any], int]:
        config = Config(reward=[], environment=EnvironmentConfig(name=NAME, args={"url": url}, timeout_s=30))
        pool = await EnvironmentPool(config, num_workers=1).start()

        async def play(position: int, answer: str) -> Any:
            async with pool.open() as environment:
                opening = await environment.reset(prompt_of(position))
                try:
                    return opening, (await environment.step(answer)).reward
                except EnvironmentFailed as error:
                    return error.kind

        try:
            return await asyncio.gather(play(1, "1"), play(2, "1"), play(3, "bad"), play(4, "4")), len(app[SESSIONS])
        finally:
            await pool.close()

    played, num_sessions = with_server(scenario)
    opening = '{"text": "Which seed?", "n": 0}'
    assert played == [(opening, 1.0), (opening, 0.0), "raised", (opening, 1.0)]
    assert num_sessions == 4


def test_a_server_that_is_not_there_fails_the_episode() -> None:
    async def scenario(url: str, app: web.Application) -> None:
        environment = OpenEnv("http://127.0.0.1:1")
        try:
            with pytest.raises(OSError):
                await environment.reset(prompt_of(0))
        finally:
            await environment.close()

    with_server(scenario)
    with pytest.raises(ValueError, match="url must begin with"):
        OpenEnv("node7:8000")
