"""Episodes that are open at once, and what holds within a group and between training and evaluation."""

from __future__ import annotations

import asyncio
import io
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from one_group import make_group
from test_environments import Chatter, InProcess, ScriptedGenerator, chat_tokenizer, played, prompt_of, with_pool

from forge_hpc.config import Config, load_config
from forge_hpc.config.schema import EnvironmentConfig, LoggingConfig, RewardConfig
from forge_hpc.data.builtin import char_tokenizer
from forge_hpc.data.mixture import open_sources
from forge_hpc.data.prompts import PromptStream, evaluation_prompts
from forge_hpc.data.source import load_eval_examples
from forge_hpc.data.types import HELD_OUT, Completion, Episode, Group, Prompt, Turn
from forge_hpc.environments import EnvironmentFailed, EnvironmentPool, Step
from forge_hpc.observability.logger import MetricLogger
from forge_hpc.observability.summary import final_summary
from forge_hpc.rewards import RewardPool
from forge_hpc.rollouts.checks import EpisodeWatch
from forge_hpc.rollouts.episodes import EpisodePlayer
from forge_hpc.rollouts.figures import measure
from forge_hpc.run_dir import RunDir


@pytest.fixture
def config() -> Config:
    config = Config(reward=[], environment=EnvironmentConfig(name="guessing", timeout_s=20.0))
    config.data.chat_template = False
    config.rollout.group_size = 8
    return config


# --- positions


def test_held_out_prompts_have_no_position_and_no_seed_that_training_has() -> None:
    config = Config(reward=[], environment=EnvironmentConfig(name="guessing"))
    config.data.chat_template = False
    tokenizer = char_tokenizer()
    training = PromptStream(open_sources(config), tokenizer, config).take(2000)
    starts = [evaluation_prompts(load_eval_examples(config.data, 0), tokenizer, config, 50) for _ in range(2)]
    held_out = starts[0]
    assert [prompt.position for prompt in held_out] == [HELD_OUT + place for place in range(50)]
    assert starts[0] == starts[1]
    assert not {prompt.position for prompt in training} & {prompt.position for prompt in held_out}
    assert {prompt.seed < HELD_OUT for prompt in training} == {True}
    assert {HELD_OUT <= prompt.seed < 2**31 for prompt in held_out} == {True}


def test_seeds_of_different_positions_are_different_and_far_apart() -> None:
    """A generator whose task of seed s + 1 is the second one of seed s (reasoning-gym) gives no task twice."""
    seeds = sorted(prompt_of(position).seed for start in (0, HELD_OUT) for position in range(start, start + 10_000))
    assert len(set(seeds)) == 20_000
    assert min(high - low for low, high in itertools.pairwise(seeds)) > 50_000
    assert [prompt_of(position).seed for position in (0, HELD_OUT - 1)] == [0, (-0x278DDE6D) % HELD_OUT]


# --- open episodes


class Counted(Chatter):
    """Counts how many are open, and plays three turns."""

    now = most = 0

    async def reset(self, prompt: Prompt) -> str:
        self.left = 3
        Counted.now += 1
        Counted.most = max(Counted.most, Counted.now)
        return "Say something."

    async def step(self, response: str) -> Step:
        await asyncio.sleep(random.random() / 1000)
        self.left -= 1
        Counted.now -= self.left == 0
        return Step("", reward=1.0, done=self.left == 0)


async def play(player: EpisodePlayer, num_prompts: int, key: int | None) -> list[Any]:
    groups = await asyncio.wait_for(played(player, [prompt_of(place) for place in range(num_prompts)], key), 60)
    return [episode for group in groups for episode in group]


