"""Environments of published packages, each played in a virtual environment of their own: ``make peers``."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from published import GYMS, installed

from forge_hpc.config import Config, UserError
from forge_hpc.config.schema import EnvironmentConfig
from forge_hpc.data.types import Prompt
from forge_hpc.environments import EnvironmentPool, Response

pytestmark = [pytest.mark.peers, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(installed("gyms", GYMS, tmp_path_factory))


def play(venv: str | None, name: str, args: dict[str, Any], scenario: Callable[[Any], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        environment = EnvironmentConfig(name=name, args=args, venv=venv)
        pool = await EnvironmentPool(Config(environment=environment), num_workers=1).start()
        try:
            return await scenario(pool)
        finally:
            await pool.close()

    return asyncio.run(asyncio.wait_for(run(), 600))


def test_a_question_of_reasoning_gym_follows_from_the_seed_and_is_scored(venv: str) -> None:
    async def scenario(pool: EnvironmentPool) -> list[Any]:
        found = []
        for position, answers in ((3, ["0", None]), (3, []), (4, [])):
            async with pool.open() as environment:
                found.append(await environment.reset(Prompt(position, "", [], "")))
                for answer in answers:
                    target = found[-1].info["target"] if answer is None else answer
                    found.append(await environment.step(Response(f"Let me see.<answer>{target}</answer>")))
        return found

    args = {"dataset": "chain_sum", "config": {"min_terms": 2, "max_terms": 3}}
    first, wrong, right, again, other = play(venv, "reasoning_gym", args, scenario)
    assert first == again != other and first.endswith("Write your final answer between <answer> and </answer>.")
    assert wrong.reward < 1 == right.reward and wrong.done and right.info["answer"] == right.info["target"]


def test_an_environment_of_skyrl_gym_gets_target_and_answers(venv: str) -> None:
    async def scenario(pool: EnvironmentPool) -> list[Any]:
        found = []
        for answer in ("#### 18", "#### 17"):
            async with pool.open() as environment:
                found.append(await environment.reset(Prompt(0, "", [], "18", {}, "9+9?")))
                found.append(await environment.step(Response(answer)))
        return found

    opening, right, _, wrong = play(venv, "skyrl_gym", {"env": "gsm8k"}, scenario)
    assert opening == [{"role": "user", "content": "9+9?"}]
    assert (right.reward, right.done, wrong.reward) == (1.0, True, 0.0)


def test_a_game_of_textarena_is_played_to_its_end_and_repeats_by_its_seed(venv: str) -> None:
    async def scenario(pool: EnvironmentPool) -> list[Any]:
        games = []
        for _ in range(2):
            async with pool.open() as environment:
                steps = [await environment.reset(Prompt(5, "", [], ""))]
                for guess in range(1, 21):
                    steps.append(await environment.step(Response(f"[{guess}]")))
                    if steps[-1].done:
                        break
                games.append(steps)
        return games

    first, second = play(venv, "textarena", {"game": "GuessTheNumber-v0-raw"}, scenario)
    assert first == second and "Guess The Number" in first[0]
    assert all(step.reward is None for step in first[1:-1]) and isinstance(first[-1].reward, float)
    assert all(first[0] not in step.observation for step in first[1:])


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("reasoning_gym", {"dataset": "nope"}, "'nope' cannot be made"),
        ("reasoning_gym", {"dataset": "n_queens"}, "runs what the policy answers as Python"),
        ("skyrl_gym", {"env": "nope"}, "no environment 'nope'"),
        ("textarena", {"game": "nope"}, "no game 'nope'"),
    ],
)
def test_what_a_package_does_not_have_is_found_before_the_run(
    venv: str, name: str, args: dict[str, Any], message: str
) -> None:
    async def scenario(pool: EnvironmentPool) -> None: ...

    with pytest.raises(UserError, match=message):
        play(venv, name, args, scenario)
