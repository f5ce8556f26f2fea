"""From completions to documents and figures, and what must hold at every step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from one_group import documents_of, make_group

from forge_hpc.advantages import advantage_function
from forge_hpc.config import Config
from forge_hpc.config.rewards import reward_weights
from forge_hpc.config.schema import RewardConfig
from forge_hpc.controller.service import cause_of
from forge_hpc.controller.session import background
from forge_hpc.data.builtin import char_tokenizer
from forge_hpc.data.mixture import open_sources
from forge_hpc.data.prompts import PromptStream
from forge_hpc.data.types import Completion, Document, Group, Prompt
from forge_hpc.recipes.base import NoArgs
from forge_hpc.recipes.grpo import GRPO
from forge_hpc.rewards import RewardPool
from forge_hpc.rollouts.buffer import episode_buffer
from forge_hpc.rollouts.checks import SignalWatch
from forge_hpc.rollouts.documents import set_advantages, to_documents
from forge_hpc.rollouts.figures import RolloutClock, measure
from forge_hpc.rollouts.groups import has_signal, make_groups
from forge_hpc.rollouts.stream import RolloutStream

PROMPT = Prompt(0, "1+1=", [1, 2, 1, 3], "2")


@pytest.fixture
def config() -> Config:
    return Config(reward=[RewardConfig(name="exact")])


class OneStep:
    """A session whose trainers train nothing, for one step. Whole runs are tested end to end."""

    def __init__(self, config: Config, generators: Any) -> None:
        self.config, self.state, self.step = config, {}, 0
        self.generators, self.groups, self.closing = generators, [], []

    async def start(self) -> None:
        self.rewards = await RewardPool(self.config).start()
        self.closing.append(self.rewards.close)

    @asynccontextmanager
    async def rollouts(self) -> AsyncIterator[RolloutStream]:
        prompts = PromptStream(open_sources(self.config), char_tokenizer(), self.config)
        buffer, generators = episode_buffer(self.config, self.step, prompts.position), self.generators
        stream = RolloutStream(self.config, prompts, generators.stream, 1, self.rewards, buffer, self.warn)
        async with background(stream.run()):
            yield stream

    def remaining_steps(self) -> list[int]:
        return [1]

    async def train_step(self, step: int, documents: list[Document], update: bool) -> dict[str, float]:
        return {"mismatch/logprob_abs_mean": 0.0}

    def warn(self, text: str) -> None:
        raise AssertionError(text)

    async def publish(self, step: int) -> None: ...

    async def evaluate(self, step: int) -> None: ...

    async def end_step(self, step: int, metrics: Any, state: Any, groups: list[Group]) -> None:
        assert state["prompts"]["position"] == 4
        self.groups = groups

    async def finish(self) -> None: ...


class SlowestLast:
    """The one generator of a run: it is done with the last completion of a call when all others are rewarded."""

    def __init__(self, rewarded: Path) -> None:
        self.rewarded, self.generate = rewarded, self

    def __len__(self) -> int:
        return 1

    async def stream(
        self, prompts: list[Prompt], *, key: int | None
    ) -> AsyncIterator[tuple[tuple[int, int], Completion]]:
        assert key == 0
        *first, last = ((index, sample) for index in range(len(prompts)) for sample in range(2))
        for index, sample in reversed(first):
            yield (index, sample), completion(sample, ("no", prompts[index].target)[sample])
        while len(list(self.rewarded.iterdir())) < len(first):
            await asyncio.sleep(0.01)
        yield last, completion(1, prompts[last[0]].target)


def one_step(config: Config, directory: Path, reward: str) -> OneStep:
    config.rollout.prompts_per_step, config.rollout.group_size, config.evaluation.num_prompts = 4, 2, 0
    config.data.path, config.data.chat_template = "builtin:addition", False
    (directory / "rewarded").mkdir()
    (directory / "reward.py").write_text(reward)
    config.reward = [RewardConfig(name=f"{directory}/reward.py:touch", args={"directory": f"{directory}/rewarded"})]
    session = OneStep(config, SlowestLast(directory / "rewarded"))

    async def scenario() -> None:
        try:
            await GRPO(NoArgs()).run(session)  # type: ignore[arg-type]
        finally:
            for close in session.closing:
                await close()

    asyncio.run(asyncio.wait_for(scenario(), 60))
    return session


def test_in_a_synchronous_run_completions_are_rewarded_while_others_are_generated(
    config: Config, tmp_path: Path
) -> None:
    reward = """
