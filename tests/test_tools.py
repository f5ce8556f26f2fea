"""Environments of tools: schemas through the chat template, calls out of responses, results back; the example."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from runs import PROJECT
from test_data_tools import HERMES as HERMES_TEMPLATE
from test_data_tools import LLAMA as LLAMA_TEMPLATE
from test_data_tools import NO_TOOLS, tokenizer

from forge_hpc.config import Config, UserError, load_config, validate
from forge_hpc.config.schema import DataConfig, EnvironmentConfig
from forge_hpc.data.source import load_eval_examples, load_examples
from forge_hpc.data.tool_calls import HERMES, LLAMA3
from forge_hpc.data.types import Completion, Episode, Prompt, Turn
from forge_hpc.environments import EnvironmentPool, Response, Step
from forge_hpc.environments.rendering import ConversationRenderer
from forge_hpc.environments.tools import schema
from forge_hpc.rollouts.episodes import EpisodePlayer

CALL = '<tool_call>{"name": "search", "arguments": {"query": "How deep is Lake Orrin?"}}</tool_call>'
SEARCH = PROJECT / "configs/search"
KNOWN_BY = "{# <|start_header_id|> #}"  # what tells Llama's templates from others


def search() -> Config:
    return load_config(SEARCH / "qwen3_1_7b.yaml")


def with_pool(config: Config, scenario: Callable[[EnvironmentPool], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        pool = await EnvironmentPool(config, num_workers=1).start()
        try:
            return await scenario(pool)
        finally:
            await pool.close()

    return asyncio.run(asyncio.wait_for(run(), 240))


def test_a_schema_says_what_a_function_does_and_takes():
    def look(self: Any, place: str, depth: int = 1, tags: list[str] | None = None, *, wide: bool) -> str:
        """Look at a
        place.

        Not told.
        """
        return ""

    told = schema(look.__get__(object()))
    assert told == {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Look at a place.",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string"},
                    "depth": {"type": "integer"},
                    "tags": {},
                    "wide": {"type": "boolean"},
                },
                "required": ["place", "wide"],
            },
        },
    }


def test_the_search_example_finds_what_its_questions_ask_for_and_tells_what_is_wrong_with_a_call():
    config = search()
    validate(config)
    questions = [*load_examples(config.data, "train", 0), *load_eval_examples(config.data, 0)]
    assert len(questions) == 16

    async def scenario(pool: EnvironmentPool) -> list[Any]:
        found: list[Any] = []
        async with pool.open() as environment:
            found.append(await environment.reset(Prompt(0, "", [], "83", {}, "How deep is Lake Orrin, in metres?")))
            for text, family in (
                (CALL, HERMES),
                (CALL * 2, HERMES),
                ('{"name": "search", "parameters": {"query": "bell"}}', LLAMA3),
                ("<tool_call>{", HERMES),
                ('<tool_call>{"name": "find", "arguments": {}}</tool_call>', HERMES),
                ('<tool_call>{"name": "search", "arguments": {"q": 1}}</tool_call>', HERMES),
                ('<tool_call>{"name": "search", "arguments": {"query": 1}}</tool_call>', HERMES),
                ("It is 83 metres deep.", HERMES),
            ):
                found.append(await environment.step(Response(text, tools=family)))
        for question in questions:
            prompt = Prompt(0, "", [], question["answer"], {}, question["question"])  # type: ignore[index]
            async with pool.open() as environment:
                await environment.reset(prompt)
                asked = CALL.replace("How deep is Lake Orrin?", prompt.question)
                found.append((prompt.target, (await environment.step(Response(asked, tools=HERMES))).observation))
        return found

    opening, one, two, llama, broken, unknown, other, wrong, final, *searches = with_pool(config, scenario)
    assert opening["messages"] == "How deep is Lake Orrin, in metres?"
    assert [tool["function"]["name"] for tool in opening["tools"]] == ["search"]
    assert one.observation.startswith("Lake Orrin: ") and "83 metres" in one.observation
    assert (one.role, one.reward, one.done, one.info) == ("tool", None, False, {"num_calls": 1})
    assert two.observation == one.observation + "\n" + one.observation
    assert llama.observation.splitlines()[0].startswith("Tamsk: ")
    assert broken.observation.startswith("error: this is not a call of a tool: not JSON")
    assert unknown.observation == "error: there is no tool 'find', there is search"
    assert other.observation.startswith("error: search: ") and wrong.observation.startswith("error: ")
    assert (final.reward, final.done) == (1.0, True)
    assert all(target.lower() in observation.lower() for target, observation in searches)


class Scripted:
    """Says what is in the script, and keeps what it was asked."""

    def __init__(self, tokenizer: Any, *script: str) -> None:
        self.tokenizer, self.script, self.asked = tokenizer, script, list[str]()

    async def __call__(self, turns: list[Turn], *_: Any, key: int | None) -> list[Completion]:
        [turn] = turns
        self.asked.append(self.tokenizer.decode(turn.token_ids))
        text = self.script[turn.turn]
        ids = self.tokenizer.encode(text + "<|end|>", add_special_tokens=False)
        return [Completion(0, text, ids, [-1.0] * len(ids), "stop", (0, 0))]


@pytest.mark.parametrize(
    ("template", "call"),
    [
        (HERMES_TEMPLATE, CALL),
        (LLAMA_TEMPLATE + KNOWN_BY, '{"name": "search", "parameters": {"query": "Lake Orrin deep"}}'),
    ],
    ids=["hermes", "llama3"],
)
def test_an_episode_is_told_the_schemas_calls_and_reads_the_results_behind_its_own_tokens(template: str, call: str):
    config, own = search(), tokenizer(template)
    config.data.chat_template_args = {}
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = 2000, 4000
    generate = Scripted(own, call, "83 metres")

    async def scenario(pool: EnvironmentPool) -> Any:
        player = EpisodePlayer(config, own, generate, pool)
        prompt = Prompt(0, "", [], "83", {}, "How deep is Lake Orrin?")
        return [answer async for _, answer in player.stream([prompt], 1)]

    [episode] = with_pool(config, scenario)
    assert isinstance(episode, Episode), episode
    first, second = generate.asked
    assert '"name": "search"' in first.replace('"name":"search"', '"name": "search"')
    assert first.endswith("<|user|>How deep is Lake Orrin?<|end|><|assistant|>")
    assert second.startswith(f"{first}{call}<|end|><|tool|>Lake Orrin: Lake Orrin lies")
    assert second.endswith("<|end|><|assistant|>")
    assert (episode.reward, episode.completion.finish_reason) == (1.0, "stop")
    assert [turn["role"] for turn in episode.completion.metadata["transcript"]] == [
        "assistant",
        "tool",
        "assistant",
        "user",
    ]
    assert episode.completion.loss_mask is not None
    learned = [t for t, own in zip(episode.completion.token_ids, episode.completion.loss_mask, strict=True) if own]
    assert own.decode(learned) == f"{call}<|end|>83 metres<|end|>"


def test_tools_that_no_template_is_told_of_are_refused():
    opening = {"messages": "1?", "tools": [{"type": "function", "function": {"name": "f"}}]}
    prompt = Prompt(0, "", [], "")
    with pytest.raises(UserError, match="chat template takes none"):
        ConversationRenderer(tokenizer(NO_TOOLS), DataConfig()).opening(prompt, opening)
    with pytest.raises(UserError, match=r"data\.chat_template is false"):
        ConversationRenderer(tokenizer(HERMES_TEMPLATE), DataConfig(chat_template=False)).opening(prompt, opening)


OWN = """
from forge_hpc.environments import Tools, tool

class Own(Tools):
    @tool
    async def twice(self, number: float):
        "Twice as much."
        return {"is": 2 * number}

    @tool
    def fail(self) -> str:
        raise OSError("gone")
"""


def test_a_class_of_ones_own_may_be_async_give_json_raise_and_leave_the_reward_to_others(tmp_path: Path):
    (tmp_path / "own.py").write_text(OWN)
    config = Config(environment=EnvironmentConfig(name=f"{tmp_path}/own.py:Own"))

    async def scenario(pool: EnvironmentPool) -> list[Step]:
        async with pool.open() as environment:
            await environment.reset(Prompt(0, "", [], "", {}, "?"))
            calls = (f'<tool_call>{{"name": "{name}", "arguments": {args}}}' for name, args in CALLS)
            return [await environment.step(Response(text, tools=HERMES)) for text in (*calls, "done")]

    CALLS = (("twice", '{"number": 1.5}'), ("fail", "{}"))
    twice, fail, done = with_pool(config, scenario)
    assert twice.observation == '{"is": 3.0}'
    assert fail.observation == "error: OSError: gone"
    assert done == Step(reward=None, done=True)