@pytest.mark.parametrize("key", [0, None], ids=["lockstep", "free"])
@pytest.mark.parametrize("most", [1, 3])
def test_no_more_episodes_are_open_than_there_is_room_for(config: Config, key: int | None, most: int) -> None:
    tokenizer, Counted.now, Counted.most = chat_tokenizer(), 0, 0
    pool = InProcess(Counted)
    pool.max_open_episodes = most
    generator = ScriptedGenerator(tokenizer, 1)
    player = EpisodePlayer(config, tokenizer, generator, pool)  # type: ignore[arg-type]
    episodes = asyncio.run(play(player, 2, key))
    assert len(episodes) == 16 and all(isinstance(episode, Episode) for episode in episodes)
    assert Counted.most == most
    if key == 0:  # a place that falls free is taken before the next responses are asked for
        waves = [most] * (16 // most) + [16 % most] * (16 % most > 0)
        assert [len(call) for call in generator.calls] == [size for size in waves for _ in range(3)]


def test_a_lockstep_with_a_bound_asks_for_the_same_turns_in_every_run(config: Config) -> None:
    def calls(seed: int) -> list[list[tuple[int, int, int]]]:
        class Slow(Chatter):
            async def step(self, response: str) -> Step:
                await asyncio.sleep(jitter.random() / 500)
                return await super().step(response)

        jitter, tokenizer = random.Random(seed), chat_tokenizer()
        pool = InProcess(Slow)
        pool.max_open_episodes = 5
        generator = ScriptedGenerator(tokenizer, 1)
        player = EpisodePlayer(config, tokenizer, generator, pool)  # type: ignore[arg-type]
        asyncio.run(play(player, 4, 0))
        return generator.calls

    assert calls(1) == calls(2)


def test_generators_in_lockstep_share_the_open_episodes_and_none_waits_for_another(config: Config) -> None:
    tokenizer = chat_tokenizer()
    pool = InProcess(Chatter)

    async def both(most: int) -> list[int]:
        pool.max_open_episodes = most
        generator = ScriptedGenerator(tokenizer, 1)
        player = EpisodePlayer(config, tokenizer, generator, pool, num_generators=2)  # type: ignore[arg-type]
        await asyncio.gather(play(player, 2, 0), play(ShiftedPlayer(player), 2, 1))
        return [len(call) for call in generator.calls]

    class ShiftedPlayer:
        def __init__(self, player: EpisodePlayer) -> None:
            self.player = player

        def stream(self, prompts: list[Prompt], **options: Any) -> Any:
            return self.player.stream([prompt_of(prompt.position + 100) for prompt in prompts], **options)

    assert max(asyncio.run(both(6))) == 3
    assert set(asyncio.run(both(1))) == {1}


FULL = """
import asyncio
from forge_hpc.environments import EnvironmentFull, Step

num_open = 0

class Full:
    def __init__(self, told=True, room=2):
        self.limit, self.room, self.is_open = (room if told else None), room, False

    async def reset(self, prompt):
        global num_open
        if num_open >= self.room:
            raise EnvironmentFull("no room", self.limit)
        num_open += 1
        self.is_open = True
        return "go"

    async def step(self, response):
        return Step(str(num_open), reward=float(num_open <= self.room), done=True)

    async def close(self):
        global num_open
        num_open -= self.is_open
"""


def user_class(config: Config, directory: Path, source: str, name: str, **args: Any) -> Config:
    (directory / f"{name.lower()}.py").write_text(source)
    config.environment.name, config.environment.args = f"{directory}/{name.lower()}.py:{name}", args
    return config


@pytest.mark.parametrize("key", [0, None], ids=["lockstep", "free"])
@pytest.mark.parametrize("told", [True, False])
def test_episodes_that_there_is_no_room_for_wait_and_none_is_lost(
    config: Config, tmp_path: Path, key: int | None, told: bool
) -> None:
    tokenizer = chat_tokenizer()

    async def scenario(pool: EnvironmentPool) -> tuple[list[Any], int | None]:
        player = EpisodePlayer(config, tokenizer, ScriptedGenerator(tokenizer, 1), pool)
        return await play(player, 2, key), pool.max_open_episodes

    episodes, most = with_pool(user_class(config, tmp_path, FULL, "Full", told=told), scenario)
    assert [episode.reward for episode in episodes] == [1.0] * 16
    assert most == (2 if told else None)


def test_a_place_that_others_hold_is_waited_for_as_long_as_an_episode_may_take(config: Config, tmp_path: Path) -> None:
    config.environment.timeout_s = 0.5
    tokenizer = chat_tokenizer()

    async def scenario(pool: EnvironmentPool) -> list[Any]:
        return await play(EpisodePlayer(config, tokenizer, ScriptedGenerator(tokenizer, 1), pool), 1, 0)

    episodes = with_pool(user_class(config, tmp_path, FULL, "Full", told=False, room=0), scenario)
    assert {(type(episode), episode.kind) for episode in episodes} == {(EnvironmentFailed, "full")}


def test_a_class_says_how_many_of_it_may_be_open(config: Config, tmp_path: Path) -> None:
    source = FULL.replace("class Full:", "class Full:\n    max_open_episodes = 3")

    async def most(pool: EnvironmentPool) -> int | None:
        return pool.max_open_episodes

    user_class(config, tmp_path, source, "Full")
    assert with_pool(config, most) == 3
    config.environment.max_open_episodes = 2
    assert with_pool(config, most) == 2


def test_who_gives_up_waiting_takes_no_place(config: Config) -> None:
    tokenizer, pool = chat_tokenizer(), InProcess(Chatter)
    pool.max_open_episodes = 1
    stuck = asyncio.Event()

    async def never(*_: Any, **__: Any) -> list[Completion]:
        stuck.set()
        return await asyncio.get_running_loop().create_future()

    async def scenario() -> None:
        player = EpisodePlayer(config, tokenizer, never, pool)  # type: ignore[arg-type]
        task = asyncio.create_task(play(player, 1, None))
        await stuck.wait()
        task.cancel()
        await asyncio.wait({task})
        assert player._slots.num_taken == 0
        player._generate = ScriptedGenerator(tokenizer, 1)  # type: ignore[assignment]
        assert len(await play(player, 1, 0)) == 8

    asyncio.run(asyncio.wait_for(scenario(), 60))


# --- one task a group


SEEDS = """
import random, time
from random import randint
import numpy as np
from forge_hpc.environments import Step

class Seeds:
    async def reset(self, prompt):
        random.seed(prompt.seed)
        np.random.seed(prompt.seed)
        return "go"

    async def step(self, response):
        time.sleep(0.002)
        draws = [randint(0, 10**9), int(np.random.randint(10**9)), random.choice(range(10**9))]
        return Step(" ".join(map(str, draws)), reward=0.0)

    async def close(self):
        pass
"""


def test_environments_that_seed_the_global_generators_do_not_draw_from_each_others(
    config: Config, tmp_path: Path
) -> None:
    async def scenario(pool: EnvironmentPool) -> list[list[str]]:
        async def episode(position: int) -> list[str]:
            async with pool.open() as environment:
                await environment.reset(prompt_of(position))
                return [(await environment.step("")).observation for _ in range(5)]

        return await asyncio.gather(*(episode(number % 2) for number in range(16)))

    drawn = with_pool(user_class(config, tmp_path, SEEDS, "Seeds"), scenario)
    expected = []
    for position in range(2):
        rng, seed = random.Random(prompt_of(position).seed), prompt_of(position).seed
        numbers = np.random.RandomState(seed)
        expected.append(
            [f"{rng.randint(0, 10**9)} {numbers.randint(10**9)} {rng.choice(range(10**9))}" for _ in range(5)]
        )
    assert drawn == expected * 8


def group_of(texts: list[str], num_failed: int = 0, **metadata: Any) -> Group:
    def episode(number: int, text: str) -> Episode:
        metadata_ = {"turns": 1, "truncated_turns": 0, "transcript": [], "info": {}} | metadata
        completion = Completion(number, "a", [1], [-1.0], "stop", (0, 0), [True], metadata_)
        return Episode(Prompt(7, text, [1], ""), completion, float(number))

    failures = [("environment", "the server closed the session")] * num_failed
    return Group(prompt_of(7), [episode(n, text) for n, text in enumerate(texts)], num_failed, failures)


def test_a_group_whose_openings_differ_is_counted_and_said_once_in_one_line() -> None:
    said: list[str] = []
    watch = EpisodeWatch(said.append)
    opening = "You are a player of a word game. " * 9
    groups = [group_of(["same", "same"]), group_of([opening + "The word: tree", opening + "The word: lamp"])]
    watch.check(1, [group_of(["same", "same"])])
    assert said == []
    watch.check(2, groups)
    watch.check(3, groups)
    [line] = said
    assert "prompt 7" in line and "The word: tree" in line and "The word: lamp" in line and "\n" not in line
    assert measure(groups, 2)["groups/unequal_openings"] == 1.0


def test_a_run_that_loses_most_of_its_episodes_says_so_on_the_console_and_at_the_end(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    console = io.StringIO()
    with MetricLogger(run_dir, LoggingConfig(tensorboard=False), stream=console) as metrics:
        watch = EpisodeWatch(metrics.warn)
        for step in (1, 2):
            groups = [group_of(["same"], num_failed=7)]
            watch.check(step, groups)
            metrics.log(step, measure(groups, step))
    [warning] = [line for line in console.getvalue().splitlines() if line.startswith("warning")]
    assert "7 of 8 episodes were left out" in warning and "closed the session" in warning
    assert "14 of 16 were left out" in final_summary(run_dir)


# --- what counts as truncated, and rewards


async def one_episode(config: Config, environment: type, finish: list[str]) -> Any:
    tokenizer = chat_tokenizer()

    async def generate(turns: list[Turn], *_: Any, key: int | None) -> list[Completion]:
        return [Completion(0, "a", [9], [-1.0], finish[turn.turn], (0, 0)) for turn in turns]

    config.rollout.group_size = 1
    player = EpisodePlayer(config, tokenizer, generate, InProcess(environment))  # type: ignore[arg-type]
    [[episode]] = await played(player, [prompt_of()], 0)
    return episode


def test_an_answer_that_was_cut_off_counts_as_truncated_also_where_the_environment_takes_it(config: Config) -> None:
    seen: list[tuple[str, bool]] = []

    class Judge(Chatter):
        async def step(self, response: Any) -> Step:
            seen.append((response, response.truncated))
            return Step("go on", reward=0.5, done=len(seen) == 3)

    episode = asyncio.run(one_episode(config, Judge, ["stop", "length", "length"]))
    assert seen == [("a", False), ("a", True), ("a", True)]
    assert episode.completion.finish_reason == "length"
    figures = measure([Group(episode.prompt, [episode])], 1)
    assert figures["response/truncated_fraction"] == pytest.approx(2 / 3)
    assert figures["episode/truncated_fraction"] == 1.0
    seen.clear()
    episode = asyncio.run(one_episode(config, Judge, ["length", "stop", "stop"]))
    assert episode.completion.finish_reason == "stop"
    seen.clear()
    config.environment.max_turns = 1
    episode = asyncio.run(one_episode(config, Judge, ["length"]))
    assert episode.completion.finish_reason == "length"


def test_a_response_knows_in_its_process_whether_it_was_cut_off(config: Config, tmp_path: Path) -> None:
    from forge_hpc.environments import Response

    source = SEEDS.replace('Step(" ".join(map(str, draws))', "Step(f'{response} {response.truncated}'")

    async def scenario(pool: EnvironmentPool) -> list[str]:
        async with pool.open() as environment:
            await environment.reset(prompt_of())
            return [(await environment.step(Response("x", cut))).observation for cut in (False, True)]

    assert with_pool(user_class(config, tmp_path, source, "Seeds"), scenario) == ["x False", "x True"]


def test_a_missing_reward_is_not_zero(config: Config) -> None:
    class Silent(Chatter):
        rewards: tuple[float | None, ...] = (None, None)

        async def reset(self, prompt: Prompt) -> str:
            self.left = list(self.rewards)
            return "go"

        async def step(self, response: str) -> Step:
            return Step("", reward=self.left.pop(0), done=not self.left)

    config.environment.max_turns = 2
    nothing = asyncio.run(one_episode(config, Silent, ["stop", "stop"]))
    assert isinstance(nothing, EnvironmentFailed) and nothing.kind == "reward"
    Silent.rewards = (0.25,)
    assert asyncio.run(one_episode(config, Silent, ["stop"])).rewards == {"environment": 0.25}
    Silent.rewards = (None, None)
    config.reward = [RewardConfig("exact")]
    alone = asyncio.run(one_episode(config, Silent, ["stop", "stop"]))

    async def rewarded() -> Group:
        async with RewardPool(config) as pool:
            return await make_group(prompt_of(target="a"), [alone], pool, config)

    [episode] = asyncio.run(rewarded()).episodes
    assert "environment" not in episode.rewards and set(episode.rewards) == {"exact"}


def test_the_default_reward_is_not_added_to_an_environments_unless_it_is_named() -> None:
    def names(*overrides: str) -> list[str]:
        return [reward.name for reward in load_config(None, overrides).reward]

    assert names() == ["exact"]
    assert names("environment.name=guessing") == []
    assert names("environment.name=guessing", "reward=[{name: exact}]") == ["exact"]
    assert names("environment.name=guessing", "reward.0.weight=2") == ["exact"]
    assert names("reward.0.weight=2") == ["exact"]
    assert names("environment.name=guessing", "reward=[{name: math}]") == ["math"]


# --- evaluation


class Records:
    """What an evaluation writes, and what it says."""

    def __init__(self) -> None:
        self.written: dict[str, float] = {}
        self.said: list[str] = []

    def is_evaluated(self, step: int, figure: str) -> bool:
        return False

    def log_evaluation(self, step: int, values: dict[str, float], answers: Sequence[dict[str, Any]]) -> None:
        self.written, self.answers = values, answers

    def show_evaluation(self, step: int, num_done: int, num: int, num_right: int) -> None:
        self.shown = (num_done, num)

    def warn(self, message: str) -> None:
        self.said.append(message)


@pytest.mark.parametrize("num_failed", [1, 3])
def test_an_evaluation_counts_what_failed_and_says_so_where_that_is_most_of_it(config: Config, num_failed: int) -> None:
    from forge_hpc.evaluation.evaluator import Evaluator, HeldOutSet

    class Player:
        async def stream(self, prompts: list[Prompt], *_: Any, key: int) -> Any:
            for place, prompt in enumerate(prompts):
                completion = Completion(0, "a", [1], [-1.0], "stop", (0, 0), [True])
                failed = EnvironmentFailed("the server is gone")
                yield (
                    (place, 0),
                    failed if place < num_failed else Episode(prompt, completion, 1.0, {"environment": 1.0}),
                )

    async def evaluate() -> Records:
        records, prompts, ask = Records(), [prompt_of(place) for place in range(4)], Player().stream
        async with RewardPool(config) as rewards:
            sets = [HeldOutSet("", prompts, rewards)]
            evaluator = Evaluator(config, sets, ask, 1, records, records.warn, lambda text: None)  # type: ignore[arg-type]
            assert (await evaluator.evaluate(0))["num_failed"] == num_failed
        return records

    records = asyncio.run(evaluate())
    assert records.written["num_failed"] == num_failed
    assert records.written["accuracy"] == (4 - num_failed) / 4
    assert records.shown == (4, 4) and sum("error" in answer for answer in records.answers) == num_failed
    assert len(records.said) == (num_failed == 3)
    assert not records.said or "3 of 4 answers failed" in records.said[0]
