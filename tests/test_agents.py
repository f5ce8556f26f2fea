"""Agents: functions in worker processes that play episodes against the endpoint, and what their episodes become."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from endpoints import Scripted, bpe_tokenizer, endpoint_config, prompt_of
from runs import PROJECT, check_contract, read, run_local, start_local, status, wait_for

from forge_hpc.checkpoint.episodes import dump_groups, load_groups
from forge_hpc.config import Config, UserError, load_config
from forge_hpc.config.schema import RewardConfig
from forge_hpc.config.validate import validate
from forge_hpc.data.tool_calls import HERMES, LLAMA3, BadToolCall, ToolCall, tool_format
from forge_hpc.data.types import Episode, Group, Turn
from forge_hpc.endpoint import Endpoint
from forge_hpc.environments import EnvironmentFailed, EnvironmentPool
from forge_hpc.environments.verifiers import address_of_episode
from forge_hpc.rollouts.agents import AgentPlayer
from forge_hpc.rollouts.documents import set_advantages, to_documents
from forge_hpc.rollouts.figures import measure

AGENT_DEMO = PROJECT / "configs/agent/demo.yaml"
BPE = bpe_tokenizer()
AGENT = """
import asyncio, openai

async def episode(base_url, api_key, example, way="talk"):
    messages = [{"role": "user", "content": example["question"]}]
    async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:
        async def ask(messages):
            answer = await client.chat.completions.create(model="policy", messages=messages)
            return answer.choices[0].message.model_dump(exclude_none=True)
        first = await ask(messages)
        if way == "raise":
            raise KeyError("no such thing")
        if way == "hang":
            await asyncio.sleep(3600)
        if way == "cancelled":
            raise asyncio.CancelledError("by a library")
        if way == "interrupted":
            raise KeyboardInterrupt
        if way == "text":
            return "4"
        if way == "nothing":
            return None
        if way == "wrong":
            return {"score": 1.0}
        while way == "forever":
            messages = [*messages, first, {"role": "user", "content": "go on"}]
            first = await ask(messages)
        await asyncio.gather(ask([*messages, first, *messages]), ask([{"role": "user", "content": "another"}]))
        return {"reward": 0.5, "info": {"seed": example["seed"], "answer": example["answer"]}}

def short(base_url, api_key, example):
    with openai.OpenAI(base_url=base_url, api_key=api_key) as client:
        return float(len(client.completions.create(model="policy", prompt="a").choices[0].text))

async def silent(base_url, api_key, example):
    return 1.0
"""
OTHER = """
async def where(base_url, api_key, example):
    import os, sys, forge_hpc
    async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        await client.completions.create(model="policy", prompt="a")
    folder = os.path.dirname(forge_hpc.__file__)
    on_path = os.path.dirname(folder) in sys.path
    return {"reward": 1, "info": {"harness": os.environ["HARNESS"], "forge_hpc": folder, "on_path": on_path}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "agent.py").write_text(AGENT)
    config = endpoint_config(timeout_s=20.0, max_turns=4)
    config.environment.name = f"{tmp_path / 'agent.py'}:episode"
    config.rollout.group_size = 2
    return config


def reply(turn: Turn) -> tuple[str, list[int], str]:
    return "fine", [*BPE.encode("fine"), BPE.eos_token_id], "stop"


def play(config: Config, *ways: str, say: Any = reply) -> list[Episode | EnvironmentFailed]:
    """An episode of each way."""

    async def run() -> list[Episode | EnvironmentFailed]:
        endpoint = await Endpoint(config, BPE, Scripted(say, version=2)).start()
        found = []
        try:
            for way in ways or (None,):
                config.environment.args = {} if way is None else {"way": way}
                pool = await EnvironmentPool(config, num_workers=1).start()
                try:
                    player = AgentPlayer(config, BPE, endpoint, pool)
                    [(_, episode)] = [item async for item in player.stream([prompt_of()], 1)]
                    found.append(episode)
                finally:
                    await pool.close()
        finally:
            await endpoint.close()
        return found

    return asyncio.run(run())


