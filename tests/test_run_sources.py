"""Several environments and data in one run: how they are written, their shares, their rewards, their figures."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
from collections import Counter
from collections.abc import AsyncIterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from endpoints import Scripted, bpe_tokenizer
from runs import check_contract, read, run_local, small_run, start_local, wait_for

from forge_hpc.checkpoint.episodes import dump_groups, load_groups
from forge_hpc.config import Config, UserError, load_config, read_config, save_config, validate
from forge_hpc.config.schema import SourceConfig
from forge_hpc.config.sources import run_source, run_sources
from forge_hpc.data.builtin import char_tokenizer
from forge_hpc.data.mixture import open_sources
from forge_hpc.data.prompts import PromptStream, evaluation_prompts
from forge_hpc.data.shares import Turns
from forge_hpc.data.types import HELD_OUT, Completion, Episode, Group, Prompt, Turn
from forge_hpc.endpoint import Endpoint
from forge_hpc.environments import EnvironmentPool
from forge_hpc.hub.assets import assets_of
from forge_hpc.rewards import RewardPools
from forge_hpc.rollouts.agents import AgentPlayer
from forge_hpc.rollouts.buffer import episode_buffer
from forge_hpc.rollouts.checks import EpisodeWatch
from forge_hpc.rollouts.episodes import EpisodePlayer
from forge_hpc.rollouts.figures import measure
from forge_hpc.rollouts.sources import by_source
from forge_hpc.rollouts.stream import RolloutStream

YAML = """
sources:
  - name: sums
    share: 3
  - name: game
    data: {path: own.jsonl, eval_path: own.jsonl}
    environment: {name: guessing, max_turns: 3}
  - name: chains
    share: 2
    data: {path: openai/gsm8k, name: main}
    reward: [{name: length, args: {max_tokens: 5, ramp_tokens: 2}}, {name: math}]
