"""Rewards: the built-in ones, loading a user's own, and a pool that nothing stalls."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config, RewardConfig
from forge_hpc.data.types import Completion, Prompt
from forge_hpc.rewards import RewardError, RewardPool
from forge_hpc.rewards.exact import exact_reward
from forge_hpc.rewards.gsm8k import gsm8k_reward
from forge_hpc.rewards.math import math_reward
from forge_hpc.rewards.overlong import overlong_reward
from forge_hpc.rewards.registry import load_reward

USER_REWARDS = """
import asyncio, os, time

def length(prompt, response, target, *, scale=1.0, **fields):
    return len(response) * scale

async def later(prompt, response, target, **fields):
    await asyncio.sleep(0)
    return fields["difficulty"]

def tell(prompt, response, target, **fields):
    print("this must not disturb the answers")
    return 1.0

def misbehave(prompt, response, target, **fields):
    if response == "raise":
        raise KeyError("nothing there")
    if response == "nan":
        return float("nan")
    if response == "none":
        return None
    if response == "hang":
        time.sleep(3600)
    if response == "die":
        os._exit(3)
    return 1.0
"""


@pytest.fixture
def rewards_file(tmp_path: Path) -> Path:
    file = tmp_path / "my_rewards.py"
    file.write_text(USER_REWARDS)
    return file


def prompt(target: str = "58", **fields: Any) -> Prompt:
    return Prompt(0, "72+85=", [1, 2], target, fields)


def completion(text: str) -> Completion:
    return Completion(0, text, [3], [-0.1], "stop", (0, 0))


def pool(*rewards: RewardConfig, num_workers: int = 1) -> RewardPool:
    return RewardPool(Config(reward=list(rewards)), num_workers)


def test_exact_wants_the_target_and_forgives_white_space_around_it():
    assert exact_reward("", " 58\n", "58") == 1.0
    assert exact_reward("", "581", "58") == 0.0
    assert exact_reward("", "", "58") == 0.0


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("so 6 * 12 = 72\n#### 72", 1.0),
        ("#### $72.00", 1.0),
        ("The answer is 72.", 1.0),
        ("first #### 12, no: #### 72", 1.0),
        ("#### 72 of 100", 1.0),
        ("between 70-72", 1.0),
        ("-72", 0.0),
        ("#### 71", 0.0),
        ("72 or 73", 0.0),
        ("", 0.0),
        ("none", 0.0),
    ],
)
def test_gsm8k_compares_final_numbers(response: str, value: float):
    assert gsm8k_reward("", response, "He has 60 + 12 = 72.\n#### 72") == value


def test_gsm8k_reads_thousands_separators_and_signs():
    assert gsm8k_reward("", "it costs $1,234.5", "#### 1234.50") == 1.0
    assert gsm8k_reward("", "x = -5", "#### -5") == 1.0


def test_gsm8k_refuses_a_target_without_a_number():
    with pytest.raises(ValueError, match="no number"):
        gsm8k_reward("", "7", "seven")


@pytest.mark.parametrize(
    ("response", "target", "value"),
    [
        (r"so it is \boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"\boxed{x^2}", "x^2", 1.0),
        ("The answer is 72.", "72", 1.0),
        (r"\boxed{71}", "72", 0.0),
        ("", "72", 0.0),
    ],
)
def test_math_compares_answers_as_mathematics(response: str, target: str, value: float):
    assert math_reward("", response, target) == value


@pytest.mark.parametrize(("num_tokens", "value"), [(0, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (101, -1)])
def test_overlong_falls_from_0_to_minus_1_over_the_buffer(num_tokens: int, value: float):
    lengths = {"num_response_tokens": num_tokens, "max_response_tokens": 100}
    assert overlong_reward("", "", "", buffer_tokens=20, **lengths) == value


def test_a_penalty_lowers_the_total_and_leaves_a_right_answer_right():
    async def main() -> tuple[float, dict[str, float], bool]:
        rewards = [RewardConfig("exact"), RewardConfig("overlong", 0.5, {"buffer_tokens": 4})]
        config = Config(reward=rewards)
        config.rollout.max_response_tokens = 5
        async with RewardPool(config) as started:
            total, terms = await started.score(prompt(), Completion(0, "58", [3] * 4, [-0.1] * 4, "stop", (0, 0)))
            return total, terms, started.is_right(terms)

    assert asyncio.run(main()) == (0.625, {"exact": 1.0, "overlong": -0.75}, True)


def test_a_reward_that_takes_no_further_fields_needs_none(tmp_path: Path):
    file = tmp_path / "plain.py"
    file.write_text(
        "def plain(prompt, response, target): return 2.0\ndef long(prompt, response, target, "
        "num_response_tokens): return num_response_tokens\n"
    )

    async def main() -> dict[str, float]:
        async with pool(RewardConfig(f"{file}:plain"), RewardConfig(f"{file}:long")) as started:
            return (await started.score(prompt(), completion("58")))[1]

    assert asyncio.run(main()) == {"plain": 2.0, "long": 1.0}


def test_a_reward_is_found_by_name_module_or_file(rewards_file: Path):
    assert load_reward("exact") is exact_reward
    assert load_reward("forge_hpc.rewards.exact:exact_reward") is exact_reward
    assert load_reward(f"{rewards_file}:length")("", "abc", "") == 3


@pytest.mark.parametrize("name", ["exakt", "no_such_module:f", "missing.py:f", "forge_hpc.rewards.exact:nothing"])
def test_a_reward_that_is_not_there_is_the_users_error(name: str):
    with pytest.raises(UserError) as error:
        load_reward(name)
    assert error.value.hint


def test_the_total_is_the_weighted_sum_and_terms_are_unweighted():
    rewards = [RewardConfig("exact", 2.0), RewardConfig("gsm8k", 0.5)]
    total, terms = asyncio.run(pool(*rewards).score(prompt(), completion("it is 58")))
    assert terms == {"exact": 0.0, "gsm8k": 1.0}
    assert total == 0.5


def test_quick_rewards_start_no_process():
    async def main() -> int:
        async with pool(RewardConfig("exact")) as rewards:
            await rewards.score(prompt(), completion("58"))
            return len(rewards._workers)

    assert asyncio.run(main()) == 0


def test_users_rewards_get_fields_and_arguments_sync_or_async(rewards_file: Path):
    async def main() -> tuple[float, dict[str, float]]:
        rewards = [
            RewardConfig(f"{rewards_file}:length", args={"scale": 10.0}),
            RewardConfig(f"{rewards_file}:later"),
            RewardConfig(f"{rewards_file}:tell"),
            RewardConfig("math"),
        ]
        async with pool(*rewards) as started:
            return await started.score(prompt(difficulty=0.25), completion("58"))

    total, terms = asyncio.run(main())
    assert terms == {"length": 20.0, "later": 0.25, "tell": 1.0, "math": 1.0}
    assert total == 22.25


def test_a_reward_that_cannot_be_loaded_is_told_at_the_start(tmp_path: Path):
    file = tmp_path / "broken.py"
    file.write_text("import nothing_of_that_name\ndef f(*a, **k): return 1.0\n")
    with pytest.raises(UserError, match="nothing_of_that_name"):
        asyncio.run(pool(RewardConfig(f"{file}:f")).start())


@pytest.mark.parametrize(
    ("response", "kind"),
    [("raise", "raised"), ("none", "raised"), ("nan", "not_finite"), ("hang", "timeout"), ("die", "died")],
)
def test_a_bad_reward_costs_its_episode_and_the_pool_goes_on(rewards_file: Path, response: str, kind: str):
    async def main() -> None:
        async with pool(RewardConfig(f"{rewards_file}:misbehave", timeout_s=0.5)) as rewards:
            with pytest.raises(RewardError) as error:
                await rewards.score(prompt(), completion(response))
            assert error.value.kind == kind
            assert rewards.num_failed == {kind: 1}
            assert await rewards.score(prompt(), completion("fine")) == (1.0, {"misbehave": 1.0})

    asyncio.run(main())


def test_hanging_rewards_take_no_longer_than_their_limits(rewards_file: Path):
    async def main() -> float:
        reward = RewardConfig(f"{rewards_file}:misbehave", timeout_s=0.5)
        async with pool(reward, num_workers=2) as rewards:
            start = time.monotonic()
            texts = ["hang", "fine", "hang", "fine", "fine", "hang"]
            scores = [rewards.score(prompt(), completion(text)) for text in texts]
            results = await asyncio.gather(*scores, return_exceptions=True)
            for text, result in zip(texts, results, strict=True):
                assert isinstance(result, RewardError) if text == "hang" else result == (1.0, {"misbehave": 1.0})
            return time.monotonic() - start

    assert asyncio.run(main()) < 30


def test_no_worker_outlives_its_pool(rewards_file: Path):
    async def main() -> list[int]:
        async with pool(RewardConfig(f"{rewards_file}:tell"), num_workers=2) as rewards:
            processes = [worker._process for worker in rewards._workers]
        return [process.returncode for process in processes if process is not None]

    assert asyncio.run(main()) == [-9, -9]