def test_an_agents_conversations_become_an_episode_with_branches(config: Config) -> None:
    [episode] = play(config)
    assert isinstance(episode, Episode)
    assert (episode.reward, episode.rewards) == (0.5, {"environment": 0.5})
    assert episode.completion.metadata["info"] == {"seed": prompt_of().seed, "answer": "4"}
    assert (episode.completion.metadata["turns"], episode.completion.metadata["branches"]) == (3, 2)
    assert [message["role"] for message in episode.completion.metadata["transcript"]] == [
        "assistant",
        "user",
        "assistant",
    ]
    assert episode.prompt.text.startswith("<|im_start|>user\n2+2=") and episode.policy_version == 2
    num = len(BPE.encode("fine")) + 1
    assert (episode.num_sampled, episode.completion.num_sampled) == (3 * num, 2 * num)
    group = Group(episode.prompt, [episode])
    set_advantages([group], lambda rewards: [[2.0]])
    documents = to_documents([group])
    assert [int(document.loss_mask.sum()) for document in documents] == [2 * num, num]
    assert {document.advantage for document in documents} == {2.0}
    main, edited = (list(map(int, document.token_ids)) for document in documents)
    assert edited[:3] == main[:3] == BPE.encode("<|im_start|>user\n"), "each from its first token"
    figures = measure([group], 3)
    assert (figures["episode/branches_mean"], figures["tokens/generated"]) == (2, 3 * num)
    assert load_groups(dump_groups([group])) == [group]


def test_what_an_agent_raises_or_does_wrong_costs_its_episode_alone(config: Config) -> None:
    raised, wrong, gave_nothing = play(config, "raise", "wrong", "nothing")
    for ended in play(config, "cancelled", "interrupted"):
        assert isinstance(ended, EnvironmentFailed) and ended.kind == "raised", ended
    assert isinstance(raised, EnvironmentFailed) and "no such thing" in str(raised)
    assert isinstance(wrong, EnvironmentFailed) and "not 'score'" in str(wrong)
    assert isinstance(gave_nothing, EnvironmentFailed) and gave_nothing.kind == "reward"
    config.environment.timeout_s = 2.0
    [hung] = play(config, "hang")
    assert isinstance(hung, EnvironmentFailed) and hung.kind == "timeout"
    config.environment.name = config.environment.name.replace(":episode", ":silent")
    [silent] = play(config)
    assert isinstance(silent, EnvironmentFailed) and "no response" in str(silent)


def test_an_agent_that_a_limit_ends_has_no_reward_and_is_trained(config: Config) -> None:
    [episode] = play(config, "forever")
    assert isinstance(episode, Episode)
    assert (episode.reward, episode.completion.finish_reason) == (0.0, "turns")
    assert episode.completion.metadata["turns"] == 4


def test_an_agent_may_leave_the_verdict_to_the_rewards_or_be_no_coroutine(config: Config) -> None:
    config.reward = [RewardConfig(name="exact")]
    [episode] = play(config, "text")
    assert isinstance(episode, Episode) and episode.completion.text == "4" and not episode.rewards
    config.environment.name = config.environment.name.replace(":episode", ":short")
    [episode] = play(config)
    assert isinstance(episode, Episode) and episode.reward == 4


def test_a_failure_of_the_generators_ends_the_run_and_not_the_episode(config: Config) -> None:
    with pytest.raises(ExceptionGroup) as failure:
        play(config, say=lambda _: RuntimeError("the engine failed"))
    assert "the engine failed" in str(failure.value.exceptions)


def test_an_agent_that_cannot_be_called_is_found_before_the_run_begins(config: Config) -> None:
    async def start() -> None:
        pool = EnvironmentPool(config, num_workers=1)
        await pool.start()

    config.environment.args = {"wey": "talk"}
    with pytest.raises(UserError, match="unexpected keyword argument 'wey'"):
        asyncio.run(start())


