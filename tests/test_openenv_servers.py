"""The page's OpenEnv examples against servers of the published packages, each in a virtual environment of its own.

Not part of the default tests, since it installs about 100 packages twice: ``make openenv``.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from published import echo_server, installed, served
from runs import PROJECT, read, run_local, small_run
from test_environments import ScriptedGenerator, chat_tokenizer, played, prompt_of

from forge_hpc.config import Config, UserError
from forge_hpc.config.schema import EnvironmentConfig, RewardConfig
from forge_hpc.data.types import Episode
from forge_hpc.environments import EnvironmentFailed, EnvironmentPool, Step
from forge_hpc.rollouts.episodes import EpisodePlayer

pytestmark = [pytest.mark.openenv, pytest.mark.timeout(1200)]
PACKAGES = ["openenv-core==0.3.0", "openenv==0.10.0"]
SERVERS = Path(__file__).parent / "openenv_servers"


@pytest.fixture(scope="module", params=PACKAGES)
def python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter that has the package."""
    return installed(request.param.replace("==", "-"), [request.param], tmp_path_factory) / "bin/python"


@pytest.fixture(scope="module")
def echo(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from echo_server(python, tmp_path_factory.mktemp("echo"))


@pytest.fixture(scope="module")
def tools(python: Path) -> Iterator[str]:
    """Two tools on the package's own MCPEnvironment, with room for four sessions."""
    yield from served(python, "tools:app", SERVERS, SESSIONS="4")


def example(name: str, url: str, **changes: Any) -> Config:
    """The page's example of an adapter, at another address."""
    page = (PROJECT / "docs/environments.md").read_text()
    settings = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    [found] = [item for item in settings if item.get("environment", {}).get("name", "").endswith(f":{name}")]
    environment = EnvironmentConfig(**found["environment"])
    environment.args |= {"url": url, **changes}
    environment.timeout_s = 120
    config = Config(reward=[RewardConfig(**reward) for reward in found.get("reward", [])], environment=environment)
    config.rollout.group_size, config.data.chat_template = 16, False
    config.rollout.max_prompt_tokens = config.rollout.max_response_tokens = 5000
    return config


def with_pool(config: Config, scenario: Callable[[EnvironmentPool], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        pool = await EnvironmentPool(config, num_workers=1).start()
        try:
            return await scenario(pool)
        finally:
            await pool.close()

    return asyncio.run(asyncio.wait_for(run(), 300))


def test_the_pages_example_is_played_on_the_server_as_it_is_shipped(python: Path, echo: str) -> None:
    async def scenario(pool: EnvironmentPool) -> tuple[Any, Step]:
        async with pool.open() as environment:
            return await environment.reset(prompt_of(3)), await environment.step("hello")

    opening, step = with_pool(example("OpenEnv", echo), scenario)
    assert "ready" in opening
    assert (step.observation, step.reward, step.done) == ("hello", 0.5, False)
    assert step.info["message_length"] == 5
    if "openenv-core" not in str(python):  # whose servers keep an observation's metadata to themselves
        assert step.info["original_message"] == "hello"


@pytest.mark.parametrize("key", [0, None], ids=["lockstep", "free"])
def test_sixteen_episodes_are_played_on_a_server_with_one_session_and_none_is_lost(echo: str, key: int | None) -> None:
    config, tokenizer = example("OpenEnv", echo), chat_tokenizer()
    config.environment.max_turns = 2

    async def scenario(pool: EnvironmentPool) -> tuple[list[Any], int | None]:
        player = EpisodePlayer(config, tokenizer, ScriptedGenerator(tokenizer, 1), pool)
        [episodes] = await played(player, [prompt_of()], key)
        return episodes, pool.max_open_episodes

    episodes, most = with_pool(config, scenario)
    assert [type(episode) for episode in episodes] == [Episode] * 16
    assert most == 1


def test_a_run_trains_on_a_server_with_one_session_and_loses_no_episode(echo: str, tmp_path: Path) -> None:
    options = [item for item in small_run(tmp_path, 2) if not item.startswith("reward=")]
    args = f"{{url: '{echo}', action_field: message, observation_field: echoed_message}}"
    result = run_local(
        tmp_path / "run",
        [
            *options,
            "environment.name=forge_hpc.environments.openenv:OpenEnv",
            f"environment.args={args}",
            "environment.max_turns=2",
            "environment.max_turn_tokens=4",
            "rollout.max_prompt_tokens=60",
            "rollout.max_response_tokens=40",
            "rollout.prompts_per_step=2",
            "rollout.group_size=8",
            "evaluation.num_prompts=4",
        ],
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "takes 1 episode at once, and the others wait" in result.stdout
    for record in read(tmp_path / "run"):
        assert record["episodes/failed"] == record["groups/unequal_openings"] == 0
        assert record["episode/turns_mean"] == 2 and record["reward/mean"] > 0
    assert [record["num_failed"] for record in read(tmp_path / "run", "evaluations.jsonl")] == [0, 0]


def test_http_is_refused_on_a_server_that_makes_an_environment_for_each_request(echo: str) -> None:
    with pytest.raises(UserError, match="a new environment for each HTTP request"):
        with_pool(example("OpenEnv", echo, transport="http"), lambda pool: asyncio.sleep(0))


@pytest.mark.parametrize(
    ("changes", "hint"),
    [({"action_field": "text"}, "it has message"), ({"observation_field": "text"}, "it has echoed_message")],
)
def test_a_wrong_field_is_refused_before_the_run_with_those_that_there_are(
    echo: str, changes: dict[str, str], hint: str
) -> None:
    with pytest.raises(UserError, match="no field 'text'") as refused:
        with_pool(example("OpenEnv", echo, **changes), lambda pool: asyncio.sleep(0))
    assert refused.value.hint is not None and hint in refused.value.hint


def test_the_pages_example_of_tools_is_played_on_a_server_of_tools(tools: str) -> None:
    def call(name: str, **arguments: Any) -> str:
        return f"Let me see.\n<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"

    async def scenario(pool: EnvironmentPool) -> tuple[Any, list[Step]]:
        responses = [
            call("half"),
            call("add", a=20, b=22),
            '<tool_call>{"name": "nope"}',
            call("add", a="x", b=1),
            "<tool_call>add 1 and 2</tool_call>",
            "It is 42.",
        ]
        async with pool.open() as environment:
            opening = await environment.reset(prompt_of(3, question="Which number?"))
            return opening, [await environment.step(response) for response in responses]

    opening, steps = with_pool(example("OpenEnvTools", tools), scenario)
    assert opening.startswith("Which number?") and '"name": "add"' in opening and '"name": "half"' in opening
    half, total, unknown, wrong, no_call, last = steps
    assert half.observation == str(prompt_of(3).seed % 50)
    assert (total.observation, total.role, total.reward, total.done) == ("42", "tool", None, False)
    assert "nope" in unknown.observation and unknown.observation.startswith("error: ")
    assert "integer" in wrong.observation
    assert no_call.observation.startswith("error: this is not a call")
    assert (last.reward, last.done) == (None, True)


def test_the_servers_errors_come_through_with_the_fields_that_they_name(tools: str) -> None:
    async def scenario(pool: EnvironmentPool) -> None:
        async with pool.open() as environment:
            await environment.reset(prompt_of())
            await environment.step("hello")

    with pytest.raises(EnvironmentFailed, match="tool_name: Field required"):
        with_pool(example("OpenEnv", tools, action_field="metadata", observation_field=None), scenario)