from pathlib import Path

def touch(prompt, response, target, directory, **fields):
    Path(directory, f"{target} {response}").touch()
    return float(response == target)
"""
    session = one_step(config, tmp_path, reward)
    assert [group.prompt.position for group in session.groups] == [0, 1, 2, 3]
    assert [[episode.reward for episode in group.episodes] for group in session.groups] == [[0, 1]] * 4


def test_an_error_in_a_reward_loop_ends_the_run_with_its_cause(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(RewardPool, "score", fail)
    with pytest.raises(BaseExceptionGroup) as raised:
        one_step(config, tmp_path, "def touch(prompt, response, target, directory, **fields): return 0.0")
    assert isinstance(cause_of(raised.value), OSError)


def completion(index: int, text: str, num_tokens: int = 2) -> Completion:
    return Completion(index, text, [7] * num_tokens, [-0.5] * num_tokens, "stop", (0, 0))


def group_of(config: Config, *texts: str, num_tokens: int = 2):
    async def scenario():
        pool = await RewardPool(config).start()
        completions = [completion(i, text, num_tokens) for i, text in enumerate(texts)]
        try:
            return await make_group(PROMPT, completions, pool, config)
        finally:
            await pool.close()

    return asyncio.run(scenario())


def test_a_group_compares_its_rewards(config: Config) -> None:
    group = group_of(config, "2", "3", "3", "2")
    assert [episode.reward for episode in group.episodes] == [1, 0, 0, 1]
    assert has_signal(group)
    documents_of([group], config)
    assert [episode.advantage for episode in group.episodes] == pytest.approx([1, -1, -1, 1], abs=1e-4)


def test_an_empty_completion_is_counted_and_left_out(config: Config) -> None:
    group = group_of(config, "2", "3", num_tokens=0)
    assert (group.episodes, group.num_failed) == ([], 2)


def test_a_prompt_that_the_generator_refuses_is_counted(config: Config) -> None:
    config.rollout.group_size = 2

    async def samples() -> AsyncIterator[tuple[tuple[int, int], Completion | ValueError]]:
        yield (1, 0), ValueError("too long")
        yield (0, 1), completion(1, "2")
        yield (1, 1), ValueError("too long")
        yield (0, 0), completion(0, "3")

    async def scenario() -> list[Group]:
        pool = RewardPool(config)
        groups = [group async for group in make_groups([PROMPT, PROMPT], samples(), pool, config)]
        return [*groups, await make_group(PROMPT, ValueError("too long"), pool, config)]

    refused, good, alone = asyncio.run(scenario())
    assert (refused.episodes, refused.num_failed) == (alone.episodes, alone.num_failed) == ([], 2)
    assert [episode.completion.sample_index for episode in good.episodes] == [0, 1]


def test_a_reward_that_fails_costs_its_episode_alone(config: Config, tmp_path: Path) -> None:
    file = tmp_path / "reward.py"
    file.write_text(
        "def picky(prompt, response, target, **fields):\n"
        "    if response == 'boom': raise ValueError(response)\n"
        "    return float(response)\n"
    )
    config.reward = [RewardConfig(name=f"{file}:picky")]
    group = group_of(config, "1", "boom", "nan", "0")
    assert [episode.reward for episode in group.episodes] == [1, 0]
    assert group.num_failed == 2


def test_documents_hold_the_generators_logprobs_at_the_response_alone(config: Config) -> None:
    [document, _] = documents_of([group_of(config, "2", "3")], config)
    assert document.token_ids.tolist() == [1, 2, 1, 3, 7, 7]
    assert document.loss_mask.tolist() == [False] * 4 + [True] * 2
    np.testing.assert_allclose(document.generator_logprobs, [0, 0, 0, 0, -0.5, -0.5])
    assert document.advantage == pytest.approx(1, abs=1e-4)


def test_groups_without_a_signal_are_dropped_where_others_have_one(config: Config) -> None:
    with_signal, without = group_of(config, "2", "3"), group_of(config, "3", "3")
    assert len(documents_of([with_signal, without], config)) == 2
    assert len(documents_of([without], config)) == 2  # a step stays a step
    config.algorithm.drop_zero_signal_groups = False
    assert len(documents_of([with_signal, without], config)) == 4


def test_advantages_of_a_whole_step_give_unanimous_groups_a_signal_too(config: Config) -> None:
    config.algorithm.advantage = "batch_mean_std"
    right, wrong, failed = group_of(config, "2", "2"), group_of(config, "3", "3"), group_of(config, "2", num_tokens=0)
    documents = documents_of([right, failed, wrong], config)
    assert [document.advantage for document in documents] == pytest.approx([1, 1, -1, -1], abs=1e-4)
    config.algorithm.advantage = "group_mean_batch_std"
    mixed = group_of(config, "2", "3")
    documents = documents_of([right, mixed, failed], config)
    assert [document.advantage for document in documents] == pytest.approx([2**0.5, -(2**0.5)], abs=1e-4)


def test_rewards_that_are_compared_apart_have_their_weights(config: Config, tmp_path: Path) -> None:
    file = tmp_path / "reward.py"
    file.write_text("def short(prompt, response, target, **fields):\n    return (-float(len(response)), {'seen': 9})\n")
    config.reward = [RewardConfig(name="exact"), RewardConfig(name=f"{file}:short", weight=0.5)]
    config.algorithm.advantage = "gdpo"
    group = group_of(config, "2", "22", "333", "2")
    documents = documents_of([group], config)
    exact, short = (np.array(values, float) for values in ([1, 0, 0, 1], [-1, -2, -3, -1]))
    summed = sum(w * (r - r.mean()) / r.std() for w, r in ((1, exact), (0.5, short)))
    assert [document.advantage for document in documents] == pytest.approx(summed / summed.std(), abs=1e-4)
    for episode in group.episodes:  # of an environment, beside a reward
        episode.rewards["environment"] = 0.0
    assert reward_weights(config) == {"": {"exact": 1.0, "short": 0.5}}
    config.environment.name = "calculator"
    assert reward_weights(config)[""]["environment"] == 1.0
    with pytest.raises(ValueError, match="reward_weights"):
        set_advantages([group], advantage_function("gdpo"))


def test_answers_that_were_cut_off_are_left_out_and_compared_with(config: Config) -> None:
    config.algorithm.drop_truncated = True
    group = group_of(config, "2", "3", "3", "3")
    for index in (1, 2):
        group.episodes[index].completion.finish_reason = "length"
    documents = documents_of([group], config)
    assert [document.advantage for document in documents] == pytest.approx([3**0.5, -(3**-0.5)], abs=1e-4)
    for episode in group.episodes:
        episode.completion.finish_reason = "length"
    documents = documents_of([group, group_of(config, "2", "2")], config)
    assert len(documents) == 6 and not any(document.advantage for document in documents)  # a step without a signal
    config.algorithm.drop_truncated = False
    assert len(documents_of([group], config)) == 4


def test_of_an_agents_conversations_those_that_were_cut_off_are_left_out(config: Config) -> None:
    group = group_of(config, "2", "3")
    for episode in group.episodes:
        episode.branches = [completion(0, "2", 3)]
        episode.completion.finish_reason = "length"
    set_advantages([group], advantage_function("group_mean"))
    assert [len(d.token_ids) for d in to_documents([group], drop_truncated=True)] == [3, 3]
    assert len(to_documents([group])) == 4


def test_the_advantage_is_the_one_of_the_loss_unless_it_is_named(config: Config) -> None:
    def advantages(loss: str, advantage: str | None = None) -> list[float]:
        config.algorithm.loss, config.algorithm.advantage = loss, advantage
        return [document.advantage for document in documents_of([group_of(config, "2", "3", "3", "3")], config)]

    assert advantages("grpo") == pytest.approx([3**0.5, *[-(3**-0.5)] * 3], abs=1e-4)
    assert advantages("dr_grpo") == pytest.approx([0.75, -0.25, -0.25, -0.25])
    assert advantages("rloo") == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    assert advantages("rloo", "group_mean") == pytest.approx([0.75, -0.25, -0.25, -0.25])


def test_figures_cover_all_completions_before_any_filtering(config: Config) -> None:
    figures = measure([group_of(config, "2", "3"), group_of(config, "3", "3")], step=3)
    assert figures["reward/mean"] == 0.25 and figures["reward/exact"] == 0.25
    assert figures["groups/zero_signal"] == 1
    assert figures["staleness/max"] == 2
    assert figures["tokens/generated"] == 8


def test_a_step_in_which_every_completion_failed_says_so(config: Config) -> None:
    with pytest.raises(RuntimeError, match="all completions of step 1 failed"):
        measure([group_of(config, "2", num_tokens=0)], step=1)


def test_a_run_without_a_signal_ends_after_the_steps_that_are_allowed(config: Config) -> None:
    config.algorithm.max_steps_without_signal = 2
    watch, flat = SignalWatch(config), Document(np.array([1]), np.array([True]), advantage=0.0)
    steep = Document(np.array([1]), np.array([True]), advantage=1.0)
    watch.check(1, [flat], {"reward/mean": 0.0})
    watch.check(2, [flat, steep], {"reward/mean": 0.0})
    watch.check(3, [flat], {"reward/mean": 0.0})
    with pytest.raises(RuntimeError, match="no learning signal: in the last 2 steps"):
        watch.check(4, [flat], {"reward/mean": 0.0})


def test_of_many_steps_without_a_signal_a_few_are_told_of(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    config.algorithm.max_steps_without_signal = 40
    watch, flat = SignalWatch(config), Document(np.array([1]), np.array([True]), advantage=0.0)
    for step in range(1, 40):
        watch.check(step, [flat], {"reward/mean": 5.0})
    assert [int(message.split()[1][:-1]) for message in caplog.messages] == [1, 2, 4, 8, 16, 20, 32]
    assert caplog.messages[-1].endswith("(reward/mean 5.000); 32 such steps so far, 32 of 40 in a row")


def test_steps_without_a_signal_are_counted_across_a_restart(config: Config) -> None:
    config.algorithm.max_steps_without_signal = 3
    flat = Document(np.array([1]), np.array([True]), advantage=0.0)
    watch = SignalWatch(config)
    watch.check(1, [flat], {"reward/mean": 0.0})
    watch.check(2, [flat], {"reward/mean": 0.0})
    with pytest.raises(RuntimeError, match="no learning signal: in the last 3 steps"):
        SignalWatch(config, watch.state_dict()).check(3, [flat], {"reward/mean": 0.0})


def test_generators_wait_for_the_trainer_only_while_nothing_is_in_flight() -> None:
    clock = RolloutClock()
    first = clock.begin(1)
    clock.begin(1)  # the next step begins while the first is still generating
    assert clock.wait_trainer_s == 0
    clock.end(first)
    clock.end(first)
    before = clock.generate_s
    clock.begin(1)
    assert clock.wait_trainer_s > 0 and clock.generate_s == before
    assert clock.metrics() == {"time/generate_s": before, "time/wait_trainer_s": clock.wait_trainer_s}