def make_venv(directory: Path, says: str) -> str:
    """A folder whose bin/python is this script."""
    python = directory / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(says)
    python.chmod(0o755)
    return str(directory / "venv")


def test_an_agent_may_have_an_interpreter_of_its_own_which_sees_nothing_else_of_the_run(
    config: Config, tmp_path: Path
) -> None:
    config.environment.venv = make_venv(tmp_path, f'#!/bin/sh\nHARNESS=mine exec {sys.executable} "$@"\n')
    (tmp_path / "agent.py").write_text(AGENT + OTHER)
    config.environment.name = config.environment.name.replace(":episode", ":where")
    [episode] = play(config)
    assert isinstance(episode, Episode)
    info = episode.completion.metadata["info"]
    assert info == {"harness": "mine", "forge_hpc": str(PROJECT / "forge_hpc"), "on_path": False}


@pytest.mark.parametrize(
    ("says", "words"), [("#!/bin/sh\nexit 3\n", "ended with exit status 3"), ("no program", "cannot be started")]
)
def test_an_interpreter_that_does_not_do_is_found_before_the_run_begins(
    config: Config, tmp_path: Path, says: str, words: str
) -> None:
    config.environment.venv = make_venv(tmp_path, says)
    with pytest.raises(UserError, match=words):
        play(config)
    config.environment.venv = str(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no .*/nothing/bin/python that can be run"):
        validate(config)


def test_a_key_in_the_path_leaves_the_host_as_it_is() -> None:
    assert address_of_episode("https://v100-3:4711/v1", "k.1") == "https://v100-3:4711/episode/k.1/v1"


def test_the_prompts_of_a_taskset_need_the_python_that_has_verifiers() -> None:
    command = [sys.executable, "-m", "forge_hpc.environments.verifiers", "my-taskset"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=PROJECT)
    assert (result.returncode, result.stdout) == (2, "")
    error, hint = result.stderr.splitlines()
    assert error.startswith("error: verifiers 0.4 cannot be imported") and "virtual environment" in hint


def test_tool_calls_are_read_in_the_format_of_the_family() -> None:
    text = 'I add.\n<tool_call>\n{"name": "add", "arguments": {"a": "é"}}\n</tool_call>'
    assert HERMES.read(text) == ("I add.", [ToolCall("add", '{"a": "é"}')])
    assert HERMES.read("no call") == ("no call", [])
    two = '{"name": "add", "parameters": {"a": 1}}; {"name": "sub"}'
    assert LLAMA3.read(two) == ("", [ToolCall("add", '{"a": 1}'), ToolCall("sub", "{}")])
    assert LLAMA3.read("It is {5}.") == ("It is {5}.", [])
    for bad in (
        "<tool_call>{",
        '<tool_call>{"name": 1}',
        '<tool_call>{"name": "a", "arguments": "b"}',
        "<tool_call>[]",
    ):
        with pytest.raises(BadToolCall):
            HERMES.read(bad)
    with pytest.raises(BadToolCall):
        LLAMA3.read('{"name": "add"')
    assert tool_format(BPE.chat_template) is HERMES
    assert tool_format("{% for m in messages %}") is None


def test_the_demo_of_agents_is_valid() -> None:
    validate(load_config(AGENT_DEMO))


# --- whole runs

BRANCHING = """
import openai, uuid

async def episode(base_url, api_key, example, log):
    name = uuid.uuid4().hex
    def note(event):
        with open(log, "a") as file:
            file.write(f"{event} {name}\\n")
    note("begun")
    messages = [{"role": "user", "content": example["question"]}]
    async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        said = []
        for _ in range(2):
            answer = await client.chat.completions.create(model="policy", messages=messages, max_tokens=8)
            said.append(answer.choices[0].message.content)
            messages += [{"role": "assistant", "content": said[-1]}, {"role": "user", "content": "1+1="}]
        messages[1]["content"] = "edited"
        await client.chat.completions.create(model="policy", messages=messages, max_tokens=8)
    note("ended")
    return {"reward": sum(len(text) for text in said) / 16, "info": {"name": name}}
"""


PROMPTS, GROUP = 4, 4


def branching_run(directory: Path, steps: int) -> list[str]:
    """Overrides of the demo that make it short, and an agent that notes when its episodes begin and end."""
    (directory / "agent.py").write_text(BRANCHING)
    return [
        "model.path=builtin:qwen3-tiny-chat",
        f"environment.name={directory / 'agent.py'}:episode",
        f"environment.args={{log: '{directory / 'episodes'}'}}",
        f"trainer.training.steps={steps}",
        "trainer.lr_scheduler.warmup_steps=0",
        f"rollout.prompts_per_step={PROMPTS}",
        f"rollout.group_size={GROUP}",
        "rollout.max_staleness=1",
        "checkpoint.interval=1",
        "evaluation.num_prompts=4",
        f"logging.num_groups_per_step={PROMPTS}",
        "generator.engine.kv_cache_memory_gib=0.25",
    ]


def num_under_way(directory: Path) -> int:
    """Episodes that have begun and not ended; those of a start that was cut off included."""
    events = (directory / "episodes").read_text().split()
    return events.count("begun") - events.count("ended")


def check_branching_run(run_dir: Path, steps: int) -> None:
    """Every step once, with its own prompts and all episodes of them, none twice, every token as it was sampled."""
    check_contract(run_dir, steps)
    trained = read(run_dir, "rollouts.jsonl")
    assert sorted((record["step"], record["position"], record["sample"]) for record in trained) == [
        (1 + position // PROMPTS, position, sample) for position in range(steps * PROMPTS) for sample in range(GROUP)
    ]
    names = Counter(record["info"]["name"] for record in trained)
    events = (run_dir.parent / "episodes").read_text().splitlines()
    assert max(names.values()) == 1 and {f"ended {name}" for name in names} <= {*events}
    for record in read(run_dir):
        # With another context, or another token, the trainer's log-probabilities would be others.
        assert record["mismatch/logprob_abs_mean"] < 1e-5 or record["staleness/max"] == 1
        assert record["episode/branches_mean"] == 2 and record["episode/turns_mean"] == 3
        assert record["staleness/max"] <= 1
        assert record["endpoint/refused"] == record["endpoint/strangers"] == record["episodes/failed"] == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_preemption_amid_an_agents_episodes_loses_no_step_and_doubles_none(tmp_path: Path) -> None:
    steps, run_dir = 8, tmp_path / "run"
    options = branching_run(tmp_path, steps)
    run = start_local(run_dir, options, AGENT_DEMO)
    try:
        wait_for(lambda: len(read(run_dir)) >= 1 or run.poll() is not None, "the first step", 600)
        wait_for(lambda: num_under_way(tmp_path) > 0 or run.poll() is not None, "an episode of a later step")
        run.send_signal(signal.SIGTERM)
        out, err = run.communicate(timeout=240)
    finally:
        run.kill()
    assert run.returncode == 75, out + err
    assert status(run_dir)["state"] == "preempted" and 1 <= len(read(run_dir)) < steps
    result = run_local(run_dir, options, config=AGENT_DEMO)
    assert result.returncode == 0, result.stdout + result.stderr
    check_branching_run(run_dir, steps)


@pytest.mark.training
@pytest.mark.timeout(1800)
def test_an_agent_that_knows_nothing_of_the_run_learns_to_use_its_calculator(tmp_path: Path) -> None:
    """Some minutes."""
    result = run_local(tmp_path / "run", [], timeout_s=1700, config=AGENT_DEMO)
    assert result.returncode == 0, result.stdout + result.stderr
    before, *_, after = read(tmp_path / "run", "evaluations.jsonl")
    assert before["accuracy"] < 0.2
    assert after["accuracy"] > 0.9