data: {chat_template: false}
reward: [{name: numeric}]
rollout: {prompts_per_step: 12}
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "c.yaml").write_text(YAML)
    (tmp_path / "own.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    return load_config(tmp_path / "c.yaml")


def stream(config: Config) -> PromptStream:
    return PromptStream(open_sources(config), char_tokenizer(), config)


def offline(config: Config) -> Config:
    """Without what comes from a hub."""
    config.sources[2].data.path, config.sources[2].data.name = "builtin:calculator", None
    return config


# --- how they are written


def test_what_a_source_leaves_out_is_as_the_run_says_wherever_it_says_it(tmp_path: Path, config: Config):
    validate(config)
    sums, game, chains = config.sources
    assert (sums.data, sums.reward) == (config.data, config.reward) and sums.environment.name is None
    assert (game.environment.name, game.reward) == ("guessing", [])  # it gives its own
    assert game.data.path == str(tmp_path / "own.jsonl") and game.data.chat_template is False
    assert [reward.name for reward in chains.reward] == ["length", "math"]
    changed = load_config(
        tmp_path / "c.yaml", ["sources.1.share=2", "data.shuffle=false", "sources.0.data.shuffle=true"]
    )
    assert [source.data.shuffle for source in changed.sources] == [True, False, False]
    assert [source.share for source in changed.sources] == [3, 2, 2]
    assert load_config(None, ["sources=[{name: a}]"]).sources[0].reward == Config().reward
    save_config(config, tmp_path / "saved.yaml")
    assert read_config(tmp_path / "saved.yaml") == load_config(tmp_path / "saved.yaml") == config
    assert [asset.keys for asset in assets_of(config) if asset.kind == "dataset"] == [("sources.2.data.path",)]


def test_a_run_without_sources_is_its_own_only_source_and_one_of_several_is_found_by_its_name(config: Config):
    alone = Config()
    assert [(run.key, run.name, run.share, run.config) for run in run_sources(alone)] == [("", "", 1, alone)]
    assert run_source(alone, None) is alone
    assert run_source(config, "game").environment.name == "guessing"
    for name in (None, "gmae", ""):
        with pytest.raises(UserError) as refused:
            run_source(config, name)
        assert refused.value.hint and "sums, game, chains" in refused.value.hint
    with pytest.raises(UserError, match="no source 'a'"):
        run_source(alone, "a")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sources.0.name=''", r"sources\.0\.name is ''"),
        ("sources.0.name=a/b", r"sources\.0\.name is 'a/b'"),
        ("sources.1.name=sums", r"sources\.1\.name: 'sums' is given twice"),
        ("sources.1.share=0", r"sources\.1\.share must be greater than 0"),
        ("sources.0.reward=[]", r"no sources\.0\.reward is given"),
        ("sources.0.data.curriculum.enable=true", r"sources\.0\.data\.curriculum is its own"),
        ("sources.1.environment.name=gessing", r"sources\.1\.environment\.name is 'gessing'"),
        ("sources.1.data.path=nowhere.jsonl", r"sources\.1\.data\.path: no such file: nowhere.jsonl"),
        ("sources.2.reward.1.name=mth", r"sources\.2\.reward\.1\.name is 'mth'"),
        ("sources.2.reward.0.args={max_tokens: x}", r"sources\.2\.reward\.0\.args: max_tokens is 'x'"),
        ("recipe=sft", "recipe=sft learns from examples"),
        ("sources.3.share=1", "sources has 3 items, none with index 3"),
        ("sources.0.sahre=1", r"unknown key sources\.0\.sahre"),
    ],
)
def test_what_is_wrong_with_a_source_is_named_before_anything_is_queued(tmp_path: Path, override: str, message: str):
    (tmp_path / "c.yaml").write_text(YAML)
    (tmp_path / "own.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    with pytest.raises(UserError, match=message):
        validate(load_config(tmp_path / "c.yaml", [override]))


def test_held_out_prompts_of_a_source_that_is_trained_on_whole_are_asked_for(config: Config):
    config.sources[1].data.eval_path = None
    config.evaluation.num_prompts = 1
    with pytest.raises(UserError, match=r"own\.jsonl holds one split") as refused:
        validate(config)
    assert refused.value.hint and refused.value.hint.startswith("set sources.1.data.eval_path")


# --- shares and order


@pytest.mark.parametrize("shares", [(1, 1), (3, 1), (0.7, 0.3), (5, 3, 2), (50, 1, 1, 1), (1, 2, 3, 4, 5, 6, 7)])
def test_no_source_is_ever_a_whole_turn_ahead_or_behind(shares: tuple[float, ...]):
    exact = [Fraction(str(share)) / sum(Fraction(str(share)) for share in shares) for share in shares]
    turns, bound = Turns(exact), 1 - Fraction(1, 2 * len(shares) - 2)
    for num in range(1, 500):
        next(turns)
        assert all(abs(share * num - count) <= bound for share, count in zip(exact, turns.counts, strict=True))


def test_every_step_has_exactly_the_shares(config: Config):
    prompts = stream(offline(config))
    for _ in range(20):
        assert Counter(prompt.source for prompt in prompts.take(12)) == {"sums": 6, "game": 2, "chains": 4}
    assert prompts.position == 240


def test_a_source_of_a_run_may_be_a_mixture_of_its_own(config: Config):
    own = config.sources[1].data.path
    config.sources[0].data.sources = [SourceConfig("builtin:addition", 3), SourceConfig(own)]
    found = [prompt.question for prompt in stream(offline(config)).take(1200) if prompt.source == "sums"]
    assert len(found) == 600
    assert found.count("1+1=") / 600 == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize("stop", [0, 1, 5, 12, 31])
def test_the_order_goes_on_exactly_after_a_resume(config: Config, stop: int):
    one = stream(offline(config))
    one.take(stop)
    state = json.loads(json.dumps(one.state_dict()))
    other = stream(config).load_state_dict(state)
    assert one.take(40) == other.take(40)
    config.sources.pop()
    with pytest.raises(UserError, match="the saved position in the data has sources 3, this run 2"):
        stream(config).load_state_dict(state)


def test_held_out_prompts_of_each_source_have_positions_of_their_own(config: Config):
    examples = [{"question": "1", "answer": "1"}] * 3
    places = [
        [p.position for p in evaluation_prompts(examples, char_tokenizer(), config, 3, number)] for number in range(2)
    ]
    assert places[0] == [HELD_OUT, HELD_OUT + 1, HELD_OUT + 2] and not {*places[0]} & {*places[1]}
    assert all(HELD_OUT <= prompt.seed < 1 << 31 for prompt in (Prompt(p, "", [], "") for p in places[1]))


# --- rewards, samples, figures


def completion(text: str = "2") -> Completion:
    return Completion(0, text, [1] * len(text), [-1.0] * len(text), "stop", (0, 0))


def test_each_completion_is_judged_by_the_rewards_of_its_source():
    length = "[{name: length, args: {max_tokens: 5, ramp_tokens: 2}}]"
    config = load_config(None, [f"sources=[{{name: a}}, {{name: b, reward: {length}}}, {{name: c, reward: []}}]"])

    async def judge() -> list[Any]:
        async with RewardPools(config) as pools:
            prompts = [Prompt(0, "1+1=", [], "2", source=name) for name in "abc"]
            return [await pools.judge(prompt, completion()) for prompt in prompts]

    first, second, third = asyncio.run(judge())
    assert (first.terms, first.right) == ({"exact": 1.0}, True)
    assert list(second.terms) == ["length"]
    assert (third.total, third.right) == (0.0, False)


def test_samples_come_from_where_their_source_is_played_with_the_places_that_were_asked_for():
    def player(name: str) -> Any:
        async def play(prompts: list[Prompt], num: int, *, key: int | None) -> AsyncIterator[Any]:
            for index in reversed(range(len(prompts))):
                for number in range(num):
                    await asyncio.sleep(0)
                    yield (index, number), (name, prompts[index].position, number, key)

        return play

    async def ask() -> dict[Any, Any]:
        prompts = [Prompt(position, "", [], "", source="ab"[position % 3 == 2]) for position in range(7)]
        sample = by_source({"a": player("a"), "b": player("b"), "idle": player("idle")})
        return {place: answer async for place, answer in sample(prompts, 2, key=4)}

    found = asyncio.run(ask())
    assert found == {(i, n): ("ab"[i % 3 == 2], i, n, 4) for i in range(7) for n in range(2)}
    only = player("a")
    assert by_source({"": only}) is only


def test_an_error_where_one_source_is_played_ends_the_others():
    async def broken(prompts: list[Prompt], **_: Any) -> AsyncIterator[Any]:
        raise OSError("gone")
        yield

    async def endless(prompts: list[Prompt], **_: Any) -> AsyncIterator[Any]:
        await asyncio.get_running_loop().create_future()
        yield

    async def ask() -> None:
        async with asyncio.timeout(30):
            async for _ in by_source({"a": broken, "b": endless})(
                [Prompt(0, "", [], "", source="a"), Prompt(1, "", [], "", source="b")]
            ):
                pass

    with pytest.raises(ExceptionGroup) as failed:
        asyncio.run(ask())
    assert failed.group_contains(OSError, match="gone")


def groups() -> list[Group]:
    def group(source: str, position: int, rewards: list[float], failed: int = 0) -> Group:
        prompt = Prompt(position, "1", [1], "1", source=source)
        episodes = [Episode(prompt, completion("x" * (1 + position)), reward, {"exact": reward}) for reward in rewards]
        return Group(prompt, episodes, failed, [("timeout", "too slow")] * failed)

    return [group("a", 0, [0, 1]), group("b", 1, [1, 1]), group("c", 2, [], 2)]


def test_figures_are_those_of_all_and_of_each_source_and_one_that_lost_all_says_so():
    figures = measure(groups(), 1)
    assert (figures["reward/mean"], figures["groups/drawn"]) == (0.75, 3)
    assert (figures["source/a/reward/mean"], figures["source/b/reward/mean"]) == (0.5, 1.0)
    assert (figures["source/a/response/length_mean"], figures["source/b/response/length_mean"]) == (1, 2)
    assert (figures["source/a/groups/zero_signal"], figures["source/b/groups/zero_signal"]) == (0, 1)
    of_c = {key: value for key, value in figures.items() if key.startswith("source/c/")}
    assert of_c == {"source/c/groups/drawn": 1, "source/c/episodes/failed": 2}
    said: list[str] = []
    EpisodeWatch(said.append).check(1, groups())
    assert said == ["step 1: 2 of 2 episodes of c were left out, the last one because of: too slow"]


# --- three kinds of sources, generated ahead

THREE = """
sources:
  - {name: sums, share: 2, reward: [{name: length, args: {max_tokens: 5, ramp_tokens: 2}}]}
  - {name: game, environment: {name: guessing, args: {low: 1, high: 3}, max_turns: 3}}
  - {name: agent, environment: {name: agent.py:episode, timeout_s: 60}}
data: {path: builtin:calculator}
rollout: {prompts_per_step: 8, group_size: 2, max_staleness: 1, max_prompt_tokens: 200, max_response_tokens: 200}
trainer: {training: {steps: 6}}
evaluation: {num_prompts: 0}
"""
AGENT = """
import asyncio, openai

async def episode(base_url, api_key, example):
    await asyncio.sleep(0.05 * (example["seed"] % 4))
    messages = [{"role": "user", "content": example["question"]}]
    async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        answer = await client.chat.completions.create(model="policy", messages=messages)
    return float(answer.choices[0].message.content)
"""


class ThreeKinds:
    """Generators alone, an environment in a process and an agent at an endpoint; what samples is a script."""

    def __init__(self, config: Config) -> None:
        self.config, self.tokenizer = config, bpe_tokenizer()
        self.sampler = Scripted(self.say)
        self.num_said = 0

    def say(self, turn: Turn) -> tuple[str, list[int], str]:
        self.num_said += 1
        text = str(1 + self.num_said % 3)
        return text, [*self.tokenizer.encode(text), self.tokenizer.eos_token_id], "stop"

    async def sample(self, prompts: list[Prompt], *, key: int | None) -> AsyncIterator[Any]:
        for index, prompt in enumerate(prompts):
            for number in range(self.config.rollout.group_size):
                await asyncio.sleep(0)
                [completion] = await self.turns([Turn(prompt.position, number, 0, prompt.token_ids, 9)])
                yield (index, number), dataclasses.replace(completion, sample_index=number)

    async def turns(self, turns: list[Turn], *_: Any, key: int | None = None) -> list[Any]:
        return await self.sampler.respond(turns, self.config.rollout.sampling, 0, "", "")

    async def __aenter__(self) -> ThreeKinds:
        game, agent = (run_source(self.config, name) for name in ("game", "agent"))
        self.endpoint = await Endpoint(agent, self.tokenizer, self.sampler).start()
        self.pools = [await EnvironmentPool(own, num_workers=1).start() for own in (game, agent)]
        players = {
            "sums": self.sample,
            "game": EpisodePlayer(game, self.tokenizer, self.turns, self.pools[0]).stream,
            "agent": AgentPlayer(agent, self.tokenizer, self.endpoint, self.pools[1]).stream,
        }
        self.stream = by_source(players)
        return self

    async def __aexit__(self, *_: object) -> None:
        for pool in self.pools:
            await pool.close()
        await self.endpoint.close()


async def train(kinds: ThreeKinds, config: Config, stops: set[int]) -> list[tuple[list[Group], dict[str, float]]]:
    """All steps, each with its groups and figures; after some of them the run stops and goes on from what it saved."""
    taken: list[tuple[list[Group], dict[str, float]]] = []
    saved: tuple[str, bytes] | None = None
    last_step = config.trainer.training.steps
    async with RewardPools(config) as rewards:
        while len(taken) < last_step:
            prompts, state = PromptStream(open_sources(config), kinds.tokenizer, config), {}
            if saved is not None:
                state = json.loads(saved[0])
                prompts.load_state_dict(state["prompts"])
            buffer = episode_buffer(config, len(taken), prompts.position, prompts.ahead)
            buffer.restore(load_groups(saved[1]) if saved is not None else [], state)
            stream = RolloutStream(config, prompts, kinds.stream, 1, rewards, buffer, print)
            running = asyncio.create_task(stream.run())
            while len(taken) < last_step:
                groups = await stream.take()
                step = len(taken) + 1
                taken.append((groups, measure(groups, step) | stream.metrics()))
                kinds.sampler.version = step
                await buffer.weights_loaded(step)
                if step in stops:
                    await asyncio.sleep(0.1)  # amid the episodes of the steps to come
                    saved = json.dumps(stream.state_dict()), dump_groups(buffer.finished())
                    break
            running.cancel()
            await asyncio.wait({running})
    return taken


def test_sources_of_three_kinds_generated_ahead_keep_their_shares_and_lose_nothing_at_a_stop(tmp_path: Path):
    (tmp_path / "c.yaml").write_text(THREE)
    (tmp_path / "agent.py").write_text(AGENT)
    config = load_config(tmp_path / "c.yaml")
    late = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, window=2))

    async def both() -> list[Any]:
        async with ThreeKinds(config) as kinds:
            found = []
            for own in (config, late):
                kinds.sampler.version = 0
                found.append(await train(kinds, own, {1, 4}))
            return found

    strict, windowed = asyncio.run(both())
    shares, steps = {"sums": 4, "game": 2, "agent": 2}, config.trainer.training.steps
    for taken in (strict, windowed):
        groups = [group for own, _ in taken for group in own]
        assert sorted(group.prompt.position for group in groups) == list(range(8 * steps))
        assert Counter(group.prompt.source for group in groups) == {name: steps * num for name, num in shares.items()}
        assert all(len(group.episodes) == 2 for group in groups)
        for own, figures in taken:
            assert figures["episodes/failed"] == figures["episodes/stale"] == 0 and figures["staleness/max"] <= 1
            assert {group.prompt.source for group in own} <= {*shares}
            assert len(own) == 8
    for own, figures in strict:
        assert Counter(group.prompt.source for group in own) == shares
        assert figures["groups/overtaken"] == 0
    assert any(figures["groups/overtaken"] for _, figures in windowed), "agents are late"
    source_of = {group.prompt.position: group.prompt.source for own, _ in strict for group in own}
    assert all(source_of[group.prompt.position] == group.prompt.source for own, _ in windowed for group in own)


