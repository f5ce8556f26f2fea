"""A log-probability of a generator that is not finite costs its completion; many of them end the run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from one_group import documents_of, make_group
from test_recipes import OneStep

from forge_hpc.config import Config
from forge_hpc.config.schema import RewardConfig
from forge_hpc.data.packing import pack
from forge_hpc.data.types import Completion, Document, Episode, Group, Prompt
from forge_hpc.recipes.base import NoArgs
from forge_hpc.recipes.grpo import GRPO
from forge_hpc.rewards import RewardPool
from forge_hpc.rollouts.checks import EpisodeWatch
from forge_hpc.rollouts.figures import measure

PROMPT = Prompt(0, "1+1=", [1, 2, 1, 3], "2")


def completion(index: int, text: str, last_logprob: float = -0.5) -> Completion:
    return Completion(index, text, [4, 5], [-0.1, last_logprob], "stop", (0, 0))


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), -1e39])  # the last one is none in float32
def test_a_completion_without_a_finite_log_probability_is_left_out_and_counted(value: float) -> None:
    config = Config(reward=[RewardConfig(name="exact")])
    samples = [completion(0, "2"), completion(1, "2", value), completion(2, "3")]

    async def scenario() -> Group:
        async with RewardPool(config) as rewards:
            return await make_group(PROMPT, samples, rewards, config)

    group = asyncio.run(scenario())
    assert [episode.completion.sample_index for episode in group.episodes] == [0, 2]
    figures = measure([group], step=1)
    assert figures["rewards/failed_logprobs"] == figures["episodes/failed"] == 1
    assert figures["reward/mean"] == 0.5
    assert all(np.isfinite(document.generator_logprobs).all() for document in documents_of([group], config))


def test_so_is_an_episode_one_of_whose_turns_has_none() -> None:
    config = Config(reward=[RewardConfig(name="exact")])
    turns = Completion(0, "2", [4, 5, 6], [float("nan"), 0.0, -0.1], "stop", (0, 0), loss_mask=[True, False, True])

    async def scenario() -> Group:
        async with RewardPool(config) as rewards:
            return await make_group(PROMPT, [Episode(PROMPT, turns, 1.0), completion(1, "2")], rewards, config)

    group = asyncio.run(scenario())
    assert [kind for kind, _ in group.failures] == ["logprobs"] and len(group.episodes) == 1


class OneOfEightIsNaN:
    """The one generator of a run."""

    def __init__(self) -> None:
        self.generate = self

    def __len__(self) -> int:
        return 1

    async def stream(self, prompts: list[Prompt], *, key: int) -> AsyncIterator[tuple[tuple[int, int], Completion]]:
        for place, prompt in enumerate(prompts):
            yield (place, 0), completion(0, "no")
            yield (place, 1), completion(1, prompt.target, float("nan") if place == 2 else -0.5)


class OneStepPacked(OneStep):
    """Takes what trainers would take."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, OneOfEightIsNaN())
        self.documents: list[Document] = []
        self.said: list[str] = []
        self.figures: dict[str, float] = {}

    async def train_step(self, step: int, documents: list[Document], update: bool) -> dict[str, float]:
        pack(documents, 64)  # refuses what is not finite
        self.documents = documents
        return await super().train_step(step, documents, update)

    async def end_step(self, step: int, metrics: Any, state: Any, groups: list[Group]) -> None:
        await super().end_step(step, metrics, state, groups)
        self.figures = metrics

    def warn(self, text: str) -> None:
        self.said.append(text)


def test_a_step_of_grpo_goes_on_without_it_and_says_so_once(tmp_path: Path) -> None:
    config = Config(reward=[RewardConfig(name="exact")])
    config.rollout.prompts_per_step, config.rollout.group_size, config.evaluation.num_prompts = 4, 2, 0
    config.data.path, config.data.chat_template = "builtin:addition", False
    session: Any = OneStepPacked(config)

    async def scenario() -> None:
        try:
            await GRPO(NoArgs()).run(session)
        finally:
            for close in session.closing:
                await close()

    asyncio.run(asyncio.wait_for(scenario(), 60))
    assert session.figures["rewards/failed_logprobs"] == 1 and session.figures["reward/mean"] == 3 / 7
    assert len(session.documents) == 6  # the seventh has nothing to be compared with
    [warning] = session.said
    assert "step 1: 1 of 8 completions have log-probabilities from their generator that are not finite" in warning


def group(num_good: int, num_bad: int) -> Group:
    episodes = [Episode(PROMPT, completion(index, "2"), float(index % 2)) for index in range(num_good)]
    return Group(PROMPT, episodes, num_bad, [("logprobs", "not finite")] * num_bad)


def test_more_than_a_tenth_of_the_last_hundred_completions_end_the_run_with_the_cause() -> None:
    said: list[str] = []
    watch = EpisodeWatch(said.append)
    watch.check(1, [group(0, 4)])  # too few to tell, and too long ago at the end
    for step in range(2, 12):
        watch.check(step, [group(9, 1)])
    assert len(said) == 2 and "4 of 4 completions" in said[0] and "4 of 4 episodes were left out" in said[1]
    with pytest.raises(RuntimeError, match=r"step 12: of the last 100 completions 11 have log.* not finite\. Has the"):
        watch.check(12, [group(8, 2)])


def test_a_large_step_is_judged_by_itself() -> None:
    watch = EpisodeWatch(lambda text: None)
    watch.check(1, [group(1000, 0)])
    watch.check(2, [group(180, 20)])
    with pytest.raises(RuntimeError, match="step 3: of the last 200 completions 21 have"):
        watch.check(3, [group(179, 21)])