# --- a run


def several(directory: Path, steps: int, *overrides: str) -> list[str]:
    asked = small_run(directory, steps)
    length = next(item for item in asked if item.startswith("reward=")).removeprefix("reward=")
    game = "environment: {name: guessing, args: {low: 1, high: 9}, max_turns: 3, max_turn_tokens: 4}"
    return [
        *asked,
        f"sources=[{{name: sums, share: 3, reward: {length}}}, {{name: game, {game}}}]",
        "rollout.max_prompt_tokens=40",
        "rollout.max_response_tokens=48",
        "trainer.lr_scheduler.decay_ratio=0",
        "evaluation.num_prompts=6",
        "logging.num_rollouts_per_step=16",
        *overrides,
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_of_two_sources_holds_the_shares_and_a_resumed_one_repeats_it_to_the_last_bit(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for run_dir, steps in ((whole, 4), (resumed, 2), (resumed, 4)):
        result = run_local(run_dir, several(tmp_path, steps))
        assert result.returncode == 0, result.stdout + result.stderr
    check_contract(whole, 4)
    rollouts = read(whole, "rollouts.jsonl")
    for step in range(1, 5):
        own = [record for record in rollouts if record["step"] == step]
        assert Counter(record["source"] for record in own) == {"sums": 12, "game": 4}
        assert all(("transcript" in record) == (record["source"] == "game") for record in own)
    positions = [record["position"] for record in read(resumed, "rollouts.jsonl")]
    assert sorted(positions) == list(range(64))
    metrics = read(whole)
    for record in metrics:
        assert record["source/game/reward/mean"] == record["source/game/reward/environment"]
        assert record["source/sums/reward/mean"] == record["source/sums/reward/length"]
        parts = 0.75 * record["source/sums/reward/mean"] + 0.25 * record["source/game/reward/mean"]
        assert record["reward/mean"] == pytest.approx(parts)
        assert "source/sums/episode/turns_mean" not in record and record["source/game/episode/turns_mean"] > 1
        assert 0 < record["mismatch/logprob_abs_mean"] < 1e-5
    evaluations = read(whole, "evaluations.jsonl")
    assert [record["step"] for record in evaluations] == [0, 4]
    for record in evaluations:
        assert record["num_prompts"] == 12 == record["source/sums/num_prompts"] + record["source/game/num_prompts"]
        both = (record["source/sums/accuracy"] + record["source/game/accuracy"]) / 2
        assert record["accuracy"] == pytest.approx(both)
    for key in ("reward/mean", "loss", "grad_norm", "tokens/generated", "source/game/reward/mean"):
        assert [record[key] for record in metrics] == [record[key] for record in read(resumed)]
    assert len({(run / "export/model.safetensors").read_bytes() for run in (whole, resumed)}) == 1


@pytest.mark.training  # two starts of a run that is late on purpose
@pytest.mark.timeout(1800)
def test_a_run_with_an_agent_among_its_sources_generates_ahead_and_a_preemption_loses_nothing(tmp_path: Path) -> None:
    """Where late groups may be overtaken, too."""
    (tmp_path / "agent.py").write_text(AGENT.replace("float(answer.choices", "len(answer.choices"))
    steps, run_dir, options = 8, tmp_path / "run", small_run(tmp_path, 8)
    length = next(item for item in options if item.startswith("reward=")).removeprefix("reward=")
    game = "environment: {name: guessing, args: {low: 1, high: 9}, max_turns: 3, max_turn_tokens: 4}"
    agent = f"environment: {{name: '{tmp_path / 'agent.py'}:episode', max_turn_tokens: 8, timeout_s: 300}}"
    options += [
        f"sources=[{{name: sums, share: 2, reward: {length}}}, {{name: game, {game}}}, {{name: agent, {agent}}}]",
        "model.path=builtin:qwen3-tiny-chat",
        "data={path: builtin:calculator, chat_template: true}",
        "rollout.max_prompt_tokens=64",
        "rollout.max_response_tokens=64",
        "rollout.group_size=2",
        "rollout.max_staleness=1",
        "rollout.window=2",
        "checkpoint.interval=1",
        "evaluation.num_prompts=4",
        "logging.num_groups_per_step=16",
    ]
    run = start_local(run_dir, options)
    try:
        wait_for(lambda: len(read(run_dir)) >= 2 or run.poll() is not None, "two steps", 900)
        run.send_signal(signal.SIGTERM)
        out, err = run.communicate(timeout=240)
    finally:
        run.kill()
    assert run.returncode == 75 and len(read(run_dir)) < steps, out + err
    result = run_local(run_dir, options, timeout_s=900)
    assert result.returncode == 0, result.stdout + result.stderr
    check_contract(run_dir, steps)
    rollouts = read(run_dir, "rollouts.jsonl")
    assert sorted((record["position"], record["sample"]) for record in rollouts) == [
        (position, sample) for position in range(16 * steps) for sample in range(2)
    ], "every episode once"
    assert Counter(record["source"] for record in rollouts) == {"sums": 128, "game": 64, "agent": 64}
    for record in read(run_dir):
        assert record["episodes/failed"] == record["endpoint/refused"] == record["episodes/stale"] == 0
        assert record["staleness/max"] <= 1
        assert record["mismatch/logprob_abs_mean"] < 1e-5 or record["staleness/max"] == 1
    assert [record["source/agent/num_prompts"] for record in read(run_dir, "evaluations.jsonl")] == [4, 4]
